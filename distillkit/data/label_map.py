"""Dense label maps that follow their picture, and what they say of every token of the student.

A label map holds an annotator's k best classes for every cell of an H x W map of a picture (token labelling, Jiang et
al., arXiv:2104.10858). Training moves the picture: crops, flips, RandAugment, resizing. ``LabelMap`` is a torchvision
tv_tensor, so that torchvision v2 moves it along; but its values are never resampled. It carries where it lies instead:
one homography from the picture as it is now to the map, which every geometric transform composes with its own, and
the borders beyond which there is no picture. ``pooled`` then reads the map once, at the places that the
student's tokens see.

**Coordinates** are continuous: pixel (i, j) covers [j, j+1] x [i, i+1], cell (r, c) of the map covers
[c, c+1] x [r, r+1], and (0, 0) is the outer corner of the first one. Torchvision's kernels agree with that for tensors
and for PIL pictures (the tests hold every one of them to pictures whose pixels say where they were).

**What is not known.** Padding, the corners of a turned picture and what the annotator did not see have no label. Their
tokens get equal logits for every class, a uniform label (so do the corners of a turned map in the release), and
``PooledLabels.known`` says how much of every token there was. A mirrored or repeated border
(``padding_mode="reflect"``) counts as not known too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map
from torchvision import tv_tensors
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as F

from distillkit.losses.token_labels import Fill, dense_logits, pool

Size = tuple[int, int]
Region = Literal["full", "center_square"] | tuple[float, float, float, float]

#: float32 counts whole numbers up to here
MOST_CLASSES = 2**24
#: memory for intermediate results of ``pooled``
CHUNK_BYTES = 64 * 2**20
#: what the release calls the geometric operations of RandAugment
RELEASED = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Rotate")


class LabelMap(tv_tensors.Mask):
    """An annotator's k best classes for every cell of a picture, and where the cells lie in the picture as it is now.

    It is a mask to torchvision, which therefore checks that picture and map have the same size and refuses what cannot
    be done to masks (torchvision's own AutoAugment and RandAugment, CutMix, MixUp). Photometric functionals leave it as
    it is; one that nobody here knows is refused.

    ``to``, ``clone``, ``detach``, ``pin_memory``, copies, pickles and workers keep what it carries; other operations
    give plain tensors. A batch is a list of maps: that is what torch's default collation makes of them here.

    Args:
        data: float32 (2, k, H, W): logits, and class indices, whole numbers from 0 to 2^24 - 1.
        canvas: (height, width) of the picture as it is now, in pixels.
        place: float64 (3, 3), a homography from points (x, y, 1) of that picture to fractions (u, v) of the map's width
            and height; outside [0, 1]^2 there is no label. None: the map covers the picture.
        seen: float64 (n, 3), lines in that picture: where ``line @ (x, y, 1) < 0`` for one of them there is fill and no
            picture. None: picture everywhere.

    Raises:
        ValueError: data of another shape or type, or indices that are no whole numbers of that range.
    """

    canvas: Size
    place: Tensor
    seen: Tensor

    def __new__(
        cls, data: Tensor, *, canvas: Size, place: Tensor | None = None, seen: Tensor | None = None
    ) -> LabelMap:
        plain = data.as_subclass(Tensor)
        _check(plain)
        return cls._of(
            plain,
            (int(canvas[0]), int(canvas[1])),
            _box_to_unit((0, 0, canvas[1], canvas[0])) if place is None else place.double(),
            torch.empty(0, 3, dtype=torch.float64) if seen is None else seen.double(),
        )

    @classmethod
    def from_stored(cls, scores: Tensor, indices: Tensor, picture_size: Size, region: Region = "full") -> LabelMap:
        """A map as it is stored, for a picture as it is on disk.

        Args:
            scores: (k, H, W) logits of any float type.
            indices: (k, H, W) classes, whole numbers; of a float type only where it holds them exactly.
            picture_size: (height, width) in pixels.
            region: the part of the picture that the annotator saw. "full"; "center_square", as the published generator,
                which resizes the short side to its input and cuts out the middle; or left, top, right, bottom in
                pixels. (The release reads its maps as if they were of the full picture: "full" repeats that.)
        """
        if scores.shape != indices.shape or scores.ndim != 3:
            raise ValueError(
                f"scores and indices must both be (k, H, W), got {tuple(scores.shape)} and {tuple(indices.shape)}"
            )
        indices = indices if indices.is_floating_point() else indices.long()
        largest = float(indices.max()) if indices.numel() else 0.0
        if indices.dtype in (torch.float16, torch.bfloat16) and largest > 2 / torch.finfo(indices.dtype).eps:
            raise ValueError(
                f"class index {int(largest)} was stored as {indices.dtype}, which skips numbers there; write the label "
                "maps again with indices of an integer type"
            )
        if largest >= MOST_CLASSES:  # before float32 rounds it
            raise ValueError(_too_large(int(largest)))
        height, width = picture_size
        if region == "full":
            box: tuple[float, ...] = (0, 0, width, height)
        elif region == "center_square":
            side = min(height, width)
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        elif isinstance(region, str):
            raise ValueError(f"region must be 'full', 'center_square' or four numbers, got {region!r}")
        else:
            box = tuple(region)
        return cls(torch.stack([scores.float(), indices.float()]), canvas=picture_size, place=_box_to_unit(box))

    @property
    def scores(self) -> Tensor:
        """float32 (k, H, W), a plain tensor."""
        return self.as_subclass(Tensor)[0]

    @property
    def indices(self) -> Tensor:
        """int64 (k, H, W), a plain tensor."""
        return self.as_subclass(Tensor)[1].long()

    @classmethod
    def _of(cls, tensor: Tensor, canvas: Size, place: Tensor, seen: Tensor) -> LabelMap:
        labels: Any = tensor.as_subclass(cls)
        labels.canvas, labels.place, labels.seen = canvas, place, seen
        return labels

    @classmethod
    def wrap(cls, tensor: Tensor, like: Any, **changed: Any) -> LabelMap:
        return cls._of(tensor, **{name: changed.get(name, getattr(like, name)) for name in ("canvas", "place", "seen")})

    @classmethod
    def _wrap_output(cls, output: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """What torchvision wraps again (``to``, ``clone`` and so on) keeps its place; other types are refused."""
        like = next((x for x in args if isinstance(x, LabelMap)), None)
        if not isinstance(output, Tensor) or like is None or output.shape != like.shape:
            return output
        if output.dtype != torch.float32:
            raise TypeError(
                f"a label map cannot become {output.dtype}, which would round class indices; take .scores or .indices"
            )
        return cls.wrap(output.as_subclass(Tensor), like)

    def __deepcopy__(self, memo: dict[int, Any]) -> LabelMap:
        return self._of(self.as_subclass(Tensor).detach().clone(), self.canvas, self.place.clone(), self.seen.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by value: a tensor that a worker hands over by shared memory holds a file open, and a batch has as
        many maps as pictures."""
        if self.device.type != "cpu":
            return super().__reduce_ex__(protocol)
        parts = (self.as_subclass(Tensor).detach(), self.place, self.seen)
        return _rebuilt, (self.canvas, *(part.numpy() for part in parts))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return self._make_repr(canvas=self.canvas, place=self.place.tolist())


def _rebuilt(canvas: Size, *arrays: np.ndarray) -> LabelMap:
    data, place, seen = (torch.from_numpy(array) for array in arrays)
    return LabelMap._of(data, canvas, place, seen)


def _check(data: Tensor) -> None:
    if data.ndim != 4 or data.shape[0] != 2 or data.dtype != torch.float32 or data.numel() == 0:
        raise ValueError(
            f"a label map is float32 (2, k, H, W), scores and class indices, got {data.dtype} {tuple(data.shape)}"
        )
    low, high = (float(x) for x in data[1].aminmax())
    if high >= MOST_CLASSES:
        raise ValueError(_too_large(int(high)))
    if not low >= 0 or not torch.equal(data[1], data[1].round()):
        raise ValueError(f"class indices must be whole numbers from 0, got {low:g} to {high:g}")


def _too_large(index: int) -> str:
    return f"class index {index} is too large: a label map keeps indices in float32, exact below {MOST_CLASSES}"


# A batch is a list: maps of different pictures lie in different places, which one tensor could not say.
default_collate_fn_map[LabelMap] = lambda batch, **_: list(batch)


# ---- how a map follows its picture


def _matrix(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64).reshape(3, 3)


def _shift(x: float, y: float) -> Tensor:
    return _matrix(1, 0, x, 0, 1, y, 0, 0, 1)


def _scale(x: float, y: float) -> Tensor:
    return _matrix(x, 0, 0, 0, y, 0, 0, 0, 1)


def _box_to_unit(box: Sequence[float]) -> Tensor:
    """The homography that makes a box left, top, right, bottom the unit square."""
    left, top, right, bottom = box
    return _scale(1 / (right - left), 1 / (bottom - top)) @ _shift(-left, -top)


def _moved(labels: LabelMap, back: Tensor, canvas: Size | None = None, fills: bool = False) -> LabelMap:
    """A map after its picture was moved.

    Args:
        back: (3, 3), from a place in the new picture to where it was in the old one.
        canvas: the new picture's size, where it changed.
        fills: the new picture may show what was beyond the border of the old one.
    """
    seen = labels.seen
    if fills:
        height, width = labels.canvas
        border = torch.tensor([[1, 0, 0], [-1, 0, width], [0, 1, 0], [0, -1, height]], dtype=torch.float64)
        seen = torch.cat([seen, border])
    seen = seen @ back
    if back[2, :2].any():
        seen = torch.cat([seen, back[2:]])  # beyond its horizon a perspective shows the picture upside down again
    plain = labels.as_subclass(Tensor)
    return LabelMap.wrap(plain, labels, canvas=canvas or labels.canvas, place=labels.place @ back, seen=seen)


def _kernel(functional: Callable[..., Any]) -> Callable[..., Any]:
    return F.register_kernel(functional, LabelMap)


@_kernel(F.get_size)
def _get_size(labels: LabelMap) -> list[int]:
    return list(labels.canvas)


@_kernel(F.horizontal_flip)
def _horizontal_flip(labels: LabelMap) -> LabelMap:
    return _moved(labels, _matrix(-1, 0, labels.canvas[1], 0, 1, 0, 0, 0, 1))


@_kernel(F.vertical_flip)
def _vertical_flip(labels: LabelMap) -> LabelMap:
    return _moved(labels, _matrix(1, 0, 0, 0, -1, labels.canvas[0], 0, 0, 1))


@_kernel(F.resize)
def _resize(labels: LabelMap, size: list[int] | None, *_: Any, max_size: int | None = None, **__: Any) -> LabelMap:
    nothing = torch.empty(0, 4)
    _, (height, width) = F.resize_bounding_boxes(nothing, labels.canvas, size, max_size)
    return _moved(labels, _scale(labels.canvas[1] / width, labels.canvas[0] / height), (height, width))


@_kernel(F.crop)
def _crop(labels: LabelMap, top: int, left: int, height: int, width: int) -> LabelMap:
    over = top < 0 or left < 0 or top + height > labels.canvas[0] or left + width > labels.canvas[1]
    return _moved(labels, _shift(left, top), (height, width), fills=over)


@_kernel(F.center_crop)
def _center_crop(labels: LabelMap, output_size: list[int]) -> LabelMap:
    height, width = _pair(output_size)
    starts = (
        # as torchvision's pictures, not as its boxes, which begin a pixel earlier where an odd number is added
        round((old - new) / 2) if new <= old else -((new - old) // 2)
        for old, new in zip(labels.canvas, (height, width), strict=True)
    )
    return _crop(labels, *starts, height, width)


@_kernel(F.resized_crop)
def _resized_crop(
    labels: LabelMap, top: int, left: int, height: int, width: int, size: list[int], *_: Any, **__: Any
) -> LabelMap:
    return _resize(_crop(labels, top, left, height, width), size)


@_kernel(F.pad)
def _pad(labels: LabelMap, padding: Any, *_: Any, **__: Any) -> LabelMap:
    sides = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = sides * (4 // len(sides))
    height, width = labels.canvas
    return _crop(labels, -top, -left, height + top + bottom, width + left + right)


@_kernel(F.affine)
def _affine(
    labels: LabelMap,
    angle: float,
    translate: Sequence[float],
    scale: float,
    shear: Any,
    *_: Any,
    center: Sequence[float] | None = None,
    **__: Any,
) -> LabelMap:
    shears = [shear, 0.0] if isinstance(shear, (int, float)) else list(shear) * (2 // len(shear))
    height, width = labels.canvas
    x, y = center if center is not None else (width / 2, height / 2)
    turn, along, down = (math.radians(degrees) for degrees in (angle, *shears))
    there = (
        _shift(translate[0] + x, translate[1] + y)
        @ _matrix(math.cos(turn), -math.sin(turn), 0, math.sin(turn), math.cos(turn), 0, 0, 0, 1)
        @ _scale(scale, scale)
        @ _matrix(1, 0, 0, -math.tan(down), 1, 0, 0, 0, 1)
        @ _matrix(1, -math.tan(along), 0, 0, 1, 0, 0, 0, 1)
        @ _shift(-x, -y)
    )
    return _moved(labels, torch.linalg.inv(there), fills=True)


@_kernel(F.rotate)
def _rotate(
    labels: LabelMap,
    angle: float,
    interpolation: Any = None,
    expand: bool = False,
    center: Sequence[float] | None = None,
    *_: Any,
    **__: Any,
) -> LabelMap:
    turned = _affine(labels, -angle, (0, 0), 1.0, (0, 0), center=center)  # counter-clockwise, unlike F.affine
    if not expand:
        return turned
    height, width = _expanded(labels.canvas, angle, center)
    # the middle of the larger picture shows what the middle of the old one would
    return _moved(turned, _shift((labels.canvas[1] - width) / 2, (labels.canvas[0] - height) / 2), (height, width))


def _expanded(canvas: Size, angle: float, center: Sequence[float] | None) -> Size:
    """The size of a picture turned with ``expand``, as torchvision rounds it for pictures.

    (For boxes and key points torchvision rounds otherwise, and is off by a pixel from its own pictures at times.)
    """
    if center is None and angle % 90 == 0:
        return canvas if angle % 180 == 0 else (canvas[1], canvas[0])
    half = torch.tensor([canvas[1], canvas[0]]) / 2
    off = torch.zeros(2) if center is None else torch.tensor(list(center)) - half
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    back = torch.tensor([[cos, -sin], [sin, cos]])
    corners = (torch.tensor([[-1, -1], [-1, 1], [1, 1], [1, -1]]) * half - off) @ back.T + off + half
    low, high = ((c * 1e4).trunc() * 1e-4 for c in corners.aminmax(dim=0))
    width, height = (high.ceil() - low.floor()).int().tolist()
    return height, width


@_kernel(F.perspective)
def _perspective(
    labels: LabelMap,
    startpoints: Sequence[Sequence[float]] | None,
    endpoints: Sequence[Sequence[float]] | None,
    *_: Any,
    coefficients: Sequence[float] | None = None,
    **__: Any,
) -> LabelMap:
    if coefficients is None:
        if startpoints is None or endpoints is None:
            raise ValueError("perspective needs start points and end points, or coefficients")
        coefficients = _coefficients(startpoints, endpoints)
    return _moved(labels, _matrix(*coefficients, 1), fills=True)


def _coefficients(startpoints: Sequence[Sequence[float]], endpoints: Sequence[Sequence[float]]) -> list[float]:
    """The eight numbers of the homography that takes four end points to four start points."""
    rows, values = [], []
    for (x, y), (u, v) in zip(endpoints, startpoints, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    double = torch.float64
    return torch.linalg.solve(torch.tensor(rows, dtype=double), torch.tensor(values, dtype=double)).tolist()


@_kernel(F.five_crop)
def _five_crop(labels: LabelMap, size: Any) -> tuple[LabelMap, ...]:
    (height, width), (high, wide) = labels.canvas, _pair(size)
    if high > height or wide > width:
        raise ValueError(f"a crop of {(high, wide)} is larger than the picture, {(height, width)}")
    corners = [(0, 0), (0, width - wide), (height - high, 0), (height - high, width - wide)]
    return (*(_crop(labels, *corner, high, wide) for corner in corners), _center_crop(labels, [high, wide]))


@_kernel(F.ten_crop)
def _ten_crop(labels: LabelMap, size: Any, vertical_flip: bool = False) -> tuple[LabelMap, ...]:
    mirrored = _vertical_flip(labels) if vertical_flip else _horizontal_flip(labels)
    return _five_crop(labels, size) + _five_crop(mirrored, size)


def _pair(size: Any) -> Size:
    if isinstance(size, int):
        return size, size
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


MOVED = (
    *(F.horizontal_flip, F.vertical_flip, F.resize, F.crop, F.center_crop, F.resized_crop, F.pad),
    *(F.affine, F.rotate, F.perspective, F.five_crop, F.ten_crop),
)
#: by name, as older releases of torchvision lack some
PHOTOMETRIC = (
    *("adjust_brightness", "adjust_contrast", "adjust_gamma", "adjust_hue", "adjust_saturation", "adjust_sharpness"),
    *("autocontrast", "equalize", "erase", "gaussian_blur", "gaussian_noise", "grayscale_to_rgb", "invert", "jpeg"),
    *("normalize", "permute_channels", "posterize", "rgb_to_grayscale", "solarize", "to_dtype"),
)


def dispatching() -> list[Callable[..., Any]]:
    """Every functional of torchvision v2 that has a kernel for each type of input, as its names say."""
    kinds = ("image", "video", "mask", "bounding_boxes")
    return [f for name, f in vars(F).items() if any(f"{name}_{kind}" in vars(F) for kind in kinds)]


def _unchanged(labels: LabelMap, *_: Any, **__: Any) -> LabelMap:
    return labels


def _refusal(functional: Callable[..., Any]) -> Callable[..., NoReturn]:
    name = functional.__name__
    if functional is F.elastic:
        why = "no homography describes it; use affine or perspective instead"
    else:
        why = "nothing is known of what it does to places; register a kernel for it"

    def refuse(labels: LabelMap, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"a label map cannot follow {name}: {why}")

    return refuse


def _register_the_rest() -> None:
    """torchvision's transforms hand on what has no kernel as it is, without a word: let nothing be without."""
    photometric = {getattr(F, name) for name in PHOTOMETRIC if hasattr(F, name)}
    for functional in dict.fromkeys(dispatching()):  # without the aliases
        if functional in photometric:
            _kernel(functional)(_unchanged)
        elif functional not in MOVED and functional is not F.get_size:
            _kernel(functional)(_refusal(functional))


_register_the_rest()


# ---- what a map says of the tokens


class PooledLabels(NamedTuple):
    """What the label maps of a batch say of its views.

    image: float32 (B, C) logits of the whole view. tokens: float32 (B, C, h, w) logits of every token. known: float32
    (B, h, w), in 0..1, how much of each token has a label; where it is 0 the logits are 0 for every class.
    """

    image: Tensor
    tokens: Tensor
    known: Tensor


@torch.no_grad()
def pooled(
    maps: Sequence[LabelMap],
    classes: int,
    grid: Size,
    fill: Fill = "auto",
    convention: Literal["default", "release"] = "default",
    device: torch.device | str | None = None,
) -> PooledLabels:
    """The logits of every token, and of the whole view, of a batch of pictures.

    A token's logits are the mean of the map at places spread evenly over the token, at most a cell apart, where the map
    is interpolated bilinearly. For crops, flips and resizes that is RoIAlign (aligned, adaptive number of samples) and
    held equal to torchvision's. For turned, sheared and perspective views, and where a part has no label, at least
    2 x 2 places are read, and only those that have a label count. Against exact areas, for 18 x 18 cells and 14 x 14
    tokens, 3 % of such a token's weight lies on other cells (7 % of a crop's, which is RoIAlign's own error), its place
    is off by 0.0003 cells on average and 0.04 at most, and ``known`` by 0.02 and 0.33.

    It takes only the k classes of the cells touched, in chunks of ``CHUNK_BYTES`` besides the results, and waits for no
    accelerator as long as the maps are still on the CPU (which is where their class indices can be checked). On CUDA
    the order of additions varies by the last bit unless ``torch.use_deterministic_algorithms`` is set.

    Args:
        maps: B label maps. Those of one shape are read together, others one by one.
        classes: C of the student's; all indices must lie below.
        grid: (h, w), the student's tokens over the whole view.
        fill: the logit of classes that were not stored, as in ``token_labels.dense_logits``.
        convention: "release" repeats the published code: x and y of the crop are exchanged, a RoI has at least one
            cell, and only square maps, flips, crops and resizes are understood (for RandAugment it moves the stored
            values instead: ``released``). Published accuracies were reached with it.
        device: where the results shall be; None: where the maps are.

    Raises:
        TypeError: no map, or something else than label maps.
        ValueError: a class index that is no class of the student's, or a view the release does not know.
    """
    if not maps or not all(isinstance(m, LabelMap) for m in maps):
        raise TypeError(f"expected label maps, got {[type(m).__name__ for m in maps[:4]]}")
    if convention not in ("default", "release"):
        raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
    if len({m.shape for m in maps}) > 1:
        each = [pooled([m], classes, grid, fill, convention, device) for m in maps]
        return PooledLabels(*(torch.cat(parts) for parts in zip(*each, strict=True)))
    if convention == "release":
        maps = [_settled(m) for m in maps]
    data = torch.stack([m.as_subclass(Tensor) for m in maps])
    if data.device.type == "cpu" and data[:, 1].max() >= classes:
        raise ValueError(
            f"a label map names class {int(data[:, 1].max())}, the student has {classes} classes: its label maps were "
            "made for another set of classes"
        )
    data = data if device is None else data.to(device, non_blocking=True)
    return (_pooled_as_released if convention == "release" else _pooled)(maps, data, classes, grid, fill)


def _pooled(maps: Sequence[LabelMap], data: Tensor, classes: int, grid: Size, fill: Fill) -> PooledLabels:
    batch, _, kept, *cells = data.shape
    views = _Views.of(maps)
    results = []
    for parts in (grid, (1, 1)):
        tokens = parts[0] * parts[1]
        counts = views.samples(parts, (cells[0], cells[1]))
        logits = torch.empty(batch, tokens, classes, device=data.device)
        known = torch.empty(batch, tokens, device=data.device)
        # a place is four cells of k classes, each of them some 40 bytes of indices, scores, shares and products
        each = tokens * (4 * classes + int(counts.amax(0).prod()) * 4 * kept * 40)
        at_once = max(1, CHUNK_BYTES // each)
        for start in range(0, batch, at_once):
            part = slice(start, start + at_once)
            points, weights, known[part] = views.places(part, parts, counts[part], (cells[0], cells[1]), data.device)
            logits[part] = pool(data[part, 0], data[part, 1].long(), points, weights, classes, fill)
        results.append((logits, known))
    (logits, known), (image, _) = results
    return PooledLabels(image[:, 0], logits.transpose(1, 2).reshape(batch, classes, *grid), known.reshape(batch, *grid))


class _Views(NamedTuple):
    """Where the views of a batch lie, with the view itself as the unit square.

    to_map: float64 (B, 3, 3), to fractions of the map. lines: float64 (B, n, 3), below 0 beyond the picture.
    """

    to_map: Tensor
    lines: Tensor

    @classmethod
    def of(cls, maps: Sequence[LabelMap]) -> _Views:
        to_pixels = torch.stack([_scale(m.canvas[1], m.canvas[0]) for m in maps])
        most = max(len(m.seen) for m in maps)
        always = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        lines = [torch.cat([m.seen, always.expand(most - len(m.seen), 3)]) for m in maps]
        return cls(torch.stack([m.place for m in maps]) @ to_pixels, torch.stack(lines) @ to_pixels)

    def samples(self, grid: Size, cells: Size) -> Tensor:
        """int64 (B, 2): how many places are read in a token, down and across, for places at most a cell apart."""
        corners = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.float64)
        u, v, w = (self.to_map @ corners.T).unbind(1)  # (B, 4) each
        steps = []
        for axis, parts in ((1, grid[0]), (0, grid[1])):
            du, dv, dw = (row[:, None] for row in self.to_map[:, :, axis].unbind(1))
            across, down = (du * w - u * dw) / w**2 * cells[1], (dv * w - v * dw) / w**2 * cells[0]
            steps.append(torch.hypot(across, down).amax(1) / parts)
        # what is a whole number but for rounding stays it; a view up to its horizon would need infinitely many
        most = 2.0 * max(cells)
        needed = (torch.stack(steps, 1) - 1e-6).ceil().nan_to_num(most, most).clamp(1, most)
        return torch.where(self._plain(u, v, corners)[:, None], needed, needed.clamp(min=2)).long()

    def _plain(self, u: Tensor, v: Tensor, corners: Tensor) -> Tensor:
        """bool (B,): crops, flips and resizes that show nothing but the map. RoIAlign reads as many places there."""
        tiny = 1e-9
        upright = self.to_map[:, [0, 1, 2, 2], [1, 0, 0, 1]].abs().amax(1) < tiny
        inside = ((torch.minimum(u, v) > -tiny) & (torch.maximum(u, v) < 1 + tiny)).all(1)
        return upright & inside & ((self.lines @ corners.T) > -tiny * 1e4).flatten(1).all(1)

    def places(
        self, part: slice, grid: Size, counts: Tensor, cells: Size, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the tokens of a part of the batch read the map: points (B, T, S, 2) in cells, weights (B, T, S), known
        (B, T), as ``pool`` wants them."""
        y, real_y = _ticks(grid[0], counts[:, 0])
        x, real_x = _ticks(grid[1], counts[:, 1])
        real = real_y[:, None, None, :, None] & real_x[:, None, None, None, :]
        y, x, real, to_map, lines = (
            t.to(device, non_blocking=True)
            for t in (y[:, :, None, :, None], x[:, None, :, None, :], real, self.to_map[part], self.lines[part])
        )

        def at(row: Tensor) -> Tensor:
            """(B, 3) -> (B, h, w, down, across): row @ (x, y, 1) at every place."""
            a, b, c = (n.reshape(-1, 1, 1, 1, 1) for n in row.unbind(1))
            return a * x + b * y + c

        w = at(to_map[:, 2])
        u, v = at(to_map[:, 0]) / w, at(to_map[:, 1]) / w
        inside = real & (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
        for line in lines.unbind(1):
            inside = inside & (at(line) >= 0)
        points = torch.stack([u * cells[1], v * cells[0]], -1)
        points = torch.where(inside[..., None], points, 0.5)  # 0.5: anywhere in the map, its weight is 0
        weights = inside.double().flatten(3).flatten(1, 2)
        read = weights.sum(-1)
        known = read / (counts[:, :1] * counts[:, 1:]).to(device, non_blocking=True)
        return points.flatten(3, 4).flatten(1, 2), weights / read.clamp(min=1)[..., None], known.float()


def _ticks(parts: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where the places of every token are along one side of the view: float64 (B, parts, N) in 0..1, and bool (B, N),
    which of them a picture has, as it needs counts (B,) of them."""
    n = torch.arange(int(counts.max()))
    inner = (n + 0.5).double() / counts[:, None]
    return (torch.arange(parts)[:, None] + inner[:, None]) / parts, n < counts[:, None]


# ---- as released


def released(labels: LabelMap, operation: str, amount: float) -> LabelMap:
    """A geometric operation of RandAugment as the published code does it to a map: its stored values are moved.

    The nearest cell is taken, indices of cells and not their centres are turned and sheared, cells from outside have
    the scores 0 and the classes of the rim. In the published order flips come before and the crop after it.

    Args:
        operation: one of ``RELEASED``.
        amount: the operation's argument for the picture: a factor, a part of the side, or degrees counter-clockwise.

    Raises:
        ValueError: an unknown operation, a map that is not square, or a map already cropped or turned.
    """
    labels = _settled(labels)
    height, width = labels.shape[-2:]
    view = labels.place @ _scale(labels.canvas[1], labels.canvas[0])
    if not torch.allclose(view, torch.eye(3, dtype=torch.float64)) or height != width:
        raise ValueError("the published code moves square maps of whole pictures: flips, RandAugment, then the crop")
    row, column = (n.double() for n in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    if operation == "Rotate":
        cos, sin = (round(f(math.radians(amount)), 15) for f in (math.cos, math.sin))
        up, left = row - height / 2, column - width / 2
        row, column = cos * up + sin * left + height / 2, cos * left - sin * up + width / 2
    elif operation == "ShearX":
        column = column + amount * row
    elif operation == "ShearY":
        row = row + amount * column
    elif operation == "TranslateXRel":
        column = column + amount * width
    elif operation == "TranslateYRel":
        row = row + amount * height
    else:
        raise ValueError(f"operation must be one of {RELEASED}, got {operation!r}")
    inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
    rows, columns = ((n.clamp(0, height - 1) + 0.5).floor().long() for n in (row, column))
    scores, indices = labels.as_subclass(Tensor)[:, :, rows, columns]
    return LabelMap.wrap(torch.stack([scores * inside, indices]), labels)


def _settled(labels: LabelMap) -> LabelMap:
    """The same map with its flips carried out in its values. Raises ValueError for what is no flip, crop or resize."""
    view = labels.place @ _scale(labels.canvas[1], labels.canvas[0])
    if view[[0, 1, 2, 2], [1, 0, 0, 1]].abs().max() > 1e-9 or len(labels.seen):
        raise ValueError(
            "convention='release' knows flips, crops and resizes within the picture; use RandAugment(convention="
            "'release') for its other operations, or the default convention"
        )
    data, place = labels.as_subclass(Tensor), labels.place
    if view[0, 0] < 0:
        data, place = data.flip(-1), _matrix(-1, 0, 1, 0, 1, 0, 0, 0, 1) @ place
    if view[1, 1] < 0:
        data, place = data.flip(-2), _matrix(1, 0, 0, 0, -1, 1, 0, 0, 1) @ place
    return LabelMap.wrap(data, labels, place=place)


def _pooled_as_released(maps: Sequence[LabelMap], data: Tensor, classes: int, grid: Size, fill: Fill) -> PooledLabels:
    batch, _, _, height, width = data.shape
    if height != width:
        raise ValueError(f"convention='release' knows square maps, got {height} x {width} cells")
    box = _Views.of(maps).to_map
    left, top = box[:, 0, 2], box[:, 1, 2]
    right, bottom = left + box[:, 0, 0], top + box[:, 1, 1]
    boxes = torch.stack([top, left, bottom, right], 1).float() * width - 0.5  # x and y exchanged
    boxes = boxes.to(data.device, non_blocking=True)
    image = torch.empty(batch, classes, device=data.device)
    tokens = torch.empty(batch, classes, *grid, device=data.device)
    chunk = max(1, CHUNK_BYTES // (8 * classes * height * width))
    for start in range(0, batch, chunk):
        part = slice(start, start + chunk)
        dense = dense_logits(data[part, 0], data[part, 1].long(), classes, fill)
        rois = list(boxes[part, None].unbind(0))
        image[part] = roi_align(dense, rois, (1, 1), sampling_ratio=-1, aligned=False).flatten(1)
        tokens[part] = roi_align(dense, rois, grid, sampling_ratio=-1, aligned=False)
    return PooledLabels(image, tokens, torch.ones(batch, *grid, device=data.device))
