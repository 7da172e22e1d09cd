"""MixToken: two pictures mixed after the patch embedding, on the grid of tokens. Jiang et al., arXiv:2104.10858.

A box of tokens is swapped between sample i and sample B - 1 - i, before the class token and positions are added, so
that no token sees pixels of two pictures. One box for the batch; the middle sample of an odd batch is left as it is.
After the transformer the token logits are swapped back with the same box, and the image labels are mixed by the part
of its own picture that each sample kept (``token_labels.mixed``).

A box is an int64 tensor (4,): y1, x1, y2, x2 on a grid of (h, w) tokens, ends excluded. Everything works on tensors
without reading them on the host: no accelerator waits, and all of it compiles into one graph.
"""

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["bchw", "bhwc", "bnc"]
Grid = tuple[int, int]


def mix_box(lam: float | Tensor, cy: int | Tensor, cx: int | Tensor, grid: Grid) -> Tensor:
    """The box around token (cy, cx) that would replace 1 - lam of the grid, cut off at its border: int64 (4,).

    The published rule, in whole numbers: sides are ``int(side * sqrt(1 - lam))`` and reach ``side // 2`` tokens to
    either way of the centre. Odd sides lose a row, and a side of 1 leaves an empty box: labels are mixed by
    ``realised`` and not by lam.

    Args:
        lam: in [0, 1].
        cy, cx: whole numbers in 0..h-1 and 0..w-1. (The release calls them cx and cy, in this order.)
        grid: (h, w).
    """
    side = (1 - torch.as_tensor(lam, dtype=torch.float64)).sqrt()
    ends = [_reach(centre, length, side) for centre, length in zip((cy, cx), grid, strict=True)]
    return torch.stack([low for low, _ in ends] + [high for _, high in ends])


def draw_box(grid: Grid, generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
    """A random box: lam from Beta(1, 1), which is uniform in 0..1, then cy, then cx, uniform on the grid.

    Drawn where ``generator`` lives (``device`` when there is none) and then moved to ``device``.
    """
    here = generator.device if generator is not None else device
    lam = torch.rand((), generator=generator, device=here, dtype=torch.float64)
    cy, cx = (torch.randint(side, (), generator=generator, device=here) for side in grid)
    return mix_box(lam, cy, cx, grid).to(device if device is not None else lam.device, non_blocking=True)


def realised(box: Tensor, grid: Grid) -> Tensor:
    """The part of its own tokens that a sample keeps: float32 scalar, ``1 - area / (h * w)``."""
    y1, x1, y2, x2 = box.unbind()
    return 1 - ((y2 - y1) * (x2 - x1)).float() / (grid[0] * grid[1])


def mix(tokens: Tensor, box: Tensor, layout: Layout, grid: Grid | None = None) -> Tensor:
    """A batch with the tokens of the box taken from the reversed batch. Mixing twice gives the batch back.

    Args:
        tokens: (B, C, h, w), (B, h, w, C) or (B, N, C), as ``layout`` says; (B, N, C) row by row and without a class
            token.
        box: (4,), moved to the device of the tokens. On a grid finer by a whole factor, as of VOLO's first stage, the
            box times that factor.
        layout: "bchw", "bhwc" or "bnc".
        grid: (h, w), needed for "bnc".

    Raises:
        ValueError: a shape that does not fit the layout and grid.
    """
    height, width = _grid_of(tokens, layout, grid)
    y1, x1, y2, x2 = box.to(tokens.device, non_blocking=True).unbind()
    rows, columns = (torch.arange(side, device=tokens.device) for side in (height, width))
    inside = ((rows >= y1) & (rows < y2))[:, None] & ((columns >= x1) & (columns < x2))
    if layout == "bhwc":
        inside = inside[..., None]
    elif layout == "bnc":
        inside = inside.reshape(-1, 1)
    return torch.where(inside, tokens.flip(0), tokens)


def _reach(centre: int | Tensor, length: int, side: Tensor) -> tuple[Tensor, Tensor]:
    """Where the box begins and ends along one side of the grid, of ``length`` tokens."""
    half = (length * side).long() // 2
    return (centre - half).clamp(0, length), (centre + half).clamp(0, length)


def _grid_of(tokens: Tensor, layout: Layout, grid: Grid | None) -> Grid:
    if layout not in ("bchw", "bhwc", "bnc"):
        raise ValueError(f"layout must be 'bchw', 'bhwc' or 'bnc', got {layout!r}")
    shape = tuple(tokens.shape)
    if len(shape) != len(layout):
        raise ValueError(f"layout {layout!r} has {len(layout)} dimensions, the tokens have shape {shape}")
    if layout == "bnc":
        if grid is None or grid[0] * grid[1] != shape[1]:
            raise ValueError(f"tokens {shape} need the grid (h, w) with h * w = {shape[1]}, got {grid}")
        return grid
    found = (shape[2], shape[3]) if layout == "bchw" else (shape[1], shape[2])
    if grid is not None and tuple(grid) != found:
        raise ValueError(f"tokens {shape} in layout {layout!r} have the grid {found}, got {tuple(grid)}")
    return found
