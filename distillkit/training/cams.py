"""`distillkit cam`, and the pseudo masks of a run: activation maps of many pictures, written to a folder.

A picture's files are written whole, its mask last: a call that was stopped goes on with the pictures that have no mask
yet. What the folder's files were made with is in its cams.json, and a call that would make them otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from distillkit.data.label_store import weights_sha256
from distillkit.data.segmentation import MaskFiles
from distillkit.evaluation.cam import class_maps
from distillkit.evaluation.cam_drawing import draw_class_maps, mask_picture
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.predict import evaluating, in_order
from distillkit.evaluation.pseudo_masks import pseudo_mask
from distillkit.evaluation.segmentation import confusion_matrix
from distillkit.schema import Cam, Masks, WeakRecipe
from distillkit.training import build, checkpoint
from distillkit.training.build import Classes
from distillkit.training.errors import RunError
from distillkit.training.folder import alone_in
from distillkit.training.named import named_model
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
    recipe: WeakRecipe,
    name: str | None,
    folder: Path,
    split: Literal["train", "val", "test"] = "train",
    images: Sequence[Path] = (),
    maps: bool = False,
    overlays: bool = False,
    progress: Progress | None = None,
) -> int:
    """`distillkit cam`: files of a split of a recipe, made with its labels, or of other ``images``; see ``write_cams``.

    Args:
        name: what ``named_model`` takes.

    Returns:
        how many pictures this process has made files of.
    """
    size = recipe.cam.size
    if recipe.masks.threshold is None:
        raise RunError(
            "masks.threshold is null, which a run chooses on its val split: give it, as in masks.threshold=0.2"
        )
    if images:
        named = [path for path, _ in named_pictures(images, folder / "masks")]
        check_headers(named)
        classes = build.build_classes(recipe).classes
        data: Any = LoosePictures(named, None if size is None else (size[0], size[1]))
    else:
        data = build.build_data(recipe, split, augmented=False)
        classes = data.classes
    model = named_model(recipe, name, len(classes))
    how = recipe.cam, recipe.masks, maps, overlays, recipe.data.workers, progress
    with alone_in(folder) if processes().is_main_process else nullcontext():
        return write_cams(model, data, classes, folder, *how)


def predict_cams(recipe: WeakRecipe, model: nn.Module, data: Classes, asked: Asked) -> list[dict[str, Any]]:
    """`distillkit predict`: pseudo masks and overlays of pictures, by the classes that the model finds in them.

    Returns what predictions.json holds: file, and mask, its path.
    """
    named = named_pictures(asked.images, asked.folder / "masks")
    check_headers(path for path, _ in named)
    size = recipe.cam.size
    pictures = LoosePictures([path for path, _ in named], None if size is None else (size[0], size[1]))
    seen = (lambda done, total: asked.progress("pictures", done, total)) if asked.progress else None
    write_cams(model, pictures, data.classes, asked.folder, recipe.cam, recipe.masks, overlays=True, progress=seen)
    rows = [{"file": str(path), "mask": str(target)} for path, target in named]
    checkpoint.write_json(asked.folder / "predictions.json", rows)
    return rows


def write_cams(
    model: nn.Module,
    data: Any,
    classes: Sequence[str],
    folder: Path,
    cam: Cam,
    masks: Masks,
    maps: bool = False,
    overlays: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> int:
    """Write masks/KEY.png of every picture: its pseudo mask, 0 = background, i + 1 = classes[i].

    Several processes share the pictures.

    Args:
        model: the classifier; it is moved to this process's device.
        data: a set of ``training.build.label_data`` for evaluation, or ``LoosePictures``. A picture without labels in
            its target has those classes that the model finds likelier than not, or else the likeliest.
        maps: also cams/KEY/CLASS.png, grey, 255 times each class's map.
        overlays: also overlays/KEY.jpg, the maps drawn over the picture.
        progress: called with pictures done, and all of them.

    Returns:
        How many pictures this process has made files of; those of the others were there.

    Raises:
        RunError: the folder was written with another model or other settings; a picture without what the rule reads.
        DataError: a picture that cannot be read.
    """
    state = processes()
    model.to(state.device)
    _check_manifest(folder, _manifest(model, classes, cam, masks, maps, overlays))
    mine = range(state.process_index, len(data.keys), state.num_processes)
    missing = [i for i in mine if not _mask_file(folder, data.keys[i]).exists()]
    there = len(mine) - len(missing)
    with evaluating(model):
        for done, ((image, target),) in enumerate(in_order(_Part(data, missing), 1, workers), there + 1):
            key, (picture, size) = target["key"], _original(data, missing[done - there - 1], image, target)
            image = image.to(state.device)
            labels = target["labels"] if "labels" in target else _likely(model, image)
            how = cam.scales, cam.flip, cam.method, size, cam.target_layer
            found = class_maps(model, image, labels, *how).cpu()
            mask = pseudo_mask(found, masks.rule, masks.threshold, _saliency(masks, target, size), picture)
            for i in labels.nonzero().flatten().tolist() if maps else ():
                grey = Image.fromarray((255 * found[i]).round().byte().numpy())
                _write(_below(folder / "cams", f"{key}/{classes[i]}.png"), grey, "png")
            if overlays:
                _write(_below(folder / "overlays", f"{key}.jpg"), draw_class_maps(picture, found, classes), "jpeg")
            _write(_mask_file(folder, key), mask_picture(mask), "png")
            if progress is not None:
                progress(done, len(mine))
    state.wait_for_everyone()
    return len(missing)


def masks_against_truth(folder: Path, data: Any, classes: Sequence[str]) -> np.ndarray | None:
    """Pixels of the folder's masks against those of the set's true ones: int64 (C + 1, C + 1), rows the truth; None
    where the set has no masks."""
    total = np.zeros((len(classes) + 1,) * 2, np.int64)
    for index, key in enumerate(data.keys):
        truth = data[0, index][1].get("mask")
        if truth is None:
            return None
        with Image.open(_mask_file(folder, key)) as picture:
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


def _manifest(
    model: nn.Module, classes: Sequence[str], cam: Cam, masks: Masks, maps: bool, overlays: bool
) -> dict[str, Any]:
    """What the files depend on."""
    return {
        "format": "distillkit-cams-1",
        "model": type(model).__name__,
        "weights": weights_sha256(model),
        "classes": list(classes),
        "cam": cam.model_dump(),
        "masks": masks.model_dump(),
        "maps": maps,
        "overlays": overlays,
    }


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


def _original(data: Any, index: int, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, tuple[int, int]]:
    """The picture as its file has it, uint8 (3, H, W), and its (height, width)."""
    if "picture" in target:
        pixels = torch.from_numpy(target["picture"]).permute(2, 0, 1)
    elif isinstance(data, MaskFiles):
        pixels = torch.from_numpy(np.array(read_picture(data.records[index].image))).permute(2, 0, 1)
    else:  # of a set of one's own: as it gives it
        pixels = (255 * image.clamp(0, 1)).round().byte().cpu()
    return pixels, (pixels.shape[1], pixels.shape[2])


@torch.inference_mode()
def _likely(model: nn.Module, image: Tensor) -> Tensor:
    """(C,) 1 for the classes that a model finds in a picture."""
    shares = model(normalised(model, image[None]))[0].float().sigmoid().cpu()
    return ((shares > SHOWN) | (shares == shares.max())).float()


def _saliency(masks: Masks, target: dict[str, Any], size: tuple[int, int]) -> Tensor | None:
    if masks.rule != "saliency":
        return None
    if not target.get("has_saliency", False):
        raise RunError(
            f"picture {target['key']} has no saliency map, and masks.rule is saliency: add it to data.saliency, or "
            "choose threshold or crf"
        )
    return F.resize(target["saliency"], list(size), F.InterpolationMode.NEAREST)


def _mask_file(folder: Path, key: str) -> Path:
    return _below(folder / "masks", f"{key}.png")


def _below(folder: Path, name: str) -> Path:
    """A file in a folder. Raises RunError for a name that leads out of it."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{name}: leads out of {folder}, where its file would be written; rename the picture or class")
    return path


def _write(path: Path, picture: Image.Image, form: str) -> None:
    checkpoint.atomically(path, lambda part: picture.save(part, format=form))
