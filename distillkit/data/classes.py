"""Classification sets: pictures in class folders, CIFAR's binary files, webdataset's tar files, digits on photographs.

``dataset[(epoch, index)]`` -> image float32 (3, H, W) in 0..1, and a target dict of label (int), key (str: what the
picture is called in its set, which label maps are found by) and, where the set was given label maps, label_map.
A sample depends on (seed, epoch, index) alone.
"""

from __future__ import annotations

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from distillkit.data.class_transforms import Middle, View
from distillkit.data.label_map import LabelMap
from distillkit.data.picture_list import PICTURES, PictureList, expanded, list_pictures
from distillkit.data.problems import DataError, Problem
from distillkit.data.scenes import Scenes
from distillkit.data.transforms import generator_for

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
        self.region: Any = None  # of the maps, where it is not the one that they give

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        epoch, index = place
        pixels, label = self.load(index, epoch)
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        label_map = None
        if self.maps is not None:
            scores, indices = self.maps[self.keys[index]]
            label_map = LabelMap.from_stored(scores, indices, pixels.shape[:2], self.region or self.maps.region)
        view = self.transform(image, label_map, generator_for(self.seed, epoch, index))
        target: dict[str, Any] = {"label": label, "key": self.keys[index]}
        return view.image, target if view.label_map is None else target | {"label_map": view.label_map}

    @abstractmethod
    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, int]:
        """Picture ``index``, uint8 (H, W, 3) RGB, and its label; composed ones may differ by epoch."""


class ListedPictures(ClassPictures):
    """Pictures in files.

    Args:
        pictures: where they are; keys are theirs.
        labels: of each.
    """

    def __init__(self, classes: Sequence[str], pictures: PictureList, labels: Sequence[int], **options: Any):
        super().__init__(classes, pictures.keys, **options)
        self.pictures, self.labels = pictures, list(labels)

    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, int]:
        return np.array(self.pictures.read(index)), self.labels[index]


def class_folders(folder: Path) -> list[str]:
    """The names of the classes in ``folder``. Raises DataError where there are none."""
    there = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not there:
        remedy = "give data.root and the name of the split: pictures are at ROOT/SPLIT/CLASS/"
        raise DataError([Problem(str(folder), "folder", "there are no class folders in it", remedy)])
    return there


class PictureFolder(ListedPictures):
    """Pictures at ROOT/SPLIT/CLASS/**; keys are paths below ROOT/SPLIT.

    Raises:
        DataError: no class folders, one that is no class or has no picture, pictures outside of them.
    """

    def __init__(self, root: str | Path, split: str, classes: Sequence[str] | None = None, **options: Any):
        folder = Path(root) / split
        there = class_folders(folder)
        names = list(classes or there)
        pictures = list_pictures(folder)
        of = [key.partition("/")[0] if "/" in key else "" for key in pictures.keys]
        shown = set(of)
        problems = [
            Problem(str(folder / name), name, "holds no picture", f"put pictures there ({', '.join(PICTURES)})")
            for name in names
            if name not in shown
        ]
        problems += [
            Problem(str(folder / name), name, "is no class of the training split", "take the folder out")
            for name in there
            if name not in names
        ]
        if "" in shown:
            key = pictures.keys[of.index("")]
            problems.append(Problem(str(folder / key), "picture", "is in no class folder", "move it into one"))
        if problems:
            raise DataError(problems)
        numbers = {name: label for label, name in enumerate(names)}
        super().__init__(names, pictures, [numbers[name] for name in of], **options)


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


class TarPictures(ListedPictures):
    """Tar files in webdataset's layout: KEY.jpg (or another picture) beside KEY.cls, the label as a number.

    The files are listed once; a picture is then one read at its place. keys: names in the files.

    Raises:
        DataError: no file, a picture without a label, a label that is none of the classes.
    """

    def __init__(self, root: str | Path, files: str, classes: Sequence[str], **options: Any):
        paths = sorted(path for pattern in expanded(files) for path in Path(root).glob(pattern))
        if not paths:
            raise DataError([Problem(f"{root}/{files}", "files", "none is there", "give data.root and a pattern")])
        pictures = list_pictures(paths)
        said = {key: label for path in paths for key, label in _tar_labels(path)}
        labels, problems = [], []
        for index, name in enumerate(pictures.keys):
            label = said.get(name.rpartition(".")[0], "")
            if label.isdecimal() and int(label) < len(classes):
                labels.append(int(label))
                continue
            what = f"its label (the .cls beside it) is {label!r}" if label else "it has no label (.cls)"
            problems.append(
                Problem(pictures.where(index), None, what, f"expected a number from 0 to {len(classes) - 1}")
            )
        if problems:
            raise DataError(problems)
        super().__init__(classes, pictures, labels, **options)


def _tar_labels(path: Path) -> Iterator[tuple[str, str]]:
    """KEY, and what KEY.cls says."""
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".cls") and (content := archive.extractfile(member)):
                key = member.name.removeprefix("./").removesuffix(".cls")
                yield key, content.read(32).decode("ascii", "replace").strip()


class DigitPictures(ClassPictures):
    """One large handwritten digit on a crop of a photograph, at a random place; see ``Scenes``. keys: SPLIT/number."""

    SIDES = (0.5, 0.7)  # of the small ones of Scenes a classifier learns nothing in a thousand steps

    def __init__(self, n: int, size: tuple[int, int], split: str, seed: int = 0, **options: Any):
        self.scenes = Scenes(n, size, seed, split, (1, 1), sides=self.SIDES)
        super().__init__(self.scenes.classes, [f"{split}/{i:05d}" for i in range(n)], seed=seed, **options)

    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, int]:
        scene = self.scenes.scene(index, epoch)
        return scene.image, int(scene.labels[0])


def collate(items: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> tuple[Tensor, dict[str, Any]]:
    """(images (B, 3, H, W), targets): labels (B,) and, where there are some, label_map, one a picture."""
    images, targets = zip(*items, strict=True)
    together: dict[str, Any] = {"labels": torch.tensor([target["label"] for target in targets])}
    if "label_map" in targets[0]:
        together["label_map"] = [target["label_map"] for target in targets]
    return torch.stack(images), together
