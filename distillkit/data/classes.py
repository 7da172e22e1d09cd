"""Classification sets: pictures in class folders, CIFAR's binary files, webdataset's tar files, digits on photographs.

``dataset[(epoch, index)]`` -> image float32 (3, H, W) in 0..1, and a target dict of label (int), key (str: what the
picture is called in its set, which label maps are found by) and, where the set was given label maps, label_map.
A sample depends on (seed, epoch, index) alone.
"""

from __future__ import annotations

import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from distillkit.data.class_transforms import Middle, View
from distillkit.data.label_map import LabelMap
from distillkit.data.problems import DataError, Problem
from distillkit.data.scenes import Scenes
from distillkit.data.transforms import generator_for

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR_VAL = 5000  # of the 50 000 training pictures, the last ones


class Transform(Protocol):
    """What a set is given as ``transform``."""

    def __call__(self, image: tv_tensors.Image, label_map: LabelMap | None, generator: torch.Generator) -> View: ...


class Maps(Protocol):
    """Stored label maps: ``maps[key]`` -> scores (k, h, w), indices (k, h, w)."""

    region: Any

    def __getitem__(self, key: str) -> tuple[Tensor, Tensor]: ...


class ClassPictures(Dataset[tuple[Tensor, dict[str, Any]]], ABC):
    """Items as this module says.

    Args:
        classes: names by label.
        keys: of the pictures, in order.
        transform: None: all of the picture at 224 x 224.
        maps: label maps of every picture.
    """

    def __init__(
        self,
        classes: Sequence[str],
        keys: Sequence[str],
        transform: Transform | None = None,
        seed: int = 0,
        maps: Maps | None = None,
    ):
        self.classes, self.keys = list(classes), list(keys)
        self.transform: Transform = transform or Middle((224, 224), 1.0)
        self.seed = seed
        self.maps = maps

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        epoch, index = place
        pixels, label = self.load(index, epoch)
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        label_map = None
        if self.maps is not None:
            scores, indices = self.maps[self.keys[index]]
            label_map = LabelMap.from_stored(scores, indices, pixels.shape[:2], self.maps.region)
        view = self.transform(image, label_map, generator_for(self.seed, epoch, index))
        target: dict[str, Any] = {"label": label, "key": self.keys[index]}
        return view.image, target if view.label_map is None else target | {"label_map": view.label_map}

    @abstractmethod
    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, int]:
        """Picture ``index``, uint8 (H, W, 3) RGB, and its label; composed ones may differ by epoch."""


class PictureFolder(ClassPictures):
    """Pictures at ROOT/SPLIT/CLASS/**; keys are paths below ROOT/SPLIT.

    Raises:
        DataError: no such folder, no class folders, or a class without pictures.
    """

    def __init__(self, root: str | Path, split: str, classes: Sequence[str] | None = None, **options: Any):
        self.folder = Path(root) / split
        there = sorted(p.name for p in self.folder.iterdir() if p.is_dir()) if self.folder.is_dir() else []
        names = list(classes or there)
        found = {name: _pictures_below(self.folder / name) for name in names}
        problems = [
            Problem(str(self.folder / name), name, "holds no picture", f"put pictures there ({', '.join(SUFFIXES)})")
            for name, paths in found.items()
            if not paths
        ]
        if not names:
            remedy = "give data.root and the name of the split: pictures are at ROOT/SPLIT/CLASS/"
            problems = [Problem(str(self.folder), "folder", "there are no class folders in it", remedy)]
        problems += [
            Problem(str(self.folder / name), name, "is no class of the training split", "take the folder out")
            for name in there
            if name not in names
        ]
        if problems:
            raise DataError(problems)
        pairs = [(path, label) for label, name in enumerate(names) for path in found[name]]
        keys = [path.relative_to(self.folder).as_posix() for path, _ in pairs]
        self.labels = [label for _, label in pairs]
        super().__init__(names, keys, **options)

    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, int]:
        path = self.folder / self.keys[index]
        try:
            with Image.open(path) as picture:
                return np.array(picture.convert("RGB")), self.labels[index]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(str(path), error) from error


class Cifar(ClassPictures):
    """CIFAR-10 or CIFAR-100 from their binary files, as they are downloaded. keys: SPLIT/number.

    Raises:
        DataError: a file is missing, or of another size than it should be.
    """

    def __init__(self, root: str | Path, split: str, classes: int = 10, **options: Any):
        batches = [f"data_batch_{i}.bin" for i in range(1, 6)] if classes == 10 else ["train.bin"]
        files = ["test_batch.bin" if classes == 10 else "test.bin"] if split == "test" else batches
        head = 1 if classes == 10 else 2  # CIFAR-100 has its coarse label before the fine one
        rows = np.concatenate([_cifar_rows(Path(root) / name, head + 3072) for name in files])
        part = {"train": slice(0, len(rows) - CIFAR_VAL), "val": slice(len(rows) - CIFAR_VAL, None)}
        rows = rows[part.get(split, slice(None))]
        self.pixels = rows[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        names = CIFAR10_CLASSES if classes == 10 else _cifar100_names(Path(root))
        keys = [f"{split}/{i:05d}" for i in range(len(rows))]
        self.labels = rows[:, head - 1].tolist()
        super().__init__(names, keys, **options)

    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, int]:
        return self.pixels[index].copy(), self.labels[index]


def _cifar_rows(path: Path, width: int) -> np.ndarray:
    """uint8 (pictures, width) of one file."""
    if not path.is_file():
        remedy = (
            "download the binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz), unpack it, and give root"
        )
        raise DataError([Problem(str(path), "file", "no such file", remedy)])
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % width:
        what = f"{len(content)} bytes are no whole number of pictures of {width} bytes"
        raise DataError([Problem(str(path), "file", what, "download it again")])
    return content.reshape(-1, width)


def _cifar100_names(root: Path) -> list[str]:
    path = root / "fine_label_names.txt"
    if not path.is_file():
        raise DataError([Problem(str(path), "file", "no such file", "it comes with the binary version of CIFAR-100")])
    return path.read_text(encoding="utf-8").split()


class TarPictures(ClassPictures):
    """Tar files in webdataset's layout: KEY.jpg (or another picture) beside KEY.cls, the label as a number.

    The files are listed once; a picture is then one read at its place. keys: names in the files.

    Raises:
        DataError: no file, a picture without a label, a label that is none of the classes.
    """

    def __init__(self, root: str | Path, files: str, classes: Sequence[str], **options: Any):
        paths = sorted(Path(root).glob(files))
        if not paths:
            raise DataError([Problem(f"{root}/{files}", "files", "none is there", "give data.root and a pattern")])
        self.places: list[tuple[Path, int, int]] = []
        self.labels: list[int] = []
        keys, problems = [], []
        for path in paths:
            pictures, said = _tar_listing(path)
            for name, place in pictures.items():
                label = said.get(name.rpartition(".")[0], "")
                if not label.isdecimal() or int(label) >= len(classes):
                    what = f"its label (the .cls beside it) is {label!r}" if label else "it has no label (.cls)"
                    remedy = f"expected a number from 0 to {len(classes) - 1}"
                    problems.append(Problem(str(path), name, what, remedy))
                    continue
                self.places.append((path, *place))
                keys.append(name)
                self.labels.append(int(label))
        if problems:
            raise DataError(problems)
        super().__init__(classes, keys, **options)

    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, int]:
        path, offset, size = self.places[index]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                with Image.open(io.BytesIO(file.read(size))) as picture:
                    return np.array(picture.convert("RGB")), self.labels[index]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(f"{path}: {self.keys[index]}", error) from error


def _tar_listing(path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """By name: where each picture's bytes are (offset, size); by KEY: what each label file says."""
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                key, _, suffix = name.rpartition(".")
                if member.isfile() and f".{suffix.lower()}" in SUFFIXES:
                    pictures[name] = (member.offset_data, member.size)
                elif member.isfile() and suffix == "cls":
                    content = archive.extractfile(member)
                    labels[key] = content.read(32).decode("ascii", "replace").strip() if content else ""
    except tarfile.TarError as error:
        raise DataError(
            [Problem(str(path), "file", f"no tar file ({error})", "give uncompressed tar files")]
        ) from error
    return pictures, labels


class DigitPictures(ClassPictures):
    """One handwritten digit on a crop of a photograph, at a random place; see ``Scenes``. keys: SPLIT/number."""

    def __init__(self, n: int, size: tuple[int, int], split: str, seed: int = 0, **options: Any):
        self.scenes = Scenes(n, size, seed, split, (1, 1))
        super().__init__(self.scenes.classes, [f"{split}/{i:05d}" for i in range(n)], seed=seed, **options)

    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, int]:
        scene = self.scenes.scene(index, epoch)
        return scene.image, int(scene.labels[0])


def _pictures_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _unreadable(where: str, error: Exception) -> DataError:
    remedy = "copy the file again or take it out"
    return DataError([Problem(where, "picture", f"cannot be decoded ({error})", remedy)])


def collate(items: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> tuple[Tensor, dict[str, Any]]:
    """(images (B, 3, H, W), targets): labels (B,) and, where there are some, label_map, one a picture."""
    images, targets = zip(*items, strict=True)
    together: dict[str, Any] = {"labels": torch.tensor([target["label"] for target in targets])}
    if "label_map" in targets[0]:
        together["label_map"] = [target["label_map"] for target in targets]
    return torch.stack(images), together
