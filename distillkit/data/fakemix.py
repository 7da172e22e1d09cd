"""FakeMix: false boundaries for models that lean on boundaries. Cao et al., arXiv:2103.13279.

The thin band along the outline of an object is cut out, moved at random and pasted onto a picture of the same batch,
whose labels stay as they are: what looks like a boundary and lies on background becomes a hard negative.

    picture_r = picture_r * (1 - moved band_j) + moved (band_j * picture_j)

Bands and contents come from the pictures as they were before mixing. Everything is whole pixels copied by slices, so
that uint8 pictures come out exact and float ones are the same pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor, nn
from torch.utils.data import Dataset

from distillkit.data.boundary import Between, boundary_band, in_pixels, overlap
from distillkit.data.transforms import generator_for
from distillkit.losses.segmentation import IGNORE

Variant = Literal["boundary", "zeros", "mean", "other"]
Shift = tuple[int, int]
Targets = TypeVar("Targets", Tensor, Mapping[str, Any])


@dataclass(frozen=True)
class Paste:
    """One band to be pasted.

    Args:
        into, source: which pictures of the batch.
        shift: (dx, dy), pixels that the band is moved right and down.
        content: (dx, dy) of the content under it, where that is another: variant "other".
    """

    into: int
    source: int
    shift: Shift
    content: Shift


class FakeMix(nn.Module):
    """``images, targets = FakeMix()(images, targets)`` on a batch, after its geometry and before it is normalised.

    It works in a collate function, ``fakemix(*default_collate(items))``, and on batches on a GPU. What is jittered in
    colour stays so: a pasted band has its donor's colours. A shift may carry a band out of the frame; then nothing is
    pasted, as published.

    Args:
        thickness: of the band, in pixels, or below 1 a share of the shorter side (published: 8 at 512, 0.0157).
        max_shift: dx and dy are uniform whole pixels of at most this share of the width and height.
        count: bands pasted onto a picture (published: 3 for Trans10K, 1 elsewhere); sources are drawn with
            replacement and may be the picture itself.
        p: probability that a picture is pasted onto at all.
        variant: what is pasted: "boundary", the band's own content; or, for ablations, "zeros", black; "mean",
            the colour ``mean``; "other": what of the same picture lies somewhere else, moved by a second shift.
        per_paste_shift: False, as published: a batch moves each of its bands once, wherever it is pasted. True: anew
            for every paste.
        between: which boundaries: "foreground", as published, or "classes", see ``boundary_band``.
        mean: colour in 0..1, RGB; pasted as whole 255ths.
        ignore: the label of pixels that are not labelled.

    Raises ValueError for options outside these.
    """

    def __init__(
        self,
        thickness: int | float = 8,
        max_shift: float = 0.5,
        count: int = 3,
        p: float = 0.5,
        variant: Variant = "boundary",
        per_paste_shift: bool = False,
        between: Between = "foreground",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        ignore: int = IGNORE,
    ):
        super().__init__()
        if not 0 <= max_shift <= 1 or not 0 <= p <= 1 or count < 1:
            raise ValueError(
                f"expected max_shift and p in 0..1 and count >= 1, got max_shift={max_shift}, p={p}, count={count}"
            )
        _check_variant(variant)
        in_pixels(thickness, (1, 1))
        self.thickness, self.max_shift, self.count, self.p = thickness, max_shift, count, p
        self.variant, self.per_paste_shift = variant, per_paste_shift
        self.between, self.mean, self.ignore = between, tuple(mean), ignore
        self._said_alone = False

    def forward(
        self, images: Tensor, targets: Targets, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Targets]:
        """Mixed pictures, new, and the targets as they were given.

        Args:
            images: uint8 (B, 3, H, W), or float in 0..1, not normalised.
            targets: masks, integers (B, H, W); or a dict with "masks" and, where they are known, the bands "boundary"
                (B, H, W) in {0, 1}.
            generator: on the CPU; None: torch's global one. A batch draws equally much whatever comes out.

        Raises ValueError where shapes do not belong together.
        """
        pastes = self.draw(len(images), (images.shape[-2], images.shape[-1]), generator)
        if len(images) == 1 and not self._said_alone:
            self._said_alone = True
            warnings.warn("FakeMix on a batch of one picture can paste only its own bands onto it", stacklevel=2)
        return paste(images, self.bands(targets), pastes, self.variant, self.mean), targets

    def bands(self, targets: Tensor | Mapping[str, Any]) -> Tensor:
        """The bands that the targets hold, else those of their masks: (B, H, W) in {0, 1}."""
        if isinstance(targets, Tensor):
            return boundary_band(targets, self.thickness, self.ignore, self.between)
        if "boundary" in targets:
            return targets["boundary"]
        if "masks" not in targets:
            raise ValueError(f"the targets must have 'masks' or 'boundary', got {sorted(targets)}")
        return self.bands(targets["masks"])

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator | None = None) -> list[Paste]:
        """What is pasted onto a batch of pictures of ``size`` (height, width), in order."""
        coins = torch.rand(batch, generator=generator) < self.p
        sources = torch.randint(batch, (batch, self.count), generator=generator)
        shifts = self._shifts((batch, self.count) if self.per_paste_shift else (batch,), size, generator)
        if not self.per_paste_shift:
            shifts = shifts[sources]
        return [
            Paste(into, source, (dx, dy), (other_dx, other_dy) if self.variant == "other" else (dx, dy))
            for into, (coin, row, moves) in enumerate(zip(coins.tolist(), sources.tolist(), shifts.tolist()))
            if coin
            for source, (dx, dy, other_dx, other_dy) in zip(row, moves)
        ]

    def pasted(self, size: Sequence[int], generator: torch.Generator | None = None) -> list[Paste]:
        """One band each of pictures 1, 2, ..., ``count``, onto picture 0."""
        shifts = self._shifts((self.count,), (size[0], size[1]), generator).tolist()
        return [
            Paste(0, source, (dx, dy), (other_dx, other_dy) if self.variant == "other" else (dx, dy))
            for source, (dx, dy, other_dx, other_dy) in enumerate(shifts, 1)
        ]

    def _shifts(self, shape: tuple[int, ...], size: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        """(*shape, 4): dx, dy of bands, and dx, dy of contents that are moved by themselves."""
        height, width = size
        most = [int(self.max_shift * side) for side in (width, height, width, height)]
        drawn = [torch.randint(-m, m + 1, shape, generator=generator) for m in most]
        return torch.stack(drawn, -1)

    def extra_repr(self) -> str:
        return (
            f"thickness={self.thickness}, max_shift={self.max_shift}, count={self.count}, p={self.p}, "
            f"variant={self.variant!r}, per_paste_shift={self.per_paste_shift}, between={self.between!r}"
        )


class FakeMixed(Dataset[tuple[Tensor, dict[str, Any]]]):
    """A set whose pictures get bands of others of the set, so that the batch may be of any size, also of one.

    Every band is moved by a shift of its own. A picture is changed by (seed, epoch, index) alone.

    Args:
        dataset: of ``data.segmentation``: ``dataset[(epoch, index)]`` gives (image (3, H, W), target with "mask"), all
            of one size, as ``MaskAugment`` makes them, and not normalised.
        fakemix: how. A picture that is pasted onto reads ``fakemix.count`` others, each as likely, itself too.
        seed: of what is drawn here.
    """

    def __init__(self, dataset: Any, fakemix: FakeMix, seed: int = 0):
        self.dataset, self.fakemix, self.seed = dataset, fakemix, seed
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        epoch, index = place
        image, target = self.dataset[place]
        generator = generator_for(-1 - self.seed, epoch, index)  # not what the set's own transform draws from
        if torch.rand((), generator=generator) >= self.fakemix.p:
            return image, target
        others = torch.randint(len(self.dataset), (self.fakemix.count,), generator=generator).tolist()
        items = [(image, target), *(self.dataset[epoch, other] for other in others)]
        for other, (picture, _) in zip(others, items[1:]):
            if picture.shape != image.shape:
                raise ValueError(
                    f"pictures {index} and {other} are {tuple(image.shape)} and {tuple(picture.shape)}: FakeMix needs "
                    "one size; give the set a transform that crops or resizes (MaskAugment)"
                )
        pastes = self.fakemix.pasted(image.shape[-2:], generator)
        bands = self.fakemix.bands({"masks": torch.stack([of["mask"] for _, of in items])})
        pictures = torch.stack([picture for picture, _ in items])
        return paste(pictures, bands, pastes, self.fakemix.variant, self.fakemix.mean)[0], target


def paste(
    images: Tensor,
    bands: Tensor,
    pastes: Sequence[Paste],
    variant: Variant = "boundary",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
) -> Tensor:
    """A new batch with ``pastes`` made in their order, each from ``images`` as they are.

    Args:
        images: uint8 (B, 3, H, W), or float in 0..1.
        bands: (B, H, W) in {0, 1}.
        variant, mean: as in ``FakeMix``.

    Raises ValueError where shapes do not belong together.
    """
    _check_variant(variant)
    if images.dim() != 4 or bands.shape != (images.shape[0], *images.shape[2:]):
        raise ValueError(
            f"expected images (B, 3, H, W) and masks or bands (B, H, W) of the same pixels, got {tuple(images.shape)} "
            f"and {tuple(bands.shape)}"
        )
    mixed, bands = images.clone(), bands.to(images.dtype)
    colour = _colour(images, variant, mean)
    for one in pastes:
        (dx, dy), (height, width) = one.shift, images.shape[-2:]
        (to_y, from_y), (to_x, from_x) = overlap(dy, height), overlap(dx, width)
        band = bands[one.source, from_y, from_x]
        if variant == "boundary":
            content = images[one.source, :, from_y, from_x]
        elif variant == "other":
            content = moved(images[one.source], one.content)[:, to_y, to_x]
        else:
            content = colour
        # products with 0 and 1 are exact, in uint8 too, and 8 times as fast as torch.where there
        mixed[one.into, :, to_y, to_x] = mixed[one.into, :, to_y, to_x] * (1 - band) + content * band
    return mixed


def moved(x: Tensor, shift: Shift) -> Tensor:
    """``x`` (..., H, W) moved right and down by ``shift`` (dx, dy) pixels, zeros where nothing comes to lie."""
    (to_y, from_y), (to_x, from_x) = overlap(shift[1], x.shape[-2]), overlap(shift[0], x.shape[-1])
    out = torch.zeros_like(x)
    out[..., to_y, to_x] = x[..., from_y, from_x]
    return out


def _colour(images: Tensor, variant: Variant, mean: Sequence[float]) -> Tensor:
    """(3, 1, 1) what the variants of one colour paste, in the pictures' values."""
    levels = [int(255 * m) if variant == "mean" else 0 for m in mean]
    scale = 255 if images.is_floating_point() else 1
    return torch.tensor([level / scale for level in levels], dtype=images.dtype, device=images.device)[:, None, None]


def _check_variant(variant: str) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"variant: expected one of {', '.join(get_args(Variant))}, got {variant!r}")
