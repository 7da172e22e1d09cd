"""Models of Hugging Face's transformers: image classifiers, text encoders, detectors with queries, segmentation.

They are called by name, ``model(pixel_values=..., labels=...)``, and compute their own loss where labels are given.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from distillkit.adapters.segmenter import Segmenter, is_segmenter
from distillkit.boxes.queries import corners, decode_around
from distillkit.core.adapter import AS_LOADED, Adapter, Norm
from distillkit.core.errors import AdapterError, ViewError
from distillkit.core.pictures import Resize
from distillkit.core.taps import Place, module_name
from distillkit.core.views import QueryDetections, View

#: how far a box that is decoded from the tapped distributions may be from the model's own, in shares of the picture
APART, APART_HALF = 1e-3, 2e-2
#: what a call's targets are called beside names with "label" in them
POSITIONS = ("start_positions", "end_positions")


#: detectors that mask what is padded, and say boxes in shares of what is not; the others' are of the padded picture
MASKING = ("detr", "conditional_detr", "deformable_detr", "table-transformer", "dab-detr")
#: detectors whose image processors do not normalise
UNNORMALISED = ("rt_detr", "rt_detr_v2", "d_fine", "deim", "deimv2")
#: pictures of a batch are padded to a multiple of this, the coarsest stride of a backbone
MULTIPLE = 32


def transformers_model(model: nn.Module) -> TransformersModel:
    """The adapter of a model, by its class."""
    return TransformersSegmenter() if is_segmenter(model) else TransformersModel()


class TransformersModel(Adapter):
    """Classifiers and text encoders by their ``logits`` (B, C), detectors by the boxes and logits of their queries.

    Hidden states and attentions are ``Features``, read by module path, as in ``student_at="vit.layers.1"``. Attention
    weights are computed by models with ``attn_implementation="eager"`` alone, and are then the second element that an
    attention module returns: ``"vit.layers.1.attention[1]"``.

    Args:
        mean, std: as ``Adapter``; transformers keeps them in its image processors, where a model does not see them.

    Attributes:
        score, most: what ``detections`` keeps of a picture: boxes with this score at least, and so many.
    """

    score, most = 0.0, 100
    form = "model(pixel_values=..., labels=...)"

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        for path in at or ():
            _check_attention(model, path)
        if kind is not QueryDetections:
            return super().places(model, kind, at)
        if at:
            raise ViewError(
                f"{type(model).__name__}: the queries' logits and boxes are read from its output; leave out the path "
                f"{at[0]!r}"
            )
        return ()

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        return _queries(model, output) if kind is QueryDetections else super().view(model, kind, tensors, output)

    def class_names(self, model: nn.Module) -> Sequence[str] | None:
        """``config.id2label``, unless it only counts: LABEL_0, LABEL_1, ..."""
        names = getattr(getattr(model, "config", None), "id2label", None) or {}
        if not names or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names.values()):
            return None
        return [str(names[i]) for i in sorted(names)]

    def with_pictures(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``pixel_mask``, where there is one, is resized along."""
        args, kwargs = super().with_pictures(args, kwargs, change)
        mask = kwargs.get("pixel_mask")
        if isinstance(change, Resize) and mask is not None:
            kwargs = {**kwargs, "pixel_mask": (change(mask[:, None].float())[:, 0] > 0.5).to(mask.dtype)}
        return args, kwargs

    def losses(self, output: Any) -> dict[str, Tensor]:
        if isinstance(output, Mapping):
            loss = output.get("loss")
            return {} if loss is None else {"task": loss}
        return super().losses(output)  # a tuple, of a call with return_dict=False

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> Any:
        """The ``labels`` of the call, or what else has "label" in its name, a dict of them where there are several. Of
        a text ``labels`` and ``attention_mask``, which tells padding."""
        if given is not None:
            return given
        found = {name: value for name, value in kwargs.items() if _is_target(name)}
        if kwargs.get("attention_mask") is not None and isinstance(kwargs.get("labels"), Tensor):
            return {"labels": kwargs["labels"], "attention_mask": kwargs["attention_mask"]}
        if len(found) > 1 and "labels" not in found:
            return found
        return found.get("labels", next(iter(found.values()), None))

    def without_targets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if not _is_target(name)}

    def call(self, model: nn.Module, pictures: Any, targets: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of a detector: pictures in one tensor, black below and to the right, and boxes in shares of a picture."""
        batch, mask, shares = _batch(model, pictures)
        mean, std = (batch.new_tensor(moment)[:, None, None] for moment in self.detector_norm(model))
        batch = (batch - mean) / std * mask[:, None]
        given = {"pixel_values": batch}
        if "pixel_mask" in inspect.signature(model.forward).parameters:
            given["pixel_mask"] = mask.long()
        if targets is None:
            return (), given
        labels = [
            {"class_labels": t["labels"], "boxes": _centred(t["boxes"]) / t["boxes"].new_tensor([w, h, w, h])}
            for t, (h, w) in zip(targets, shares, strict=True)
        ]
        return (), {**given, "labels": labels}

    def detector_norm(self, model: nn.Module) -> Norm:
        """(mean, std) of a detector's input: as it was told, else as this family's image processors have it."""
        if self.norm is not None:
            return self.norm
        kind = getattr(getattr(model, "config", None), "model_type", "")
        return AS_LOADED if kind in UNNORMALISED else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    @torch.no_grad()
    def detections(self, model: nn.Module, output: Any, pictures: Sequence[Tensor]) -> Any:
        """The most probable pairs of a query and a class, without suppression; of a model whose classes exclude each
        other the best class of every query."""
        view = _queries(model, output)
        logits = view.logits.float()
        classes = logits.shape[-1] - view.exclusive
        said = logits.softmax(-1)[..., :classes] if view.exclusive else logits.sigmoid()
        if view.exclusive:
            said = said * (said == said.amax(-1, keepdim=True))
        found = []
        _, _, shares = _batch(model, pictures)
        for probabilities, boxes, (h, w), picture in zip(said, view.boxes.float(), shares, pictures, strict=True):
            scores, places = probabilities.flatten().topk(min(self.most, probabilities.numel()))
            kept = (scores >= self.score) & (scores > 0)
            scores, places = scores[kept], places[kept]
            of = corners(boxes[places // classes]) * boxes.new_tensor([w, h, w, h])
            of = clip_boxes_to_image(of, (picture.shape[-2], picture.shape[-1]))
            found.append({"boxes": of, "scores": scores, "labels": places % classes})
        return found

    def widths(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> list[int] | None:
        """Attention weights, (B, heads, N, N), have no width that a projection could change."""
        return None if any("[1]" in path for path in at or ()) else super().widths(model, kind, at)

    def needs_proof(self, kind: type[View]) -> bool:
        return kind is QueryDetections

    def proof(self, view: View, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """The boxes that the model predicts are those of its distributions. Without these there is nothing to prove."""
        assert isinstance(view, QueryDetections)
        if view.edges is None:
            return True
        assert view.reference is not None
        assert view.support is not None
        decoded = decode_around(view.reference.float(), view.edges[-1], view.support.float())
        apart = (decoded - corners(view.boxes.float())).abs().max()
        half = view.boxes.dtype in (torch.float16, torch.bfloat16)
        if not bool(apart <= (APART_HALF if half else APART)):
            raise AdapterError(
                f"the distributions in the model's output do not explain its boxes, which are up to {apart.item():.3g} "
                "of the picture's side from those decoded: this version of transformers decodes otherwise than D-FINE "
                "does; use QueryKD without QueryLD on it and report it"
            )
        return True


class TransformersSegmenter(TransformersModel, Segmenter):
    """SegFormer, and others that are called ``...ForSemanticSegmentation``: ``PixelLogits``."""


def _batch(model: nn.Module, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Pictures of a detector in one tensor (B, 3, H, W); where they are (B, H, W) bool; and of each the (height, width)
    that its boxes are shares of."""
    sizes = [(p.shape[-2], p.shape[-1]) for p in pictures]
    height, width = (-(-max(side) // MULTIPLE) * MULTIPLE for side in zip(*sizes, strict=True))
    batch = pictures[0].new_zeros(len(pictures), 3, height, width)
    mask = torch.zeros(len(pictures), height, width, dtype=torch.bool, device=batch.device)
    for i, (picture, (h, w)) in enumerate(zip(pictures, sizes, strict=True)):
        batch[i, :, :h, :w] = picture
        mask[i, :h, :w] = True
    own = getattr(getattr(model, "config", None), "model_type", "") in MASKING
    return batch, mask, sizes if own else [(height, width)] * len(sizes)


def _centred(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 -> cx, cy, w, h."""
    first, last = boxes.split(2, 1)
    return torch.cat([(first + last) / 2, last - first], 1)


def _is_target(name: str) -> bool:
    return "label" in name or name == "targets" or name in POSITIONS


def _check_attention(model: nn.Module, path: str) -> None:
    """Raise ViewError for a path to attention weights that the model does not compute."""
    module = dict(model.named_modules()).get(module_name(path))
    how = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if "[1]" in path and "Attention" in type(module).__name__ and how not in (None, "eager"):
        raise ViewError(
            f"{type(model).__name__}: {path!r} would be attention weights, which are not computed by "
            f'attn_implementation={how!r}: load the model with attn_implementation="eager", or call '
            'model.set_attn_implementation("eager")'
        )


def _queries(model: nn.Module, output: Any) -> QueryDetections:
    """Of the model's output, less the queries for denoising, which are there in training and come first."""
    if not isinstance(output, Mapping) or output.get("logits") is None or output.get("pred_boxes") is None:
        got = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
        raise ViewError(
            f"{type(model).__name__}: expected 'logits' and 'pred_boxes' of queries in its output, got {got}; "
            "detections of queries are for models ...ForObjectDetection, called without return_dict=False"
        )
    config: Any = model.config
    denoising = output.get("denoising_meta_values")
    skip = 0 if denoising is None else denoising["dn_num_split"][0]
    logits, boxes = output["logits"][:, skip:], output["pred_boxes"][:, skip:]
    exclusive = logits.shape[-1] == config.num_labels + 1 or not getattr(config, "use_focal_loss", True)
    view = QueryDetections(logits, boxes, exclusive)
    distances, reference = output.get("intermediate_predicted_corners"), output.get("initial_reference_points")
    if distances is None or reference is None:
        return view
    decoder: Any = model.get_submodule("model.decoder")
    layers = distances[:, :, skip:].unflatten(-1, (4, decoder.max_num_bins + 1)).unbind(1)
    return QueryDetections(logits, boxes, exclusive, layers, reference[:, -1, skip:], support(decoder))


@torch.no_grad()
def support(decoder: Any) -> Tensor:
    """What D-FINE's bins mean, in sides of the reference box: (K,), increasing. Peng et al., arXiv:2410.13842.

    Fine around 0 and coarse further out: with a = up and c = reg_scale, W(n) / c is -2a, then 1 - r^i for
    i = K // 2 - 1 .. 1 and its mirror image, (r^i - 1) / c, around 0, then 2a; r^(K // 2 - 1) = a c + 1.
    """
    up, scale, bins = decoder.up.abs().float().reshape(()), decoder.reg_scale, decoder.max_num_bins
    scale = scale.abs().float().reshape(()) if isinstance(scale, Tensor) else abs(scale)
    ratio = (up * scale + 1) ** (2 / (bins - 2))
    steps = (ratio ** torch.arange(1, bins // 2, device=up.device) - 1) / scale
    end = (2 * up)[None]
    return torch.cat([-end, -steps.flip(0), torch.zeros_like(end), steps, end])
