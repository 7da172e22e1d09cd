"""What the adapters of dense detectors share: targets in torchvision's form, and the proof of what is tapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distillkit.boxes.iou import check_boxes
from distillkit.core.adapter import Adapter, input_name
from distillkit.core.errors import AdapterError, ViewError
from distillkit.core.taps import Place
from distillkit.core.views import BoxTargets, DenseDetections, View

LOOKED_AT = 50  # predictions of one picture that the proof compares
PIXELS, SCORE = 0.1, 1e-3  # how far a box's edge and its score may be from what is tapped
HALF = 2**-7  # the same in half precision: of the box's largest coordinate, and of a score


class DenseHead(Adapter):
    """A detector that is called as torchvision's are, and whose predicted boxes are those of single anchors.

    A subclass says where ``DenseDetections`` are (``places``, ``view``) and how their boxes are decoded (``boxes``).
    """

    #: numbers of a box
    columns = 4
    #: where the class logits are tapped, for messages
    classes: Place

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> BoxTargets | None:
        """Ground truth from torchvision's form, a list of dict(boxes, labels).

        Raises ValueError for a box that is not finite or has no area (looked at on the CPU only).
        """
        rows = super().targets(args, kwargs, given)
        if rows is None:
            return None
        if not isinstance(rows, Sequence) or not all(
            isinstance(row, Mapping) and "boxes" in row and "labels" in row for row in rows
        ):
            form = "(k, 4) x1 y1 x2 y2" if self.columns == 4 else "(k, 5) cx cy w h angle"
            raise ViewError(f"targets: expected a list of dict(boxes {form}, labels (k,)), one a picture")
        for i, row in enumerate(rows):
            if row["boxes"].shape[1:] != (self.columns,):
                raise ViewError(
                    f"target {i}: boxes are {tuple(row['boxes'].shape)}, this head's are (k, {self.columns}); "
                    "upright objects need an upright detector, rotated ones a rotated one"
                )
            check_boxes(i, row["boxes"])
        return BoxTargets(
            [r["boxes"] for r in rows], [r["labels"] for r in rows], self.sizes(pictures_of(args, kwargs))
        )

    def sizes(self, pictures: Any) -> list[tuple[int, int]]:
        """(height, width) of every picture of a call, in the pixels that its boxes are in."""
        return [(p.shape[-2], p.shape[-1]) for p in pictures]

    def boxes(self, view: DenseDetections) -> Tensor:
        """Every anchor's box as the detector decodes it: (B, N, columns)."""
        raise NotImplementedError

    def unexplained(
        self,
        view: DenseDetections,
        predicted: Tensor,
        image: int,
        size: tuple[int, int],
        distance: Tensor,
        allowed: Tensor,
    ) -> str:
        """What is said where a predicted box is none of ``boxes``.

        Args:
            predicted: (P, columns) of picture ``image``, whose (height, width) is ``size``.
            distance: (P, N) pixels from every anchor's box; allowed: (P,).
        """
        raise NotImplementedError

    def needs_proof(self, kind: type[View]) -> bool:
        return kind is DenseDetections

    def proof(self, view: View, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Every predicted box must be one decoded from what is tapped, with the tapped probability of its class."""
        assert isinstance(view, DenseDetections)
        predictions = predictions_of(output)
        sizes = self.sizes(pictures_of(args, kwargs))
        half = view.classes.levels[0].dtype in (torch.float16, torch.bfloat16)
        boxes, probabilities = self.boxes(view), _probabilities(view)
        seen = 0
        for i, (row, size) in enumerate(zip(predictions, sizes, strict=True)):
            predicted = row["boxes"][:LOOKED_AT].to(boxes)
            if not len(predicted):
                continue
            seen += len(predicted)
            allowed = PIXELS + (HALF * predicted.abs().amax(1) if half else torch.zeros_like(predicted[:, 0]))
            distance = self.distances(predicted, boxes[i], size)
            if not bool((distance.amin(1) <= allowed).all()):
                raise AdapterError(self.unexplained(view, predicted, i, size, distance, allowed))
            explains = distance <= allowed[:, None]
            self._check_scores(row, i, probabilities[i], explains, 2 * HALF if half else SCORE)
        return seen > 0

    def distances(self, predicted: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Predicted boxes (P, columns) to decoded ones (N, columns): (P, N) pixels, the largest of a box's sides.

        size: (height, width) of the picture, to which both are clipped here, as detectors clip.
        """
        height, width = size
        limit = boxes.new_tensor([width, height, width, height])
        clipped = torch.minimum(boxes.clamp(min=0), limit)
        predicted = torch.minimum(predicted.clamp(min=0), limit)
        return torch.cdist(predicted, clipped, p=float("inf"))

    def _check_scores(
        self, row: Mapping[str, Tensor], image: int, probabilities: Tensor, explains: Tensor, allowed: float
    ) -> None:
        """probabilities: (N, C) of every anchor. explains: (P, N), whether an anchor has the predicted box."""
        scores, labels = row["scores"][:LOOKED_AT].to(probabilities), row["labels"][:LOOKED_AT].long()
        classes = probabilities.shape[1]
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise AdapterError(
                f"the detector predicts label {labels.max().item()} in picture {image}, and "
                f"{', '.join(self.classes.paths)} has {classes} classes: name the layer of the class logits, one "
                "channel a label"
            )
        tapped = probabilities[:, labels].T  # (P, N)
        error = (tapped - scores[:, None]).abs().masked_fill(~explains, torch.inf).amin(1)
        if not bool((error <= allowed).all()):
            raise AdapterError(
                f"the tapped class logits do not explain the detector's own scores: one of picture {image} is "
                f"{error.max().item():.3f} from the class probability by {', '.join(self.classes.paths)} of its label, "
                "at the anchor of its box. Name the layer before the sigmoid, one channel a label. A head that "
                "multiplies its class probabilities by something, as GFLv2 by a quality, needs an adapter that gives "
                "the view's scores="
            )


def pictures_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs[input_name(kwargs)]


def predictions_of(output: Any) -> Sequence[Mapping[str, Tensor]]:
    """The predicted boxes, scores and labels of each picture, best first."""
    if not isinstance(output, Sequence) or not all(
        isinstance(row, Mapping) and {"boxes", "scores", "labels"} <= row.keys() for row in output
    ):
        raise AdapterError(
            f"in eval mode the detector returns {type(output).__name__}; "
            "to prove the taps, expected [dict(boxes, scores, labels)], one a picture, in pixels of the picture given"
        )
    return output


def _probabilities(view: DenseDetections) -> Tensor:
    """Every anchor's class probabilities: (B, N, C)."""
    return view.classes.all().float().sigmoid() if view.scores is None else view.scores.all().float()
