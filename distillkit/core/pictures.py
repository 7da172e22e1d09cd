"""What is done to the student's pictures before a teacher sees them: other normalisation, another size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distillkit.core.adapter import Norm


class Renormalise:
    """Pictures normalised with ``given`` (mean, std), as they would be with ``wanted``.

    Called with a tensor (B, C, H, W) or a list of (C, H, W). ``turned``: the order of channels is turned round, too.
    Raises ValueError for pictures of integers, of which it is not known what mean and std speak of.
    """

    def __init__(self, given: Norm, wanted: Norm, turned: bool = False):
        (m0, s0), (m1, s1) = given, wanted
        self.turned = turned
        if turned:
            m0, s0 = m0[::-1], s0[::-1]
        self.same = (m0, s0) == (m1, s1)
        self.scale = torch.tensor([a / b for a, b in zip(s0, s1, strict=True)]).view(-1, 1, 1)
        self.shift = torch.tensor([(a - b) / s for a, b, s in zip(m0, m1, s1, strict=True)]).view(-1, 1, 1)

    def __call__(self, pictures: Any) -> Any:
        if isinstance(pictures, list | tuple):
            return type(pictures)(self(p) for p in pictures)
        if self.turned:
            pictures = pictures.flip(-3)
        if self.same:
            return pictures
        if not pictures.is_floating_point():
            raise ValueError(
                f"the teacher's pictures are to be re-normalised and are {pictures.dtype}: give the model floating "
                "pictures, normalised as the adapter's mean= and std= say, or Teacher(..., feed=) what makes the "
                "teacher's of them"
            )
        if self.scale.device != pictures.device:  # once, not a copy to the device in every step
            self.scale, self.shift = self.scale.to(pictures.device), self.shift.to(pictures.device)
        return pictures * self.scale + self.shift


class Resize:
    """Pictures at another size: bilinear, corners not aligned, low-passed before they are made smaller.

    Called with a tensor (B, C, H, W) or a list of (C, H, W). A picture that has its size already is handed on.

    Args:
        scale: of both sides, which are rounded to whole pixels.
        size: (height, width) of every picture, instead.

    Raises:
        ValueError: neither or both, or none above 0; what it is called with is no picture.
    """

    def __init__(self, scale: float | None = None, size: tuple[int, int] | None = None):
        if (scale is None) == (size is None):
            raise ValueError("give scale=, or size=(height, width), and not both")
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be (height, width) in pixels, got {size}")
        self.factor, self.size = scale, size

    def __call__(self, pictures: Any) -> Any:
        if isinstance(pictures, list | tuple):
            return type(pictures)(self(p) for p in pictures)
        if not isinstance(pictures, Tensor) or pictures.dim() not in (3, 4) or not pictures.is_floating_point():
            got = type(pictures).__name__
            if isinstance(pictures, Tensor):
                got = f"{pictures.dtype} {tuple(pictures.shape)}"
            raise ValueError(
                "scale= and size= of a Teacher are for floating pictures, (B, C, H, W) or a list of (C, H, W), got "
                f"{got}; use Teacher(..., feed=)"
            )
        before, after = tuple(pictures.shape[-2:]), self._after(*pictures.shape[-2:])
        if before == after:
            return pictures
        batch = pictures if pictures.dim() == 4 else pictures[None]
        smaller = after[0] < before[0] or after[1] < before[1]
        resized = interpolate(batch, size=after, mode="bilinear", align_corners=False, antialias=smaller)
        return resized if pictures.dim() == 4 else resized[0]

    def _after(self, height: int, width: int) -> tuple[int, int]:
        if self.factor is None:
            assert self.size is not None
            return self.size
        return max(1, round(height * self.factor)), max(1, round(width * self.factor))

    def scale_of(self, pictures: Any) -> float | None:
        """The sides of all these pictures, once resized, over what they are now; None: not one number for both sides
        of every picture, to 2 per cent."""
        if self.factor is not None:
            return self.factor
        assert self.size is not None
        each = pictures if isinstance(pictures, list | tuple) else [pictures]
        scales = [after / before for p in each for after, before in zip(self.size, p.shape[-2:], strict=True)]
        if not scales:
            return None
        return scales[0] if max(scales) <= 1.02 * min(scales) else None
