"""Handwritten digits on photographs with their masks, composed on the fly: sets for segmentation and for image-level
labels that need no download. See ``data.scenes``."""

from __future__ import annotations

import numpy as np

from distillkit.data.mask_transforms import MaskTransform
from distillkit.data.scenes import Scene, Scenes
from distillkit.data.segmentation import BACKGROUND, MaskPictures, Pixels


class MaskScenes(MaskPictures):
    """Segmentation items, as ``data.segmentation`` says: classes background, 0, ..., 9. keys: SPLIT/number.

    Args:
        n, size, seed, split, digits: as in ``Scenes``; of "train" every epoch shows other scenes.
        transform: ``MaskAugment`` or ``MaskResize``; None: the scene as it is.

    Masks are exact: a pixel belongs to a digit that makes half or more of it, and every pixel is labelled.
    """

    def __init__(
        self,
        n: int,
        size: int | tuple[int, int] = 128,
        seed: int = 0,
        split: str = "train",
        digits: tuple[int, int] = (1, 6),
        transform: MaskTransform | None = None,
    ):
        self.scenes = Scenes(n, size, seed, split, digits)
        super().__init__([BACKGROUND, *self.scenes.classes], _keys(n, split), transform, seed)

    def load(self, index: int, epoch: int = 0) -> Pixels:
        scene = self.scenes.scene(index, epoch)
        return Pixels(scene.image, _mask(scene))


class LabelScenes(MaskPictures):
    """Items with image-level labels, as ``data.weak`` says: classes 0, ..., 9. keys: SPLIT/number.

    Args:
        n, size, seed, split, digits, transform: as in ``MaskScenes``.
        saliency: targets have saliency maps: 1 on every digit.
        masks: targets have masks, for evaluation.
    """

    def __init__(
        self,
        n: int,
        size: int | tuple[int, int] = 128,
        seed: int = 0,
        split: str = "train",
        digits: tuple[int, int] = (1, 3),
        saliency: bool = False,
        masks: bool = False,
        transform: MaskTransform | None = None,
    ):
        self.scenes = Scenes(n, size, seed, split, digits)
        self.shows_masks = masks
        super().__init__(self.scenes.classes, _keys(n, split), transform, seed, with_saliency=saliency)

    def load(self, index: int, epoch: int = 0) -> Pixels:
        scene = self.scenes.scene(index, epoch)
        mask = _mask(scene)
        saliency = (mask > 0).astype(np.uint8) if self.with_saliency else None
        return Pixels(scene.image, mask if self.shows_masks else None, saliency, scene.image_labels)


def _keys(n: int, split: str) -> list[str]:
    return [f"{split}/{i:05d}" for i in range(n)]


def _mask(scene: Scene) -> np.ndarray:
    """uint8 (H, W): 0 = background, digit + 1."""
    each = scene.masks * (scene.labels + 1)[:, None, None]
    return each.sum(0).astype(np.uint8)
