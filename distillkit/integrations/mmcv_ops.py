"""The compiled operators of mmcv, over torchvision's and ours, for where mmcv has none.

mmcv has no wheel with compiled operators for any current torch, and ``mmcv-lite`` has none at all, so that
``import mmdet.models`` fails for want of ``mmcv._ext``. ``stand_in()`` makes a module of that name. Its functions are
called as mmcv's Python calls the compiled ones: results are written into tensors that the caller has made. An operator
that is not here says so when it is called, not when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, logsigmoid
from torchvision.ops import deform_conv2d
from torchvision.ops import nms as box_nms
from torchvision.ops import roi_align as align

from distillkit.boxes.rotated import corners, smallest
from distillkit.boxes.rotated_iou import aligned_rotated_iou, pairwise_rotated_iou
from distillkit.boxes.rotated_nms import rotated_nms

# ---- suppression


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes kept, best first. ``offset`` 1: sides are counted in pixels, as x2 - x1 + 1."""
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)
    return box_nms(boxes.float(), scores.float(), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., arXiv:1704.04503): what overlaps a better box loses score instead of falling away.

    dets: (N, 5), written: boxes and lowered scores in the order in which they were taken. method: 0 the usual NMS, 1
    linear, ``1 - IoU`` from the threshold on; 2 Gaussian, ``exp(-IoU^2 / sigma)``. Returns the indices of those taken.
    """
    scores = scores.clone()
    size = boxes[:, 2:] - boxes[:, :2] + offset
    areas = size.prod(1)
    left = torch.arange(len(boxes))
    taken: list[Tensor] = []
    while len(left):
        best = left[scores[left].argmax()]
        dets[len(taken)] = torch.cat([boxes[best], scores[best, None]])
        taken.append(best)
        left = left[left != best]
        overlap = (
            torch.minimum(boxes[left, 2:], boxes[best, 2:]) - torch.maximum(boxes[left, :2], boxes[best, :2]) + offset
        )
        shared = overlap.clamp(min=0).prod(1)
        iou = shared / (areas[left] + areas[best] - shared)
        if method == 2:
            keeps = torch.exp(-iou.square() / sigma)
        else:
            keeps = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else torch.zeros_like(iou), 1)
        scores[left] *= keeps
        left = left[scores[left] >= min_score]
    return torch.stack(taken) if taken else left


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Boxes (N, 5) cx, cy, w, h and an angle in radians, clockwise: indices of those kept, best first."""
    return rotated_nms(dets[:, :5].float(), scores, labels.long() if multi_label else None, iou_threshold)


# ---- overlaps


def bbox_overlaps(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Overlaps (N,) of pairs, or (N, M) of all, over the union (mode 0) or the first box (mode 1)."""
    first, second = (boxes1, boxes2) if aligned else (boxes1[:, None], boxes2[None])
    corner = torch.minimum(first[..., 2:], second[..., 2:])
    shared = (corner - torch.maximum(first[..., :2], second[..., :2]) + offset).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2] + offset).prod(-1) for b in (first, second)]
    over = areas[0] if mode else areas[0] + areas[1] - shared
    ious.copy_(shared / over)


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Overlaps (N,) of pairs, or (N * M,) of all, over the union (mode 0) or the first box (mode 1)."""
    measure = aligned_rotated_iou if aligned else pairwise_rotated_iou
    ious.copy_(measure(boxes1.float(), boxes2.float(), "first" if mode_flag else "union").flatten())


def diff_iou_rotated_sort_vertices_forward(vertices: Tensor, mask: Tensor, num_valid: Tensor) -> Tensor:
    """The corners of the polygon that two boxes share, in order.

    Args:
        vertices: (B, N, M, 2) from the polygon's middle: 8 corners of the boxes, then where their sides cross.
        mask: (B, N, M) bool, which of them are the polygon's. Those of the last M - 8 that are not must be 0.

    Returns:
        (B, N, M + 1) int32 indices: the polygon's by their angle, its first again, and then one that is not the
        polygon's. The compiled operator returns 9, and leaves out what is more, as corners that coincide count twice.
    """
    angle = torch.atan2(vertices[..., 1], vertices[..., 0]).masked_fill(~mask, torch.inf)
    order = angle.argsort(-1)
    order = torch.cat([order, order[..., :1]], -1)
    place = torch.arange(order.shape[-1], device=order.device)
    count = num_valid[..., None]
    order = torch.where(place == count, order[..., :1], order)
    nothing = 8 + mask[..., 8:].int().argmin(-1, keepdim=True)
    return torch.where((place > count) | (count == 0), nothing, order).int()


def min_area_polygons(pointsets: Tensor, polygons: Tensor) -> None:
    """The smallest rectangle around each set of nine points: (N, 18) x and y in turn -> corners (N, 8)."""
    for points, polygon in zip(pointsets, polygons, strict=True):
        polygon.copy_(corners(smallest(points.view(-1, 2))).flatten())


# ---- losses


def sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (Lin et al., arXiv:1708.02002) of logits (N, C); target (N,) is a class, or C for none."""
    one, p = _one_hot(logits, target, weight)
    positive = -alpha * (1 - p) ** gamma * logsigmoid(logits)
    negative = -(1 - alpha) * p**gamma * logsigmoid(-logits)
    output.copy_(torch.where(one, positive, negative))


def sigmoid_focal_loss_backward(
    logits: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Its derivative by the logits."""
    one, p = _one_hot(logits, target, weight)
    positive = alpha * (1 - p) ** gamma * (gamma * p * logsigmoid(logits) - (1 - p))
    negative = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * logsigmoid(-logits))
    grad_input.copy_(torch.where(one, positive, negative))


def _one_hot(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a column is its row's class, and the probabilities."""
    if weight.numel():
        raise NotImplementedError(
            f"sigmoid_focal_loss with a weight a class is not in distillkit's stand-in for mmcv._ext. {_REMEDY}"
        )
    return target[:, None] == torch.arange(logits.shape[1], device=logits.device), logits.sigmoid()


# ---- sampling


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """rois: (K, 5), picture, x1, y1, x2, y2. Only the mean over a bin's samples (``pool_mode`` 1, "avg")."""
    _only_mean(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(align(input, rois.to(input), size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    _only_mean(pool_mode)
    size = (aligned_height, aligned_width)

    def aligned_maps(maps: Tensor) -> Tensor:
        return align(maps, rois.to(maps), size, spatial_scale, sampling_ratio, aligned)

    # linear in the maps: their values do not matter
    grad_input.add_(_gradients(aligned_maps, [torch.zeros_like(grad_input)], grad_output)[0])


def _only_mean(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            f"roi_align with pool_mode='max' is not in distillkit's stand-in for mmcv._ext; 'avg' is. {_REMEDY}"
        )


def roi_align_rotated_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """rois: (K, 6), picture, cx, cy, w, h and an angle in radians, clockwise in the picture or the other way round."""
    size = (pooled_height, pooled_width)
    output.copy_(_align_rotated(input, rois.to(input), size, spatial_scale, sampling_ratio, aligned, clockwise))


def roi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    size = (pooled_height, pooled_width)

    def aligned_maps(maps: Tensor) -> Tensor:
        return _align_rotated(maps, rois.to(maps), size, spatial_scale, sampling_ratio, aligned, clockwise)

    # linear in the maps: their values do not matter
    grad_input.add_(_gradients(aligned_maps, [torch.zeros_like(grad_input)], grad_output)[0])


def _align_rotated(
    maps: Tensor,
    rois: Tensor,
    size: tuple[int, int],
    scale: float,
    ratio: int,
    aligned: bool,
    clockwise: bool,
) -> Tensor:
    """(B, C, H, W), (K, 6) -> (K, C, *size): the mean of ``ratio`` times ``ratio`` samples a bin, as many as a bin has
    cells where that is 0."""
    found = maps.new_zeros(len(rois), maps.shape[1], *size)
    boxes = rois[:, 1:] * rois.new_tensor([scale, scale, scale, scale, 1 if clockwise else -1])
    if not aligned:  # as it was: no region is smaller than a cell, and cells begin at their middle
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:4].clamp(min=1), boxes[:, 4:]], 1)
    bins = boxes[:, 2:4].flip(1) / boxes.new_tensor(size)  # (K, 2) height and width
    samples = torch.full_like(bins, ratio).long() if ratio > 0 else bins.ceil().long().clamp(min=1)
    groups = torch.cat([rois[:, :1].long(), samples], 1)
    for picture, rows, columns in torch.unique(groups, dim=0).tolist():
        where = (groups == groups.new_tensor([picture, rows, columns])).all(1).nonzero()[:, 0]
        x, y = _sample_points(boxes[where], (size[0] * rows, size[1] * columns))
        read = _bilinear(maps[picture], x - 0.5 * aligned, y - 0.5 * aligned)  # (C, k, rows, columns)
        means = read.unflatten(3, (size[1], columns)).unflatten(2, (size[0], rows)).mean((3, 5))
        found = found.index_put((where,), means.transpose(0, 1))
    return found


def _sample_points(boxes: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """x and y of the middles of a grid over each box: (k, 5), (rows, columns) -> twice (k, rows, columns)."""
    shares = [(torch.arange(n, device=boxes.device, dtype=boxes.dtype) + 0.5) / n - 0.5 for n in grid]
    down, right = torch.meshgrid(*shares, indexing="ij")
    x, y, w, h, angle = boxes[:, :, None, None].unbind(1)
    along, across = w * right, h * down
    return x + along * angle.cos() - across * angle.sin(), y + along * angle.sin() + across * angle.cos()


def _bilinear(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(C, H, W) at cells x, y (k, h, w) -> (C, k, h, w); up to a cell outside as at the rim, 0 further out."""
    height, width = maps.shape[-2:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1).flatten(0, 1)
    read = grid_sample(maps[None], grid[None], padding_mode="border", align_corners=False)[0]
    return read.view(maps.shape[0], *x.shape) * inside


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., arXiv:2010.04159, equation 3).

    Args:
        value: (B, cells of all levels, M heads, D).
        value_spatial_shapes: (L, 2) height and width of each level.
        sampling_locations: (B, Q, M, L, P, 2) x and y, 0..1 from border to border of a level.
        attention_weights: (B, Q, M, L, P).

    Returns (B, Q, M * D).
    """
    sizes = value_spatial_shapes.tolist()
    batch, queries, heads, _, points, _ = sampling_locations.shape
    levels = value.split([height * width for height, width in sizes], 1)
    total: Tensor | float = 0.0
    for level, (maps, (height, width)) in enumerate(zip(levels, sizes, strict=True)):
        grid = maps.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        places = sampling_locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        sampled = grid_sample(grid, 2 * places - 1, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights = attention_weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (sampled * weights).sum(-1)  # (B * M, D, Q)
    assert isinstance(total, Tensor)
    return total.view(batch, -1, queries).transpose(1, 2).contiguous()


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    def attend(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_forward(
            value, value_spatial_shapes, value_level_start_index, places, weights, im2col_step
        )

    found = _gradients(attend, [value, sampling_locations, attention_weights], grad_output)
    for into, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), found, strict=True):
        into.add_(gradient)


# ---- deformable convolution (Dai et al., arXiv:1703.06211; modulated: Zhu et al., arXiv:1811.11168)


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **how: int
) -> None:
    """offset: (B, 2 * deformable groups * kh * kw, H, W), y and x in turn."""
    output.copy_(deform_conv2d(input, offset, weight, None, *_steps(how)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **how: int,
) -> None:
    def convolve(input: Tensor, offset: Tensor) -> Tensor:
        return deform_conv2d(input, offset, weight, None, *_steps(how))

    for into, gradient in zip(
        (grad_input, grad_offset), _gradients(convolve, [input, offset], grad_output), strict=True
    ):
        into.add_(gradient)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float = 1.0,
    **how: int,
) -> None:
    def convolve(weight: Tensor) -> Tensor:
        return deform_conv2d(input, offset, weight, None, *_steps(how))

    # linear in the weight: its values do not matter
    grad_weight.add_(_gradients(convolve, [torch.zeros_like(grad_weight)], grad_output)[0], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **how: int,
) -> None:
    """mask: (B, deformable groups * kh * kw, H, W), a factor for every sample."""
    output.copy_(deform_conv2d(input, offset, weight, bias if with_bias else None, *_steps(how), mask))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **how: int,
) -> None:
    def convolve(input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(input, offset, weight, None, *_steps(how), mask)

    found = _gradients(convolve, [input, weight, offset, mask], grad_output)
    for into, gradient in zip((grad_input, grad_weight, grad_offset, grad_mask), found, strict=True):
        into.add_(gradient)
    if with_bias:
        grad_bias.add_(grad_output.sum((0, 2, 3)))


def _steps(how: dict[str, int]) -> tuple[tuple[int, int], ...]:
    """Stride, padding and dilation, (y, x) each, by either of the names that mmcv's two convolutions give them."""
    if "dH" in how:
        names = (("dH", "dW"), ("padH", "padW"), ("dilationH", "dilationW"))
    else:
        names = (("stride_h", "stride_w"), ("pad_h", "pad_w"), ("dilation_h", "dilation_w"))
    return tuple((how[y], how[x]) for y, x in names)


def _gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """The function again, with its graph this time: mmcv's backward functions are given no graph."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        output = function(*inputs)
    return torch.autograd.grad(output, inputs, grad_output)


# ---- the module

_REMEDY = "Install a compiled mmcv that fits your torch, where there is one, or a config without this operator"

OPS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms,
        softnms,
        nms_rotated,
        bbox_overlaps,
        box_iou_rotated,
        diff_iou_rotated_sort_vertices_forward,
        min_area_polygons,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        roi_align_forward,
        roi_align_backward,
        roi_align_rotated_forward,
        roi_align_rotated_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
    )
}


class StandIn(ModuleType):
    """``mmcv._ext`` with the operators of ``OPS``; every other name is a function that raises NotImplementedError."""

    def __init__(self) -> None:
        super().__init__("mmcv._ext", "distillkit's stand-in for the compiled operators of mmcv")
        self.__spec__ = ModuleSpec("mmcv._ext", None)
        self.__dict__.update({name: torch.no_grad()(op) for name, op in OPS.items()})
        self.get_compiler_version = lambda: "none (distillkit's stand-in for mmcv._ext)"
        self.get_compiling_cuda_version = lambda: "none (distillkit's stand-in for mmcv._ext)"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(
                f"the operator {name!r} of mmcv is not in distillkit's stand-in for mmcv._ext, which has "
                f"{', '.join(OPS)}. {_REMEDY}"
            )

        missing.__name__ = name
        return missing
