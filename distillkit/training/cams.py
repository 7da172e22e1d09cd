"""`distillkit cam`, and the pseudo masks of a run: activation maps of many pictures, written to a folder.

A picture's files are written whole, its mask last: a call that was stopped goes on with the pictures that have no mask
yet. What the folder's files were made with is in its cams.json, and a call that would make them otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from distillkit.data.label_store import weights_sha256
from distillkit.data.segmentation import BACKGROUND, MaskFiles
from distillkit.evaluation.cam import class_maps
from distillkit.evaluation.cam_drawing import draw_class_maps, draw_mask, mask_picture
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.crf import crf_backend
from distillkit.evaluation.draw import beside
from distillkit.evaluation.predict import evaluating, in_order
from distillkit.evaluation.pseudo_masks import pseudo_mask
from distillkit.evaluation.segmentation import confusion_matrix
from distillkit.recipe import train_of
from distillkit.schema import Cam, Masks, Recipe, WeakRecipe
from distillkit.training import build, checkpoint
from distillkit.training.build import Classes
from distillkit.training.errors import RunError
from distillkit.training.folder import alone_in
from distillkit.training.mask_predict import shares_of
from distillkit.training.named import folder_of, named_model
from distillkit.training.pictures import check_headers, named_pictures, read_picture
from distillkit.training.processes import processes

MANIFEST = "cams.json"
#: a class is predicted where its probability is above it
SHOWN = 0.5

if TYPE_CHECKING:
    from distillkit.training.tasks import Asked

Progress = Callable[[int, int], None]


class LoosePictures(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Pictures of which nothing is known. Items: (image in 0..1, target with key and picture, its pixels).

    Args:
        paths: keys are their names without ending.
        size: (height, width) that they are brought to; None: their own.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int] | None):
        self.paths, self.size = list(paths), size
        self.keys = [path.stem for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        pixels = np.array(read_picture(self.paths[place[1]]))
        image = F.to_dtype(torch.from_numpy(pixels).permute(2, 0, 1), torch.float32, scale=True)
        if self.size is not None:
            image = F.resize(image, list(self.size), F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        return image, {"key": self.keys[place[1]], "picture": pixels}


def cam(
    recipe: Recipe,
    name: str | None,
    folder: Path,
    split: Literal["train", "val", "test"] = "train",
    images: Sequence[Path] = (),
    maps: bool = False,
    overlays: bool = False,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """`distillkit cam`: files of a split of a recipe, made with its labels, or of other ``images``; see ``write_cams``.

    Args:
        name: what ``named_model`` takes.

    Returns:
        how many pictures there are, and of how many this call, in all its processes, has made the files.

    Raises:
        RunError: a recipe of another task; no such model or split; what else ``write_cams`` raises.
    """
    if not isinstance(recipe, WeakRecipe):
        raise RunError(
            f"activation maps are made by recipes of the task weak-segmentation, and the task of {recipe.name!r} is "
            f"{recipe.task}: write one, with this classifier as its student"
        )
    check_classifier(recipe, name)
    masks = masks_of(recipe, folder_of(recipe, name))
    if images:
        data: Any = _loose(recipe, images, folder)
        classes: Sequence[str] = build.build_classes(recipe).classes
        source: dict[str, Any] = {"images": [str(path.resolve()) for path in images]}
    else:
        data = build.build_data(recipe, split, augmented=False)
        classes, source = data.classes, source_of_split(recipe, split)
    model = named_model(recipe, name, classes)
    how = recipe.cam, masks, source, maps, overlays, recipe.data.workers, progress
    with alone_in(folder) if processes().is_main_process else nullcontext():
        made = write_cams(model, data, classes, folder, *how)
    return len(data), sum(gather_object([made]))


def check_classifier(recipe: WeakRecipe, name: str | Path | None) -> None:
    """Raises RunError for a row that trains a segmentation model alone: its classifier is as it was drawn at random."""
    for row in recipe.compare:
        if row.row == name and row.masks == "true" and not train_of(recipe, row.train).epochs:
            raise RunError(
                f"the row {name!r} learns from true masks and trains no classifier, so it has no activation maps: name "
                "another row, or ask for its segmentation model (distillkit eval --task segment)"
            )


def masks_of(recipe: WeakRecipe, folder: Path | None) -> Masks:
    """How pseudo masks are made: as the recipe says, and where it names no threshold, with the one that was best on its
    val split.

    Args:
        folder: of a row, as the run left it; None: of a model that the run has not trained.

    Raises RunError where there is no such threshold.
    """
    if recipe.masks.threshold is not None or recipe.masks.rule == "saliency":
        return recipe.masks
    if folder is None or not (folder / "result.json").exists():
        raise RunError(
            "masks.threshold is null, which a run chooses for each of its rows on its val split: name such a row, or "
            "give the threshold, as in masks.threshold=0.2"
        )
    best = checkpoint.read_json(folder / "result.json")["scores"]["cam_threshold"]
    return recipe.masks.model_copy(update={"threshold": best})


def source_of_split(recipe: WeakRecipe, split: str) -> dict[str, Any]:
    """Of a split, what its files are made from, for ``write_cams``."""
    said = recipe.data.model_dump(exclude={"size", "batch", "workers", "short_side", "augment"})
    return {"split": split, **said}


def predict_cams(recipe: WeakRecipe, model: nn.Module, data: Classes, asked: Asked) -> list[dict[str, Any]]:
    """`distillkit predict`: masks/NAME.png and overlays/NAME.jpg of pictures, as ``write_cams`` makes them, by the
    classes that the model finds in them; and predictions.json.

    Returns:
        what predictions.json holds, one row a picture: file; mask, its path; and under classes the share of the
        picture's pixels that each class has, of those that were found, the largest first.
    """
    check_classifier(recipe, asked.weights)
    if (asked.folder / MANIFEST).exists():
        raise RunError(f"{asked.folder} holds what distillkit cam wrote, and goes on with: name another folder")
    pictures = _loose(recipe, asked.images, asked.folder)
    masks = masks_of(recipe, folder_of(recipe, asked.weights))
    writer = _Writer(model, pictures, data.classes, asked.folder, recipe.cam, masks, overlays=True)
    rows: list[dict[str, Any]] = []
    for number, mask in enumerate(writer.write(range(len(pictures))), 1):
        path = pictures.paths[number - 1]
        shares = shares_of(mask, [BACKGROUND, *data.classes])
        rows.append({"file": str(path), "mask": str(writer.mask_file(path.stem)), "classes": shares})
        if asked.progress is not None:
            asked.progress("pictures", number, len(pictures))
    checkpoint.write_json(asked.folder / "predictions.json", rows)
    return rows


def _loose(recipe: WeakRecipe, images: Sequence[Path], folder: Path) -> LoosePictures:
    """Pictures that a command line names. Raises RunError where they cannot be had, or lack what masks are made of."""
    if recipe.masks.rule == "saliency":
        raise RunError(
            "masks.rule is saliency, and pictures that are no split of the recipe have no saliency maps: choose "
            "masks.rule=threshold or crf"
        )
    named = [path for path, _ in named_pictures(images, folder / "masks")]
    check_headers(named)
    size = recipe.cam.size
    return LoosePictures(named, None if size is None else (size[0], size[1]))


def write_cams(
    model: nn.Module,
    data: Any,
    classes: Sequence[str],
    folder: Path,
    cam: Cam,
    masks: Masks,
    source: Mapping[str, Any],
    maps: bool = False,
    overlays: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> int:
    """Write masks/KEY.png of every picture: its pseudo mask, 0 = background, i + 1 = classes[i], at its size.

    Pictures whose mask is there are left out. Several processes share the others.

    Args:
        model: the classifier; it is moved to this process's device.
        data: a set of ``training.build.label_data`` for evaluation, or ``LoosePictures``. A picture without labels in
            its target has those classes that the model finds likelier than not, or else the likeliest; a student of
            local-to-global transfer, which learns where classes are and not whether, tends to find too many.
        source: where pictures and labels are from: files made from others are not gone on with.
        maps: also cams/KEY/CLASS.png of the picture's classes, grey, 255 times each class's map.
        overlays: also overlays/KEY.jpg: the picture, the maps drawn over it, and its mask.
        workers: processes that read pictures.
        progress: called with pictures done, and all of them.

    Returns:
        How many pictures this process has made files of; those of the others were there.

    Raises:
        RunError: the folder was written with another model or other settings; a picture of which no maps can be made,
            or that lacks what the rule reads. DataError: a picture that cannot be read.
    """
    state = processes()
    writer = _Writer(model, data, classes, folder, cam, masks, maps, overlays, workers)
    _check_manifest(folder, writer.manifest(source))
    mine = range(state.process_index, len(writer.keys), state.num_processes)
    missing = [i for i in mine if not writer.mask_file(writer.keys[i]).exists()]
    seen = progress or (lambda done, total: None)
    seen(there := len(mine) - len(missing), len(mine))
    for done, _ in enumerate(writer.write(missing), there + 1):
        seen(done, len(mine))
    state.wait_for_everyone()
    return len(missing)


class _Writer:
    """Makes the files of pictures; arguments are those of ``write_cams``."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        classes: Sequence[str],
        folder: Path,
        cam: Cam,
        masks: Masks,
        maps: bool = False,
        overlays: bool = False,
        workers: int = 0,
    ):
        self.model, self.data, self.classes, self.folder = model.to(processes().device), data, list(classes), folder
        self.cam, self.masks, self.maps, self.overlays, self.workers = cam, masks, maps, overlays, workers
        self.keys = keys_of(data)

    def manifest(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """What the files depend on."""
        return {
            "format": "distillkit-cams-1",
            "model": type(self.model).__name__,
            "weights": weights_sha256(self.model),
            "classes": self.classes,
            "source": dict(source),
            "cam": self.cam.model_dump(exclude={"thresholds"}),
            "masks": self.masks.model_dump(),
            "crf": crf_backend() if self.masks.rule == "crf" else None,
            "maps": self.maps,
            "overlays": self.overlays,
        }

    def write(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """The mask of each of these pictures, int64 (H, W), once its files are there."""
        with evaluating(self.model):
            for index, [(image, target)] in zip(indices, in_order(_Part(self.data, indices), 1, self.workers)):
                try:
                    mask = self._of_one(index, image, target)
                except ValueError as error:
                    raise RunError(f"picture {target['key']}: {error}") from error
                yield mask

    def _of_one(self, index: int, image: Tensor, target: dict[str, Any]) -> Tensor:
        key, picture = target["key"], _original(self.data, index, image, target)
        image, size = image.to(processes().device), (picture.shape[1], picture.shape[2])
        labels = target["labels"] if "labels" in target else _likely(self.model, image)
        how = self.cam.scales, self.cam.flip, self.cam.method, size, self.cam.target_layer
        found = class_maps(self.model, image, labels, *how).cpu()
        mask = masked(found, self.masks, picture, target)
        for i in labels.nonzero().flatten().tolist() if self.maps else ():
            grey = Image.fromarray((255 * found[i]).round().byte().numpy())
            _write(_below(self.folder / "cams", f"{key}/{self.classes[i]}.png"), grey, "png")
        if self.overlays:
            drawn = [draw_class_maps(picture, found, self.classes), draw_mask(picture, mask, "mask")]
            _write(_below(self.folder / "overlays", f"{key}.jpg"), beside(drawn), "jpeg")
        _write(self.mask_file(key), mask_picture(mask), "png")
        return mask

    def mask_file(self, key: str) -> Path:
        return mask_file(self.folder, key)


def masked(maps: Tensor, masks: Masks, picture: Tensor, target: Mapping[str, Any]) -> Tensor:
    """The pseudo mask (H, W) of class maps (C, H, W), by the rule that ``masks`` names.

    Args:
        picture: uint8 (3, H, W).
        target: with the picture's key and, for the rule saliency, its map.

    Raises RunError where that is missing.
    """
    saliency = None
    if masks.rule == "saliency":
        if not target.get("has_saliency", False):
            raise RunError(
                f"picture {target['key']} has no saliency map, and masks.rule is saliency: add it to data.saliency, or "
                "choose threshold or crf"
            )
        saliency = F.resize(target["saliency"], list(maps.shape[1:]), F.InterpolationMode.NEAREST)
    return pseudo_mask(maps, masks.rule, masks.threshold, saliency, picture)


def keys_of(data: Any) -> list[str]:
    """Of a set's pictures, in order; those of a set that does not list them are read with every one of them."""
    listed = getattr(data, "keys", None)
    return list(listed) if listed is not None else [data[0, i][1]["key"] for i in range(len(data))]


def masks_against_truth(folder: Path, data: Any, classes: Sequence[str]) -> np.ndarray | None:
    """Pixels of the folder's masks against those of the set's true ones: int64 (C + 1, C + 1), rows the truth; None
    where the set has no masks. Several processes share the pictures, and all get the sum."""
    counted = gather_object([_against_truth(folder, data, classes)])  # each says something, for which the others wait
    return None if any(part is None for part in counted) else np.sum(counted, 0)


def _against_truth(folder: Path, data: Any, classes: Sequence[str]) -> np.ndarray | None:
    """What this process counts of it."""
    total, state, keys = np.zeros((len(classes) + 1,) * 2, np.int64), processes(), keys_of(data)
    for index in range(state.process_index, len(keys), state.num_processes):
        truth = data[0, index][1].get("mask")
        if truth is None:
            return None
        with Image.open(mask_file(folder, keys[index])) as picture:
            found = torch.from_numpy(np.array(picture)).long()
        total += confusion_matrix(found, truth, len(classes) + 1).numpy()
    return total


class _Part(Dataset[Any]):
    """Some samples of a set."""

    def __init__(self, data: Any, indices: Sequence[int]):
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        return self.data[place[0], self.indices[place[1]]]


def _check_manifest(folder: Path, wanted: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if path.exists():
        there = checkpoint.read_json(path)
        if different := [key for key, value in wanted.items() if there.get(key) != value]:
            key = different[0]
            raise RunError(
                f"{folder} holds maps that were made with another {key} ({there.get(key)}, now {wanted[key]}): name "
                "another folder, or delete this one"
            )
    elif processes().is_main_process:
        checkpoint.write_json(path, wanted)
    processes().wait_for_everyone()


def _original(data: Any, index: int, image: Tensor, target: dict[str, Any]) -> Tensor:
    """The picture as its file has it, uint8 (3, H, W)."""
    if "picture" in target:
        return torch.from_numpy(target["picture"]).permute(2, 0, 1)
    if isinstance(data, MaskFiles):
        return torch.from_numpy(np.array(read_picture(data.records[index].image))).permute(2, 0, 1)
    return (255 * image.clamp(0, 1)).round().byte().cpu()  # of a set of one's own: as it gives it


@torch.inference_mode()
def _likely(model: nn.Module, image: Tensor) -> Tensor:
    """(C,) 1 for the classes that a model finds in a picture."""
    shares = model(normalised(model, image[None]))[0].float().sigmoid().cpu()
    return ((shares > SHOWN) | (shares == shares.max())).float()


def mask_file(folder: Path, key: str) -> Path:
    """Where the pseudo mask of a picture is written."""
    return _below(folder / "masks", f"{key}.png")


def _below(folder: Path, name: str) -> Path:
    """A file in a folder. Raises RunError for a name that leads out of it."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{name}: leads out of {folder}, where its file would be written; rename the picture or class")
    return path


def _write(path: Path, picture: Image.Image, form: str) -> None:
    checkpoint.atomically(path, lambda part: picture.save(part, format=form))
