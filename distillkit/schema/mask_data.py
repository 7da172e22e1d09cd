"""`data` of segmentation: sets of pictures with masks, and how both change."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from distillkit.located import said
from distillkit.schema.base import Count, DataBlock, Positive, Share, Size, Strict, ordered


def _thick(value: float) -> float:
    if not (0 < value < 1 or (value >= 1 and isinstance(value, int))):
        raise ValueError(f"expected whole pixels, or a share of the shorter side between 0 and 1; got {said(value)}")
    return value


#: of a band along boundaries
Thickness = Annotated[int | float, AfterValidator(_thick)]


class MaskAugment(Strict):
    """Random changes of training pictures and their masks, each drawn from (seed, epoch, index) alone."""

    scale: Annotated[list[Positive], Field(min_length=2, max_length=2), AfterValidator(ordered)] | None = [0.5, 2.0]
    """[low, high]: pictures are enlarged by a factor drawn between the two before the crop; null: not at all."""
    crop: bool = True
    """A random window of `size` is shown, filled up where the picture is smaller. False: all of the picture, at `size`;
    then scale must be null."""
    flip: Share = 0.5
    """Probability of a left-right flip."""
    color: Share = 0.0
    """Strength c of brightness, contrast and saturation: each is multiplied by a factor in [1 - c, 1 + c]."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest turn on the colour circle, as a part of it."""
    rotate90: Annotated[int, Field(ge=0, le=3)] = 0
    """Most quarter turns."""

    @model_validator(mode="after")
    def _whole_pictures_have_one_size(self) -> Self:
        if not self.crop and self.scale is not None:
            raise ValueError("crop: false shows all of the picture at size, so that scale must be null")
        return self


class FakeMix(Strict):
    """False boundaries: bands along the outlines of objects, pasted onto pictures of the batch (Cao et al.)."""

    thickness: Thickness = 0.015625
    """Of a band, in pixels; below 1 a share of the shorter side: 8 at 512, as published, are 0.015625."""
    max_shift: Share = 0.5
    """A band is moved by at most this share of the picture's width and height."""
    count: Count = 3
    """Bands pasted onto a picture."""
    p: Share = 0.5
    """Probability that a picture is pasted onto."""
    variant: Literal["boundary", "zeros", "mean", "other"] = "boundary"
    """What is pasted: the band's own content; or, for ablations, black, a mean colour, or what lies elsewhere."""
    per_paste_shift: bool = False
    """A band is moved anew for every paste, not once a batch."""


class _Masks(DataBlock):
    size: Size = [512, 512]
    """Network input in pixels: [height, width], or one number for both."""
    batch: Count = 8
    """Pictures a process and step. What is left over at the end of an epoch, less than a batch, is not trained on in
    it: a batch of one picture has no statistics; the next epoch leaves out other pictures."""
    resize: bool = True
    """Pictures are brought to `size` before all else. False: they keep their own size: in training windows of `size`
    are cut from them, and they are evaluated whole, one by one."""
    keep_ratio: bool = False
    """False: the picture is stretched to the size. True: it keeps its aspect, and the size bounds both of its sides."""
    augment: MaskAugment = MaskAugment()
    boundary: Thickness | None = None
    """Thickness of the boundary maps that a boundary stream learns, in pixels or below 1 as a share of the shorter
    side; null: 8 at 512, as a share, where fanet is trained."""
    boundary_between: Literal["foreground", "classes"] = "foreground"
    """Which boundaries these maps and FakeMix know: of all that is not class 0, the background; or between any two
    classes, for sets without a background."""
    fakemix: FakeMix | None = None

    @model_validator(mode="after")
    def _own_sizes_are_cropped(self) -> Self:
        if not self.resize and (self.keep_ratio or not self.augment.crop):
            wrong = "keep_ratio: true is for pictures that are resized" if self.keep_ratio else "augment.crop is false"
            raise ValueError(f"resize: false leaves pictures as large as they are, and {wrong}; change one of the two")
        return self


class VocMaskData(_Masks):
    """Masks in Pascal VOC's layout: JPEGImages, SegmentationClass, ImageSets/Segmentation."""

    kind: Literal["voc-masks"]
    root: str
    train: str = "train"
    """Name of a list in ImageSets/Segmentation."""
    val: str = "val"
    test: str | None = None
    classes: list[str] | None = None
    """Class names by label, the background first; null: those in root's image_labels.json where it is there, else those
    of Pascal VOC."""
    masks: str = "SegmentationClass"
    """Folder of the masks, relative to root."""
    train_masks: str | None = None
    """Folder of the masks that are learned from where these are others, such as pseudo masks; null: `masks`."""
    images: str = "JPEGImages"
    """Folder of the pictures, relative to root."""


class CocoSemanticData(_Masks):
    """Masks whose pixels are COCO's category ids, things and stuff."""

    kind: Literal["coco-semantic"]
    root: str
    train: str = "train"
    """Name of the split, which takes the place of `{split}` in the paths below."""
    val: str = "val"
    test: str | None = None
    categories: str | None = None
    """JSON file with the categories that are classes, relative to root; null: COCO's 133."""
    others: Literal["ignore", "background"] | None = None
    """What pixels of other ids are: not labelled, or a class of their own; null: a mistake."""
    images: str = "images"
    """Folder of the pictures, relative to root."""
    masks: str = "semantic"
    """Folder of the masks, relative to root."""
    names: str | None = "annotations/semantic_{split}.txt"
    """List with one name a line, relative to root; null: every mask in the folder."""


class TransData(_Masks):
    """Trans10K: transparent things and stuff."""

    kind: Literal["trans10k"]
    root: str
    train: str = "train"
    """Folder of the split, relative to root."""
    val: str = "validation"
    test: str | None = "test"


class MaskSceneData(_Masks):
    """Scenes of real handwritten digits on crops of photographs, with masks. Needs no files."""

    kind: Literal["mask-scenes"]
    train: Count = 512
    """Number of scenes."""
    val: Count = 128
    test: Count = 128
    size: Size = [96, 96]
    digits: Annotated[list[Count], Field(min_length=2, max_length=2), AfterValidator(ordered)] = [1, 6]
    """[fewest, most] digits a scene."""


class CustomMaskData(_Masks):
    """A data set that a package registered with `distillkit.register_data`."""

    kind: Literal["custom"]
    name: str
    options: dict[str, Any] = {}


MaskData = Annotated[
    VocMaskData | CocoSemanticData | TransData | MaskSceneData | CustomMaskData, Field(discriminator="kind")
]
