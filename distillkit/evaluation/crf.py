"""Dense CRF: class probabilities of pixels, moved to the edges of the picture. Krähenbühl and Koltun, arXiv:1210.5644.

Mean field inference in the model where every two pixels i, j of a picture are bound by

    k(i, j) = w_1 exp(-|p_i - p_j|^2 / 2 s_1^2) + w_2 exp(-|p_i - p_j|^2 / 2 s_2^2 - |I_i - I_j|^2 / 2 s_rgb^2)

with p their places and I their colours. Each iteration, Q_i(l) becomes proportional to

    P_i(l) exp(sum over j of k(i, j) Q_j(l)),

where each of the two kernels is normalised symmetrically: divided by the square roots of its sums at i and at j.

Two backends compute it. "pydensecrf": the package pydensecrf2, over all pairs of pixels, on the CPU. "local": ours, on
any device, an APPROXIMATION: of the pixels around each it reads some, at distances 0, 1, 2, 3, 9, 27, ... along both
axes, out to two standard deviations, each standing for the area around it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Backend = Literal["auto", "pydensecrf", "local"]
LEAST = 1e-5  # probability: a class is never ruled out for a pixel


@dataclass(frozen=True)
class DenseCRF:
    """The model's numbers; as given, those of DeepLab-v2 and L2G (arXiv:2204.03206).

    Args:
        iterations: of the mean field.
        position_weight, position_xy: w_1, and s_1 in pixels.
        colour_weight, colour_xy, colour_rgb: w_2, s_2 in pixels, and s_rgb in levels of 0..255.
    """

    iterations: int = 10
    position_weight: float = 3.0
    position_xy: float = 1.0
    colour_weight: float = 4.0
    colour_xy: float = 67.0
    colour_rgb: float = 3.0


def crf_backend(backend: Backend = "auto") -> str:
    """Which one ``dense_crf`` runs: "pydensecrf" or "local"; for records.

    Raises:
        ImportError: "pydensecrf" is asked for and not installed.
        ValueError: an unknown name.
    """
    if backend not in ("auto", "pydensecrf", "local"):
        raise ValueError(f"backend must be 'auto', 'pydensecrf' or 'local', got {backend!r}")
    there = importlib.util.find_spec("pydensecrf") is not None
    if backend == "pydensecrf" and not there:
        raise ImportError("backend 'pydensecrf' is not installed: pip install pydensecrf2, or use backend='local'")
    return "pydensecrf" if there and backend != "local" else "local"


@torch.no_grad()
def dense_crf(
    probabilities: Tensor, picture: Tensor, settings: DenseCRF | None = None, backend: Backend = "auto"
) -> Tensor:
    """Probabilities of each pixel's class, given those that a model gives it, and the picture.

    Args:
        probabilities: (K, H, W), of K classes, at least 0; each pixel's are divided by their sum.
        picture: uint8 (3, H, W), RGB as it is seen: neither normalised nor less the mean.
        settings: None: ``DenseCRF()``.
        backend: "auto": pydensecrf where it is installed, else, with a warning, the approximation.

    Returns float32 (K, H, W), summing to 1 over K, on the device of ``probabilities``.

    Raises:
        ValueError: shapes, types or numbers that do not fit.
        ImportError: as ``crf_backend``.
    """
    _check(probabilities, picture)
    settings = settings or DenseCRF()
    chosen = crf_backend(backend)
    if chosen == "local" and backend == "auto":
        warnings.warn(
            "pydensecrf is not installed, so that an approximation of the dense CRF runs (backend 'local'): pip "
            "install pydensecrf2 for the original, or say backend='local'",
            stacklevel=2,
        )
    start = probabilities.float().clamp_min(LEAST)
    start = start / start.sum(0, keepdim=True)
    run = _all_pairs if chosen == "pydensecrf" else _local
    return run(start, picture, settings).to(probabilities.device)


def _check(probabilities: Tensor, picture: Tensor) -> None:
    size = tuple(probabilities.shape[1:])
    if probabilities.dim() != 3 or picture.dtype != torch.uint8 or tuple(picture.shape) != (3, *size):
        raise ValueError(
            "a dense CRF takes probabilities (K, H, W) and a picture uint8 (3, H, W) of the same size, got "
            f"{tuple(probabilities.shape)} and {picture.dtype} {tuple(picture.shape)}"
        )
    if not bool((probabilities >= 0).all() & probabilities.isfinite().all()):
        raise ValueError("probabilities must be finite and at least 0, not logits: apply softmax(0) first")


# ---- all pairs of pixels


def _all_pairs(start: Tensor, picture: Tensor, settings: DenseCRF) -> Tensor:
    from pydensecrf import densecrf

    classes, height, width = start.shape
    field = densecrf.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(-start.log().flatten(1).cpu().numpy()))
    field.addPairwiseGaussian(sxy=settings.position_xy, compat=settings.position_weight)
    field.addPairwiseBilateral(
        sxy=settings.colour_xy,
        srgb=settings.colour_rgb,
        rgbim=np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy()),
        compat=settings.colour_weight,
    )
    found = np.array(field.inference(settings.iterations), dtype=np.float32)
    return torch.from_numpy(found).view(classes, height, width)


# ---- some of the pixels around each

Message = Callable[[Tensor], Tensor]


def _local(start: Tensor, picture: Tensor, settings: DenseCRF) -> Tensor:
    colours = picture.to(start.device, torch.float32)
    kernels = [
        (settings.position_weight, _messages(settings.position_xy, colours, None)),
        (settings.colour_weight, _messages(settings.colour_xy, colours, settings.colour_rgb)),
    ]
    unary = start.log()
    found = start
    for _ in range(settings.iterations):
        found = (unary + sum(weight * message(found) for weight, message in kernels)).softmax(0)
    return found


def _messages(xy: float, colours: Tensor, rgb: float | None) -> Message:
    """Q (K, H, W) -> at each pixel the sum of k(i, j) Q_j, with k normalised; without ``rgb``, k of places alone."""
    height, width = colours.shape[1:]
    rows, columns = _distances(xy, height), _distances(xy, width)
    # k(i, j) = k(j, i): one half of the offsets is enough
    half = [(y, x) for y in rows for x in columns if (y, x) >= (0, 0)]
    strengths = []
    for y, x in half:
        exponent = torch.full((), -(y * y + x * x) / (2 * xy * xy), device=colours.device)
        if rgb is not None:
            here, there = _pair(colours, y, x)
            exponent = exponent - (here - there).square().sum(0) / (2 * rgb * rgb)
        strengths.append(rows[y] * columns[x] * exponent.exp())

    def plain(q: Tensor) -> Tensor:
        total = torch.zeros_like(q)
        for (y, x), strength in zip(half, strengths):
            (here, there), (to_here, to_there) = _pair(q, y, x), _pair(total, y, x)
            to_here += strength * there
            if (y, x) != (0, 0):
                to_there += strength * here
        return total

    scale = plain(torch.ones_like(colours[:1])).rsqrt()
    return lambda q: scale * plain(scale * q)


def _distances(xy: float, side: int) -> dict[int, float]:
    """Offsets along one axis, 0, 1, 2, 3, 9, ... on both sides, and how many pixels each stands for."""
    reach = min(max(2 * xy, 1), side - 1)
    steps = [step for step in range(4) if step <= reach]
    while steps[-1] > 2 and 3 * steps[-1] <= reach:
        steps.append(3 * steps[-1])
    ends = [(a + b) / 2 for a, b in pairwise(steps)]
    ends.append(2 * steps[-1] - ends[-1] if ends else 0.5)
    starts = [-ends[0], *ends[:-1]]
    covered = {step: end - start for step, start, end in zip(steps, starts, ends)}
    return {sign * step: pixels for step, pixels in covered.items() for sign in (1, -1)}


def _pair(x: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Two views of maps (C, H, W): the pixels i that have a partner j = i + (dy, dx) with dy >= 0, and these."""
    height, width = x.shape[1:]
    left, right = max(0, -dx), min(width, width - dx)
    return x[:, : height - dy, left:right], x[:, dy:, left + dx : right + dx]
