"""Boundary bands of masks: the target of boundary heads, and what FakeMix cuts out (arXiv:2103.13279).

Bands are computed with shifted ORs alone, so that they cost about a millisecond and need no OpenCV.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distillkit.losses.segmentation import IGNORE

Between = Literal["foreground", "classes"]
Convention = Literal["default", "release"]


def boundary_band(
    mask: Tensor,
    thickness: int | float = 8,
    ignore: int = IGNORE,
    between: Between = "foreground",
    convention: Convention = "default",
) -> Tensor:
    """The band along the outline of the foreground (mask > 0): every pixel within thickness / 2 of a contour pixel.

    Contour pixels are those of the foreground that have background to the left, right, above or below: outer contours
    and those of holes. Where an object is cut off by the frame its contour runs along the frame, as OpenCV's does; two
    classes of the foreground that touch have no contour between them. A band is thickness + 1 pixels wide where
    thickness is even, as the release's is. Ignored pixels are neither background nor foreground: there is no contour
    between them and anything, so masks whose objects all have a rim of ignored pixels (VOC's) have no band.

    Args:
        mask: integers (..., H, W): 0 = background, ``ignore`` = not labelled.
        thickness: whole pixels >= 1, or a share of the shorter side, below 1 (8 at 512 is 0.0157).
        between: "foreground" as above; "classes": see ``class_boundaries``.
        convention: "release" finds and draws contours with OpenCV, as published, on the CPU; to it ignored pixels are
            background. Where there are none the default differs only in how the ends of thick lines are drawn: 97 % of
            the pixels of either band are in both on photographs' masks at 512, thickness 8.

    Returns uint8 (..., H, W) in {0, 1}.

    Raises ValueError for masks or options that are none of these, ImportError for the release without OpenCV.
    """
    if between not in ("foreground", "classes") or convention not in ("default", "release"):
        raise ValueError(
            "expected between 'foreground' or 'classes' and convention 'default' or 'release', got "
            f"{between!r} and {convention!r}"
        )
    if between == "classes":
        if convention == "release":
            raise ValueError("convention='release' knows one outline, of the foreground: use between='foreground'")
        return class_boundaries(mask, thickness, ignore)
    pixels = in_pixels(thickness, _size(mask))
    foreground = (mask > 0) & (mask != ignore)
    if convention == "release":
        return _drawn(foreground, pixels)
    return _dilated(_contour(foreground, mask == 0), pixels / 2).to(torch.uint8)


def class_boundaries(mask: Tensor, thickness: int | float = 8, ignore: int = IGNORE) -> Tensor:
    """The band along every border between two classes, half of it on either side.

    The frame is no border, and ignored pixels have none. The band of a straight border is ``thickness`` pixels wide,
    or one more where that is odd.

    Args, returns, raises: as ``boundary_band``; label 0 is a class like the others.
    """
    pixels = in_pixels(thickness, _size(mask))
    known = mask != ignore
    edges = torch.zeros_like(known)
    for axis in (-1, -2):
        length = mask.shape[axis] - 1
        if length < 1:
            continue
        (before, after), (was_known, is_known), marks = (
            (x.narrow(axis, 0, length), x.narrow(axis, 1, length)) for x in (mask, known, edges)
        )
        border = (before != after) & was_known & is_known
        for side in marks:
            side |= border
    return _dilated(edges, (pixels - 1) / 2).to(torch.uint8)


def in_pixels(thickness: int | float, size: tuple[int, int]) -> int:
    """Whole pixels of a thickness that may be given as a share of the shorter side. Raises ValueError for neither."""
    if isinstance(thickness, float) and 0 < thickness < 1:
        return max(round(thickness * min(size)), 1)
    if isinstance(thickness, bool) or not thickness >= 1 or thickness % 1:  # so that NaN is refused too
        raise ValueError(
            f"thickness: expected whole pixels >= 1 or a share of the side between 0 and 1, got {thickness}"
        )
    return int(thickness)


def overlap(shift: int, length: int) -> tuple[slice, slice]:
    """Where a row of ``length`` lands when moved by ``shift`` without wrapping, and what of it does; may be empty."""
    return (
        slice(max(shift, 0), max(length + min(shift, 0), 0)),
        slice(max(-shift, 0), max(length - max(shift, 0), 0)),
    )


def _contour(foreground: Tensor, background: Tensor) -> Tensor:
    """Pixels of the foreground beside background, or beside the frame."""
    beside = torch.zeros_like(foreground)
    for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        _add_moved(beside, background, dy, dx)
    for rim in (beside[..., 0, :], beside[..., -1, :], beside[..., 0], beside[..., -1]):
        rim.fill_(True)
    return beside & foreground


def _dilated(edges: Tensor, radius: float) -> Tensor:
    """Every pixel whose centre is within ``radius`` of an edge pixel's: rows of growing width, moved up and down."""
    reach = int(radius)
    widths = [int((radius**2 - dy**2) ** 0.5) for dy in range(reach + 1)]
    row, out = edges.clone(), torch.zeros_like(edges)
    for width in range(reach + 1):
        if width:
            _add_moved(row, edges, 0, width)
            _add_moved(row, edges, 0, -width)
        for dy in (dy for dy in range(reach + 1) if widths[dy] == width):
            _add_moved(out, row, dy, 0)
            if dy:
                _add_moved(out, row, -dy, 0)
    return out


def _add_moved(out: Tensor, x: Tensor, dy: int, dx: int) -> None:
    (to_y, from_y), (to_x, from_x) = overlap(dy, x.shape[-2]), overlap(dx, x.shape[-1])
    out[..., to_y, to_x] |= x[..., from_y, from_x]


def _drawn(foreground: Tensor, pixels: int) -> Tensor:
    """Contours as OpenCV finds and draws them."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "convention='release' draws boundary bands with OpenCV, which is not installed: "
            "pip install opencv-python-headless, or use convention='default'"
        ) from error
    flat = foreground.reshape(-1, *foreground.shape[-2:]).to("cpu", torch.uint8).numpy()
    bands = np.zeros_like(flat)
    for mask, band in zip(flat, bands):
        contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(band, contours, -1, 1, pixels)
    return torch.from_numpy(bands).reshape(foreground.shape).to(foreground.device)


def _size(mask: Tensor) -> tuple[int, int]:
    if mask.dim() < 2 or mask.is_floating_point() or not mask.shape[-1] or not mask.shape[-2]:
        raise ValueError(f"mask: expected integers (..., H, W), got {mask.dtype} {tuple(mask.shape)}")
    return mask.shape[-2], mask.shape[-1]
