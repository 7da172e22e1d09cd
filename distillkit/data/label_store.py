"""Label maps on disk: for every picture the k classes that an annotator scores highest in each cell of a map.

A folder holds

    manifest.json    what the maps are of and who made them; the pictures' names, in order; the shards and their sha256
    maps-00000.bin   one record a picture, all of the same length, in the manifest's order; and so on
    job.json         instead of the manifest: a call of `distillkit label` that is not finished

A record is the lowest and the highest score of the picture (float32), the scores as steps of 1/255 between these two
(uint8), and the class indices (int16, or int32 where there are more than 32768 classes), both (k, H, W), the highest
score first, little-endian, without padding. So a score is wrong by at most 1/510 of its picture's range; with k = 5 on
7 x 7 cells a picture takes 743 bytes. Nothing read from a file is ever run: there are JSON and numbers, no pickles.

Scores are raw logits. The map lies over the whole picture, stretched to the annotator's input (``region`` "full"), or
over its centre square ("center_square"), always as the file stores its pixels: an EXIF rotation is not applied, neither
here nor where pictures are read for training (Pillow and torchvision do not do so unless they are asked).

Maps of the published format, one torch file a picture, are read by ``release_maps`` with the same interface.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from distillkit.data.picture_list import PictureList, list_pictures, stays_inside

log = logging.getLogger("distillkit.data")

Region = Literal["full", "center_square"]

FORMAT: Literal["distillkit-label-maps"] = "distillkit-label-maps"
VERSION = 1
MANIFEST, JOB = "manifest.json", "job.json"
#: left by a process that failed, for the others that work in the folder; the next call takes it away
STOP = ".stop"
#: a score is one of so many steps between the lowest and the highest of its picture
STEPS = 255


class LabelMapError(ValueError):
    """Label maps that cannot be read, or are not those that are wanted; or that cannot be made as asked."""


class LabelMaps(Protocol):
    """Where label maps come from.

    classes: how many there are. k: how many of them a cell keeps. grid: (H, W) cells. region: what the map covers.
    """

    classes: int
    k: int
    grid: tuple[int, int]
    region: Region

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...

    def __getitem__(self, key: str) -> tuple[Tensor, Tensor]:
        """(scores float32 (k, H, W), class indices int64 (k, H, W)) of a picture, the highest score first."""
        ...


# -- the format -------------------------------------------------------------------------------------------------------


def _checked_key(key: str) -> str:
    if not stays_inside(key):
        raise ValueError(f"{key!r} leads out of the folder of pictures")
    return key


_Key = Annotated[str, AfterValidator(_checked_key)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=1)]
_Channels = tuple[float, float, float]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AnnotatorInfo(_Strict):
    """Who made the maps: the model's name, where its weights came from, their ``weights_sha256``, the precision it ran
    in, and with what options it was built."""

    name: str
    weights: str
    sha256: _Sha256
    precision: str
    options: dict[str, bool | int | float | str | list[int]] = {}


class Preprocessing(_Strict):
    """What the annotator was shown: its input in pixels (height, width), how much of the region that covers (all of
    it), the interpolation of the resize, and mean and standard deviation of the channels in 0..1."""

    size: tuple[_Count, _Count]
    crop: float
    interpolation: str
    mean: _Channels
    std: _Channels


class LabelInfo(_Strict):
    """What maps are of, and how they lie in their files.

    Args:
        classes, k, grid, region: as ``LabelMaps``.
        shard: records of a shard; the last one may have fewer.
        pictures: how many there are. images_sha256: ``PictureList.sha256``.
    """

    annotator: AnnotatorInfo
    preprocessing: Preprocessing
    region: Region
    classes: _Count
    k: _Count
    grid: tuple[_Count, _Count]
    shard: _Count
    pictures: _Count
    images_sha256: _Sha256

    @property
    def record(self) -> np.dtype:
        """The type of one picture's record."""
        shape = (self.k, *self.grid)
        index = "<i2" if self.classes <= 2**15 else "<i4"
        return np.dtype([("low", "<f4"), ("high", "<f4"), ("steps", "u1", shape), ("indices", index, shape)])

    @property
    def shards(self) -> int:
        return -(-self.pictures // self.shard)

    def rows(self, number: int) -> range:
        """The pictures of a shard, by their places in the sorted list."""
        return range(number * self.shard, min((number + 1) * self.shard, self.pictures))

    def differences(self, other: LabelInfo) -> list[str]:
        """What is another in ``other``, as text."""
        here, there = _flat(self.model_dump()), _flat(other.model_dump())
        both = [(name, here.get(name, "not given"), there.get(name, "not given")) for name in here | there]
        return [f"{name}: {_short(old)} there, {_short(new)} now" for name, old, new in both if old != new]


class _Header(_Strict):
    format: Literal["distillkit-label-maps"] = FORMAT
    version: int = VERSION
    maps: LabelInfo


class _Shard(_Strict):
    file: Annotated[str, Field(pattern=r"^maps-[0-9]{5,}\.bin$")]
    sha256: _Sha256
    keys: list[_Key]
    sizes: list[int]


class _Manifest(_Header):
    #: as numpy.dtype takes it, for whoever reads the shards without this module
    record: list[tuple[str, str] | tuple[str, str, tuple[int, ...]]]
    skipped: list[_Key]
    parts: list[_Shard]


def encode(scores: Tensor, indices: Tensor, record: np.dtype) -> np.ndarray:
    """Scores float (N, k, H, W), finite, and class indices (N, k, H, W) as (N,) records."""
    values, places = scores.detach().cpu().float().numpy(), indices.cpu().numpy()
    if places.max() > np.iinfo(record["indices"].base).max:
        raise ValueError(f"class {places.max()} does not fit into {record['indices'].base}: give all classes")
    records = np.empty(len(values), record)
    low, high = (limit((1, 2, 3), keepdims=True).astype(np.float64) for limit in (values.min, values.max))
    step = np.where(high > low, (high - low) / STEPS, 1.0)
    records["low"], records["high"] = low.reshape(-1), high.reshape(-1)
    records["steps"] = np.rint((values - low) / step)
    records["indices"] = places
    return records


def skipped(record: np.dtype) -> np.ndarray:
    """The (1,) record of a picture that could not be read, and was left out."""
    records = np.zeros(1, record)
    records["low"] = records["high"] = np.nan
    return records


def decode(record: np.void) -> tuple[Tensor, Tensor]:
    """A record as (scores float32 (k, H, W), indices int64 (k, H, W))."""
    part = record["steps"] / np.float32(STEPS)
    scores = record["low"] * (1 - part) + record["high"] * part  # exact at both ends, and no difference that overflows
    return torch.from_numpy(scores), torch.from_numpy(record["indices"].astype(np.int64))


def weights_sha256(model: nn.Module) -> str:
    """Of a model's state dict: for every tensor, in the order of their names, name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -- writing ----------------------------------------------------------------------------------------------------------


class LabelWriter:
    """Writes label maps, shard by shard, each in one step; going on in a folder that an earlier call left.

    Args:
        folder: where they go.
        info: what they are.
        pictures: what ``info`` says they are of.
    """

    def __init__(self, folder: str | Path, info: LabelInfo, pictures: PictureList):
        self.folder, self.info, self.pictures = Path(folder), info, pictures

    def begin(self) -> list[int]:
        """Make the folder, or check that what it holds can be gone on with: the shards that are to be made. Of several
        processes only one may.

        Of a finished folder all shards are read, and those that are damaged are to be made again. It is finished also
        where pictures that could not be read were taken away since.

        Raises:
            LabelMapError: it holds maps that were made in another way or of other pictures, or files that are no maps;
                or it is damaged, and pictures that could not be read were taken away since.
        """
        manifest, job = self.folder / MANIFEST, self.folder / JOB
        made = _read(manifest, _Manifest) if manifest.is_file() else None
        if made is not None:
            self._refuse(self._differences(made))
        elif job.is_file():
            self._refuse(_read(job, _Header).maps.differences(self.info))
        elif self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise LabelMapError(f"{self.folder} holds files that are no label maps: use an empty folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (*self.folder.glob(".*.part"), self.folder / STOP):
            left.unlink(missing_ok=True)
        if made is not None:
            damaged = self._damaged(made)
            if not damaged:
                return []
            self._discard(damaged, made)
        _replace(job, _json(_Header(maps=self.info)))
        manifest.unlink(missing_ok=True)
        return [number for number in range(self.info.shards) if not self.finished(number)]

    def _differences(self, made: _Manifest) -> list[str]:
        """What is another in finished maps, as text; pictures by their names."""
        of_these = {"pictures": self.info.pictures, "images_sha256": self.info.images_sha256}
        differing = made.maps.model_copy(update=of_these).differences(self.info)
        if made.maps.images_sha256 != self.info.images_sha256:
            differing += _changes(made.parts, made.skipped, self.pictures).said(self.pictures)
        return differing

    def _refuse(self, differing: list[str]) -> None:
        if differing:
            what = "; ".join(differing)
            raise LabelMapError(f"{self.folder} holds maps that are not these ({what}): use another folder")

    def _damaged(self, made: _Manifest) -> list[Path]:
        wanted = {part.file: part.sha256 for part in made.parts}
        paths = [self.folder / shard_name(number) for number in range(made.maps.shards)]
        return [path for path in paths if not path.is_file() or _sha256(path) != wanted.get(path.name)]

    def _discard(self, damaged: list[Path], made: _Manifest) -> None:
        names = some([path.name for path in damaged])
        if made.maps != self.info:
            raise LabelMapError(
                f"{self.folder}: {names}: {LOST}, and cannot be made again without the pictures that were skipped "
                f"({some(made.skipped)}): put these back, or label in another folder"
            )
        log.warning(f"{self.folder}: {names}: {LOST}, made again")
        for path in damaged:
            path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Tell the other processes that work in the folder to stop."""
        with suppress(OSError):  # the disk may be what failed
            (self.folder / STOP).touch()

    @property
    def stopped(self) -> bool:
        """Whether a process that works in the folder failed."""
        return (self.folder / STOP).exists()

    def finished(self, number: int) -> bool:
        """Whether a shard is there, and whole."""
        path = self.folder / shard_name(number)
        return path.is_file() and path.stat().st_size == len(self.info.rows(number)) * self.info.record.itemsize

    def write(self, number: int, records: np.ndarray) -> None:
        """Write a shard: the records of ``info.rows(number)``."""
        if records.dtype != self.info.record or len(records) != len(self.info.rows(number)):
            expected = f"{len(self.info.rows(number))} records of {self.info.record.itemsize} bytes"
            raise ValueError(f"shard {number}: expected {expected}, got {records.shape} of {records.dtype.itemsize}")
        _replace(self.folder / shard_name(number), records.tobytes())

    def finish(self) -> None:
        """Write the manifest, when all shards are there. Of several processes only one may.

        Raises:
            LabelMapError: some are not.
        """
        if (self.folder / MANIFEST).is_file():
            return
        gone = [shard_name(number) for number in range(self.info.shards) if not self.finished(number)]
        if gone:
            raise LabelMapError(
                f"{self.folder}: {len(gone)} of {self.info.shards} shards are not there ({some(gone)}); all processes "
                "must write to this folder, on a disk that they share; the same command goes on"
            )
        parts, left_out = [], []
        for number in range(self.info.shards):
            rows = self.info.rows(number)
            content = (self.folder / shard_name(number)).read_bytes()
            keys, sizes = self.pictures.keys[rows.start : rows.stop], self.pictures.sizes[rows.start : rows.stop]
            absent = np.isnan(np.frombuffer(content, self.info.record)["low"])
            left_out += [keys[row] for row in np.flatnonzero(absent)]
            digest = hashlib.sha256(content).hexdigest()
            parts.append(_Shard(file=shard_name(number), sha256=digest, keys=keys, sizes=sizes))
        record = self.info.record.descr
        manifest = _Manifest(maps=self.info, record=record, skipped=left_out, parts=parts)
        _replace(self.folder / MANIFEST, _json(manifest))
        (self.folder / JOB).unlink(missing_ok=True)


def shard_name(number: int) -> str:
    return f"maps-{number:05d}.bin"


def _replace(path: Path, content: bytes) -> None:
    """Give a file its content in one step: whatever happens meanwhile, it is the old one or the new one, whole."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _json(value: BaseModel) -> bytes:
    # in ASCII: names that are no UTF-8 can be written, too
    return (json.dumps(value.model_dump(mode="json"), indent=1) + "\n").encode("ascii")


# -- reading ----------------------------------------------------------------------------------------------------------


class LabelStore:
    """``store[key] -> (scores float32 (k, H, W), indices int64 (k, H, W))`` of label maps in a folder.

    Opening reads the manifest (about a kilobyte of memory for five pictures) and the sizes of the shards; a picture is
    read at its place, and no file stays open. Loader processes may share it: what they are sent is the path.

    Args:
        folder: what `distillkit label` wrote.

    Raises:
        LabelMapError: no maps, or unfinished ones, of a newer version, damaged, or with shards that are gone or
            broken off.

    Attributes: keys, the names of the pictures that have a map; skipped, those of pictures that could not be read;
    classes, k, grid, region as ``LabelMaps``; info, everything the manifest says of the maps.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self._manifest()
        self.info = manifest.maps
        self.classes, self.k, self.grid = self.info.classes, self.info.k, self.info.grid
        self.region: Region = self.info.region
        self._parts = manifest.parts
        self._check_parts(manifest)
        self.skipped = frozenset(manifest.skipped)
        self._places = {key: place for place, key in enumerate(key for part in self._parts for key in part.keys)}

    @property
    def keys(self) -> list[str]:
        return [key for key in self._places if key not in self.skipped]

    def __len__(self) -> int:
        return len(self._places) - len(self.skipped)

    def __contains__(self, key: object) -> bool:
        return key in self._places and key not in self.skipped

    def __getitem__(self, key: str) -> tuple[Tensor, Tensor]:
        if key not in self:
            raise LabelMapError(f"{self.folder}: {self._why_not(key)}")
        number, row = divmod(self._places[key], self.info.shard)
        record = self._record(number, row)
        scores, indices = decode(record)
        if indices.numpy().view(np.uint64).max() >= self.classes or not record["low"] <= record["high"]:
            raise LabelMapError(
                f"{self._path(number)}: the map of {key} is no map of {self.classes} classes: {DAMAGED}"
            )
        return scores, indices

    def _record(self, number: int, row: int) -> np.void:
        path, length = self._path(number), self.info.record.itemsize
        with path.open("rb", buffering=0) as file:
            file.seek(row * length)
            content = file.read(length)
        if len(content) < length:
            raise LabelMapError(f"{path}: ends before picture {row}: {DAMAGED}")
        return np.frombuffer(content, self.info.record)[0]

    def __reduce__(self) -> tuple[type[LabelStore], tuple[Path]]:
        return type(self), (self.folder,)

    def check(
        self,
        pictures: PictureList | str | Path | Iterable[str] | None = None,
        annotator: str | nn.Module | None = None,
        checksums: bool = False,
    ) -> None:
        """Refuse maps that are not those that are wanted.

        Args:
            pictures: a folder, or a ``list_pictures``: exactly these pictures must be mapped (those that were skipped
                may be gone), and their files must be as long as they were; or names, which must all have a map.
            annotator: the name of a model, its ``weights_sha256``, or the model itself.
            checksums: read all shards, too.

        Raises:
            LabelMapError: they are not. DataError: the folder cannot be listed.
        """
        if annotator is not None:
            self._check_annotator(annotator)
        if isinstance(pictures, str | Path):
            pictures = list_pictures(pictures)
        if isinstance(pictures, PictureList):
            self._check_same(pictures)
        if pictures is not None:
            self._check_mapped(pictures.keys if isinstance(pictures, PictureList) else pictures)
        for number, part in enumerate(self._parts if checksums else []):
            if _sha256(self._path(number)) != part.sha256:
                raise LabelMapError(f"{self._path(number)}: the checksum is not that of {MANIFEST}: {DAMAGED}")

    def _manifest(self) -> _Manifest:
        path = self.folder / MANIFEST
        if path.is_file():
            return _read(path, _Manifest)
        if (self.folder / JOB).is_file():
            info = _read(self.folder / JOB, _Header).maps
            there = sum((self.folder / shard_name(number)).is_file() for number in range(info.shards))
            raise LabelMapError(
                f"{self.folder}: unfinished, {there} of {info.shards} shards are there; go on with the same "
                "`distillkit label` command"
            )
        raise LabelMapError(f"{self.folder}: no {MANIFEST} in it: no label maps; make them with `distillkit label`")

    def _check_parts(self, manifest: _Manifest) -> None:
        """The manifest agrees with itself, and shards are as long as it says."""
        path = self.folder / MANIFEST
        expected = [(shard_name(number), len(self.info.rows(number))) for number in range(self.info.shards)]
        found = [(part.file, len(part.keys)) for part in self._parts]
        if found != expected or any(len(part.keys) != len(part.sizes) for part in self._parts):
            raise LabelMapError(f"{path}: its shards are not those of {self.info.pictures} pictures; {AGAIN}")
        if manifest.record != self.info.record.descr:
            raise LabelMapError(f"{path}: the record is not that of its k, grid and classes; {AGAIN}")
        for number, (_, records) in enumerate(expected):
            file, length = self._path(number), records * self.info.record.itemsize
            if not file.is_file():
                raise LabelMapError(f"{file}: no such file, but the manifest names it: {DAMAGED}")
            if file.stat().st_size != length:
                raise LabelMapError(f"{file}: {file.stat().st_size} bytes, expected {length}: {DAMAGED}")

    def _check_annotator(self, wanted: str | nn.Module) -> None:
        own = self.info.annotator
        names = {weights_sha256(wanted)} if isinstance(wanted, nn.Module) else {wanted}
        if names.isdisjoint({own.name, own.sha256}):
            raise LabelMapError(
                f"{self.folder}: maps of {own.name} (weights sha256 {_short(own.sha256)}), expected those of "
                f"{_short(names.pop())}: use that annotator's maps, or make them with `distillkit label`"
            )

    def _check_same(self, pictures: PictureList) -> None:
        """Of pictures that have no map ``_check_mapped`` tells."""
        if pictures.sha256 == self.info.images_sha256:
            return
        changes = _changes(self._parts, self.skipped, pictures)._replace(new=())
        if changes.said(pictures):
            what = "; ".join(changes.said(pictures))
            raise LabelMapError(f"{self.folder}: {what}: maps of other pictures; name the right ones, or label these")

    def _check_mapped(self, keys: Iterable[str]) -> None:
        without = [key for key in keys if key not in self]
        if without:
            raise LabelMapError(
                f"{self.folder}: {len(without)} pictures have no map: {self._why_not(without[0])}"
                + (f"; nor have {some(without[1:])}" if without[1:] else "")
            )

    def _why_not(self, key: str) -> str:
        if key in self.skipped:
            return f"{key} could not be read and was skipped; take it out of the training pictures"
        return f"no map of {key}, only of such as {next(iter(self._places))}; label the pictures that you train on"

    def _path(self, number: int) -> Path:
        return self.folder / shard_name(number)


class _Changes(NamedTuple):
    """Pictures that were labelled and are gone, are of another length, or are new."""

    gone: Sequence[str]
    changed: Sequence[str]
    new: Sequence[str]

    def said(self, pictures: PictureList) -> list[str]:
        where = ", ".join(map(str, pictures.sources[:3]))
        lines = (
            (self.gone, f"of its pictures are not in {where}"),
            (self.changed, f"pictures in {where} are not as long as they were"),
            (self.new, f"pictures in {where} are new"),
        )
        return [f"{len(keys)} {what} ({some(keys)})" for keys, what in lines if keys]


def _changes(parts: Sequence[_Shard], without: Collection[str], pictures: PictureList) -> _Changes:
    """From the pictures of a manifest to those that there are; those without a map may be gone."""
    now = dict(zip(pictures.keys, pictures.sizes, strict=True))
    then = {key: size for part in parts for key, size in zip(part.keys, part.sizes, strict=True)}
    return _Changes(
        sorted(then.keys() - now.keys() - set(without)),
        [key for key, size in then.items() if now.get(key, size) != size],
        [key for key in now if key not in then],
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


LOST = "gone or damaged"
DAMAGED = "damaged or exchanged; copy the maps again, or call `distillkit label` again, which makes this file anew"
AGAIN = "copy it again, or label the pictures again in another folder"

M = TypeVar("M", bound=_Header)


def _read(path: Path, kind: type[M]) -> M:
    """A manifest or a job. Raises LabelMapError, naming the file."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise LabelMapError(f"{path}: not JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LabelMapError(f"{path}: not written by distillkit (format is not {FORMAT!r}); name another folder")
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise LabelMapError(f"{path}: version {version}; this distillkit reads up to {VERSION}: install a newer one")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise LabelMapError(f"{path}: {at}: {first['msg']}; {AGAIN}") from error


def _flat(value: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested dicts as one, by dotted path."""
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
    return flat


def _short(value: object) -> str:
    """A value for a message; of a checksum the beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
