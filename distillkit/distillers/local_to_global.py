"""Local-to-global attention transfer (L2G). Jiang et al., arXiv:2204.03206."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, multilabel_soft_margin_loss, one_hot

from distillkit.boxes.precision import at_least_float32
from distillkit.core.adapter import Adapter, input_name
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.teacher import OnlineTeacher
from distillkit.core.views import ActivationMaps
from distillkit.losses.local_to_global import at_boxes, cut, draw_boxes, local_targets, transfer_loss

Saliency = Literal["targets"] | Callable[[Tensor], Tensor]


class Crops(NamedTuple):
    """Of one step: boxes (B, N, 4), the (height, width) of pictures and crops, and saliency maps where they came from a
    function of the pictures, (B, 1, H, W)."""

    boxes: Tensor
    picture: tuple[int, int]
    crop: tuple[int, int]
    saliency: Tensor | None


class LocalToGlobal(Distiller):
    """Teach a network that sees the whole picture the attention of one that sees crops of it, trained in the same step.

        loss = weight * mean((softmax(maps of the student at the crop) - what the local network finds there)^2)

    The local network learns to classify the crops, each with all labels of its picture; its maps become the target
    (``losses.local_to_global.local_targets``). The student, the global network, learns from that alone: leave out
    ``criterion``, as a classification loss shrinks its attention to what tells classes apart best (the paper's
    ablation). ``wrap(student, distillers=[LocalToGlobal()])``, called as ``model(pictures, labels)``. Any classifier
    whose last map has cells can be either: see ``ActivationMaps``.

    Args:
        local: the local network; None: a copy of the student with its (pretrained) weights, as in the paper. It is
            optimised, reduced and saved with the wrapped model, and not with the student; its loss is named after
            ``teacher``.
        crops: N of each picture.
        share: side of a crop as a share of the picture's: 320 of 448 pixels in the paper. Crops are not rescaled.
        corners: the first four crops are the corners, as in the published training on VOC.
        saliency: None: attention transfer alone. ``targets``: shape transfer with the maps that come with the targets,
            {"labels": (B, C), "saliency": (B, 1, H, W) in 0..1}. Where some pictures have none, "has_saliency" (B,)
            says which have, and those without are taught attention alone. A function of the student's pictures
            that gives such maps: from any model (``adapters.saliency.SaliencyModel``).
        threshold, empty_saliency: see ``losses.local_to_global.local_targets``.
        soft_background: as there: the COCO script's; not with ``saliency=None``.
        convention: ``default``: crops are taken uniformly from all places, and a cell of the crop is compared with the
            same place of the picture. ``release``: the last place is never drawn, the student's maps are read half a
            cell further right and down (RoIAlign with ``aligned=False``), and crops without saliency have a foreground
            of 0 (``empty_saliency="zero"`` unless given).
        student_at, local_at: module path of the maps (B, K, h, w) on either side; None: where the adapter knows.
        local_adapter: of a local network that distillkit does not know; the student's otherwise.
        weight: 10, as published for VOC; 30 for COCO, whose 81 channels share the mean.
        teacher, name: as in ``Distiller``; ``teacher`` names the local network.

    Reads:
        ``ActivationMaps`` of both. Targets: labels (B, C) of several classes a picture, 0 or 1, or the class of every
        picture, int64 (B,); or a mapping with ``labels``, and ``saliency`` where that is asked for.

    The loss is a mean over crops, so it keeps its size at any batch and number of ranks.

    Raises:
        ValueError: crops that do not fit; labels or saliency that are missing or of other sizes.
    """

    reads = ActivationMaps
    short_name = "local_to_global"
    is_task = True

    def __init__(
        self,
        local: nn.Module | None = None,
        crops: int = 4,
        share: float = 5 / 7,
        corners: bool = False,
        saliency: Saliency | None = None,
        threshold: float = 0.1,
        soft_background: bool = False,
        empty_saliency: Literal["attention", "zero"] | None = None,
        convention: Literal["default", "release"] = "default",
        student_at: str | None = None,
        local_at: str | None = None,
        local_adapter: Adapter | None = None,
        weight: float | Weight = 10.0,
        teacher: str = "local",
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        if crops < 1 or not 0 < share <= 1:
            raise ValueError(f"crops must be at least 1 and share in (0, 1], got {crops} and {share}")
        if convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
        if saliency is not None and saliency != "targets" and not callable(saliency):
            raise ValueError(f"saliency must be None, 'targets' or a function of the pictures, got {saliency!r}")
        released = convention == "release"
        self.crops, self.share, self.corners = crops, share, corners
        # a function that is a module would become part of what is trained
        self._saliency = (saliency,)
        self.threshold, self.soft_background = threshold, soft_background
        self.empty_saliency: Literal["attention", "zero"] = empty_saliency or ("zero" if released else "attention")
        self.convention = convention
        self.student_at, self.teacher_at = student_at, local_at
        self._local = OnlineTeacher(local, classification_loss, self._crop, self._repeated, local_adapter)
        self._drawn: Crops | None = None

    def own_teacher(self) -> OnlineTeacher:
        """The local network that ``wrap`` takes in."""
        return self._local

    def forget(self) -> None:
        self._drawn = None

    def _crop(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The student's call with crops of its pictures, (B * N, 3, h, w); where they lie is kept until ``forward``."""
        key = None if args else input_name(kwargs)
        pictures = args[0] if key is None else kwargs[key]
        if not isinstance(pictures, Tensor) or pictures.dim() != 4:
            raise ValueError(
                f"expected a batch of pictures (B, 3, H, W) to take crops from, got {type(pictures).__name__}"
            )
        height, width = pictures.shape[2:]
        size = (height, width)
        crop = (max(1, round(height * self.share)), max(1, round(width * self.share)))
        boxes = draw_boxes(len(pictures), self.crops, size, crop, self.corners, self.convention, pictures.device)
        (saliency,) = self._saliency
        self._drawn = Crops(boxes, size, crop, saliency(pictures) if callable(saliency) else None)
        crops = cut(pictures, boxes, crop)
        return ((crops, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: crops})

    def _repeated(self, targets: Any) -> Tensor:
        """The labels of every crop: those of its picture."""
        return labels_in(targets).repeat_interleave(self.crops, 0)

    def forward(self, student: ActivationMaps, teacher: ActivationMaps, targets: Any) -> Tensor:
        drawn, self._drawn = self._drawn, None
        assert drawn is not None  # the local network ran before
        labels = labels_in(targets)
        if student.classes != teacher.classes:
            raise ValueError(
                f"the local network has {teacher.classes} classes, the student {student.classes}: both need those of "
                "the labels"
            )
        if labels.dim() == 1:
            labels = one_hot(labels, student.classes)
        saliency = self._maps(drawn, targets)
        known = targets.get("has_saliency") if self._saliency == ("targets",) else None
        target = local_targets(
            teacher.maps,
            labels.repeat_interleave(self.crops, 0),
            teacher.background,
            None if saliency is None else cut(saliency, drawn.boxes, drawn.crop),
            self.threshold,
            self.soft_background,
            self.empty_saliency,
            None if known is None else known.repeat_interleave(self.crops, 0),
        )
        size = (target.shape[2], target.shape[3])
        seen = at_boxes(at_least_float32(student.maps), drawn.boxes, drawn.picture, size, self.convention == "default")
        return transfer_loss(seen, target)

    def _maps(self, drawn: Crops, targets: Any) -> Tensor | None:
        """Saliency maps of the step's pictures."""
        (asked,) = self._saliency
        if asked is None:
            return None
        saliency = drawn.saliency
        if asked == "targets":
            saliency = targets.get("saliency") if isinstance(targets, Mapping) else None
        if not isinstance(saliency, Tensor):
            raise ValueError(
                'saliency="targets" reads maps (B, 1, H, W) that come with the targets: call model(pictures, '
                '{"labels": ..., "saliency": ...}), or set saliency=None for attention transfer'
            )
        wanted = (len(drawn.boxes), 1, *drawn.picture)
        if saliency.shape != wanted:
            raise ValueError(
                f"saliency maps are {tuple(saliency.shape)}, expected {wanted}: one of each picture's size"
            )
        return saliency


def labels_in(targets: Any) -> Tensor:
    """Targets, or the ``labels`` among them: (B, C), or classes (B,); ValueError for anything else."""
    labels = targets.get("labels") if isinstance(targets, Mapping) else targets
    if isinstance(labels, Tensor) and (labels.dim() == 2 or (labels.dim() == 1 and not labels.is_floating_point())):
        return labels
    got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise ValueError(
        "this loss needs the labels of every picture: (B, C) of 0 and 1, or the one class of each, integers (B,); "
        f"got {got}"
    )


def classification_loss(output: Any, labels: Tensor) -> Tensor:
    """Of logits (B, C): binary cross entropies, their mean over classes and pictures, for labels (B, C); cross entropy
    for classes (B,). In float32 at least."""
    logits = at_least_float32(output[0] if isinstance(output, tuple) else output)
    if labels.dim() == 1:
        return cross_entropy(logits, labels)
    if logits.shape != labels.shape:
        raise ValueError(
            f"the local network gives logits {tuple(logits.shape)} of the crops, whose labels are "
            f"{tuple(labels.shape)}: it needs the classes of the labels, as the student does"
        )
    return multilabel_soft_margin_loss(logits, labels.to(logits.dtype))
