"""`data`: the sets that a recipe may train on, and how their pictures change."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from distillkit.schema.base import Count, DataBlock, NotNegative, Positive, Share, Size, Strict, ordered


class Crop(Strict):
    """A random window of the picture."""

    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Smallest side of the random crop, as a share of the picture's side."""


class Augment(Strict):
    """Random changes of training pictures, each drawn from (seed, epoch, index) alone."""

    flip: Share = 0.5
    """Probability of a left-right flip."""
    flip_vertical: Share = 0.0
    """Probability of an upside-down flip; of the three flips at most one is done."""
    flip_diagonal: Share = 0.0
    """Probability of both at once, half a turn."""
    crop: Crop | None = None
    multi_scale: Annotated[list[Positive], Field(min_length=2, max_length=2), AfterValidator(ordered)] | None = None
    """[low, high]: the picture is scaled by a factor drawn between the two."""
    mosaic: Share = 0.0
    """Probability of putting four pictures together."""
    color: Share = 0.0
    """Strength c of brightness, contrast and saturation: each is multiplied by a factor in [1 - c, 1 + c]."""


class _Boxed(DataBlock):
    keep_ratio: bool = False
    """False: the picture is stretched to the size. True: it keeps its aspect, and the size bounds both of its sides."""
    pad: bool = False
    """With keep_ratio: fill up with black, right and below, to exactly the size."""
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _one_flip(self) -> Self:
        a = self.augment
        if a.flip + a.flip_vertical + a.flip_diagonal > 1:
            raise ValueError("augment: flip, flip_vertical and flip_diagonal exclude each other: their sum is above 1")
        return self

    @model_validator(mode="after")
    def _pads_what_keeps_its_ratio(self) -> Self:
        if self.pad and not self.keep_ratio:
            raise ValueError("pad: true needs keep_ratio: true; a stretched picture leaves nothing to fill")
        return self


class CocoData(_Boxed):
    """A detection set in COCO's JSON format."""

    kind: Literal["coco"]
    root: str
    train: str = "annotations/train.json"
    """Annotation file, relative to root."""
    val: str = "annotations/val.json"
    test: str | None = None
    images: str = "images"
    """Folder of the pictures, relative to root; `{split}` in it stands for train, val or test."""


class VocData(_Boxed):
    """A detection set in Pascal VOC's layout: JPEGImages, Annotations, ImageSets/Main."""

    kind: Literal["voc"]
    root: str
    train: str = "train"
    """Name of a list in ImageSets/Main."""
    val: str = "val"
    test: str | None = None
    classes: list[str] | None = None
    """Class names in label order; null: the 20 of Pascal VOC."""


class SceneData(_Boxed):
    """Scenes of real handwritten digits on crops of photographs, composed on the fly. Needs no files."""

    kind: Literal["scenes"]
    train: Count = 512
    """Number of scenes."""
    val: Count = 128
    test: Count = 128
    digits: Annotated[list[Count], Field(min_length=2, max_length=2), AfterValidator(ordered)] = [1, 6]
    """[fewest, most] digits a scene."""


class CustomData(_Boxed):
    """A data set that a package registered with `distillkit.register_data`."""

    kind: Literal["custom"]
    name: str
    options: dict[str, Any] = {}


Data = Annotated[CocoData | VocData | SceneData | CustomData, Field(discriminator="kind")]


class RandAugment(Strict):
    """Changes of colour and geometry, of pictures and label maps alike (Cubuk et al., arXiv:1909.13719, as in timm)."""

    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    deviation: NotNegative = 0.5
    """Of the magnitude, which is drawn anew for every change."""
    layers: Count = 2
    """Changes drawn for a picture; each is made with probability 1/2."""


def _timm_notation(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    from distillkit.data.randaugment import RandAugment as Changes

    found = Changes.from_config(value)
    if found.probability != 0.5:
        raise ValueError(f"{value!r}: a change is made with probability 0.5; leave out p{found.probability:g}")
    return {"magnitude": found.magnitude, "deviation": found.std, "layers": found.layers}


class ClassAugment(Strict):
    """Random changes of training pictures; all but mixup and cutmix are drawn from (seed, epoch, index) alone."""

    scale: Annotated[list[Share], Field(min_length=2, max_length=2), AfterValidator(ordered)] | None = [0.08, 1.0]
    """[smallest, largest] part of the picture's area that a random crop shows; null: no crop."""
    ratio: Annotated[list[Positive], Field(min_length=2, max_length=2), AfterValidator(ordered)] = [0.75, 1.3333]
    """[narrowest, widest] width over height of the crop."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Of the crop; random: one of the two."""
    crop_last: bool = False
    """Flips and RandAugment are done on the whole picture, and the crop after them: as TokenLabeling was published, and
    slower."""
    flip: Share = 0.5
    """Probability of a left-right flip."""
    flip_vertical: Share = 0.0
    """Probability of an upside-down flip."""
    color: Share = 0.0
    """Strength of brightness, contrast and saturation; left out where there is rand_augment."""
    rand_augment: Annotated[RandAugment | None, BeforeValidator(_timm_notation)] = None
    """A mapping, or timm's notation, as in rand-m9-mstd0.5-inc1."""
    erase: Share = 0.0
    """Probability that a rectangle of the picture is replaced by noise (random erasing, pixel mode)."""
    mixup: NotNegative = 0.0
    """Alpha of mixup; 0: none. Where both are given, a batch gets one of the two."""
    cutmix: NotNegative = 0.0
    """Alpha of CutMix; 0: none."""


class _Classes(DataBlock):
    size: Size = [224, 224]
    """Network input in pixels: [height, width], or one number for both."""
    batch: Count = 64
    """Pictures a process and step. What is left over at the end of an epoch, less than a batch, is not trained on in
    it: a batch of one picture has no statistics; the next epoch leaves out other pictures. (A set of fewer pictures
    than that is a batch.)"""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.9
    """For evaluation the picture is resized so that the size is this share of its shorter side, and its middle cut out;
    1.0 with square pictures: all of it."""
    augment: ClassAugment = ClassAugment()


class _Labelled(_Classes):
    label_maps: str | None = None
    """Folder of dense label maps of the training pictures, made by `distillkit label`, or of published ones of ImageNet
    (CLASS/PICTURE.pt); for distillers of kind token-labeling with source: maps."""
    annotator: str | None = None
    """Name of the model that the label maps must come from, or the sha256 of its weights that their manifest gives;
    null: any."""


class FolderData(_Labelled):
    """Pictures in a folder for each class, below a folder for each split."""

    kind: Literal["image-folder"]
    root: str
    train: str = "train"
    """Folder of the split, relative to root."""
    val: str = "val"
    test: str | None = None


class CifarData(_Classes):
    """CIFAR-10 or CIFAR-100 in its binary form, as downloaded; the last 5000 training pictures are val."""

    kind: Literal["cifar"]
    root: str
    """Folder of the .bin files."""
    classes: Literal[10, 100] = 10
    size: Size = [32, 32]
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0


class TarData(_Labelled):
    """Tar files of pictures and labels in webdataset's layout: KEY.jpg (or .png, .webp) and KEY.cls."""

    kind: Literal["webdataset"]
    root: str
    train: str = "train-*.tar"
    """Files of the split, relative to root; `*` stands for anything."""
    val: str = "val-*.tar"
    test: str | None = None
    classes: list[str]
    """Class names in label order."""


class DigitData(_Classes):
    """One large real handwritten digit on a crop of a photograph, composed on the fly. Needs no files."""

    kind: Literal["single-digit"]
    train: Count = 1024
    """Number of pictures (in an epoch)."""
    val: Count = 256
    test: Count = 256
    size: Size = [64, 64]
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0


class CustomClassData(_Classes):
    """A data set that a package registered with `distillkit.register_data`."""

    kind: Literal["custom"]
    name: str
    options: dict[str, Any] = {}


ClassData = Annotated[FolderData | CifarData | TarData | DigitData | CustomClassData, Field(discriminator="kind")]


class Tiles(Strict):
    """Pictures are cut into tiles, and what is found on the tiles of a picture is put together."""

    size: Count = 1024
    """Side of a tile in pixels."""
    overlap: Annotated[int, Field(ge=0)] = 200
    """Pixels that neighbouring tiles share."""
    scales: Annotated[list[Positive], Field(min_length=1)] = [1.0]
    """Pictures are cut at each of these sizes; 0.5: at half their size."""
    folder: str | None = None
    """Where tiles are written; null: output/tiles/, in a folder named after root, classes and the numbers above."""

    @model_validator(mode="after")
    def _goes_on(self) -> Self:
        if self.overlap >= self.size:
            raise ValueError(f"overlap: expected less than size ({self.size}), got {self.overlap}")
        return self


class _Rotated(_Boxed):
    keep_ratio: bool = True
    """True: the picture keeps its aspect, and the size bounds both of its sides. False: it is stretched, and boxes that
    were rectangles are none any more."""
    teach_difficult: bool = False
    """Difficult objects are learned like the others, as in the published training on DOTA."""
    skip_empty: bool = False
    """Training leaves out pictures without objects, as in the published training on DOTA."""


class DotaData(_Rotated):
    """A rotated detection set in DOTA's layout: SPLIT/images and SPLIT/labelTxt."""

    kind: Literal["dota"]
    root: str
    train: str = "train"
    """Folder of the split, relative to root."""
    val: str = "val"
    test: str | None = None
    classes: Literal["v1.0", "v1.5", "v2.0"] | list[str] = "v1.0"
    """DOTA's own, or the set's class names in label order."""
    tiles: Tiles | None = None
    """Null: pictures are used as they are."""

    @model_validator(mode="after")
    def _tiles_are_square(self) -> Self:
        if self.tiles is not None and self.size[0] != self.size[1]:
            raise ValueError(f"size: tiles are square, and so is the network's input; got {self.size}")
        return self


class HrscData(_Rotated):
    """HRSC2016: ships, in its XML files."""

    kind: Literal["hrsc"]
    root: str
    train: str = "train"
    """Name of a list in ImageSets."""
    val: str = "val"
    test: str | None = None


class CocoRotatedData(_Rotated, CocoData):
    """A COCO set whose polygons become the smallest rotated boxes around them."""

    kind: Literal["coco"]


class RotatedSceneData(SceneData):
    """Scenes of real handwritten digits on crops of photographs, with rotated boxes. Needs no files."""

    turn: Annotated[float, Field(ge=0, lt=90)] = 30
    """Digits are turned by up to this many degrees either way."""


RotatedData = Annotated[
    DotaData | HrscData | CocoRotatedData | RotatedSceneData | CustomData, Field(discriminator="kind")
]
