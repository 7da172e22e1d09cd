"""Token labelling, with MixToken. Jiang et al., "All Tokens Matter", arXiv:2104.10858."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from distillkit.adapters.classifier import MixPlace, mix_place
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import TokenLogits
from distillkit.data.label_map import LabelMap, pooled
from distillkit.distillers.classes import hard_labels
from distillkit.losses.mix_token import draw_box, mix, realised
from distillkit.losses.token_labels import Fill, smoothed, soft_targets, token_label_loss

Source = Literal["teacher", "maps", "labels"]


class TokenLabeling(Distiller):
    """Teach every token what an annotator says of its place, and the class token what it says of the view.

        loss = CE(class token, image label) + dense_weight * mean over tokens of CE(token, its label)

    It holds the task's own loss: wrap the student without ``criterion``, and call the wrapped model with the targets
    last, ``model(pictures, targets)``. Any classifier of timm can be the student: one with an ``aux_head`` (VOLO,
    LV-ViT, Refiner) learns with that, any other with its classifier applied to each token.

    Args:
        source: where the labels come from. ``teacher``: an annotator, a classifier of the same classes that runs on the
            same views and is asked about every cell of its last map. ``maps``: stored label maps; targets are then
            {"labels": (B,), "label_map": a ``LabelMap`` a picture}, and there is no teacher. ``labels``: the class of
            the picture for every token, and no teacher; with ``dense_weight=0`` ordinary training with MixToken.
        dense_weight: 0.5, as in the paper and in VOLO; the published commands of TokenLabeling train with 1.
        mix_token: swap a box of tokens between pictures i and B - 1 - i behind the patch embedding, with another box in
            every step, and swap their predictions back; image labels are mixed by area. What the student predicts in
            training is then of mixtures: no criterion and no other distiller can stand beside this one.
        mix_at: module path of the patch embedding.
        ground_truth: blend the class labels into the image labels (``losses.token_labels.blended``), as VOLO does when
            it is fine-tuned.
        smoothing: of all labels.
        fill: logit of classes that a label map does not hold, as in ``losses.token_labels.dense_logits``.
        convention: ``default``; ``release``: x and y of every crop exchanged in label maps, rows of targets that sum to
            1 + smoothing / C, unstored classes at 0, and dense_weight 1 unless given, as the published models were
            trained.
        weight, teacher, name: as in ``Distiller``.

    Reads:
        ``TokenLogits`` of the student, and of the teacher where that is the source. Targets: the class of every
        picture (B,), or a mapping with ``labels``.

    Raises:
        ValueError: mixed (soft) labels, as mixup and CutMix make them: MixToken takes their place; label maps that are
            missing or of other classes; a student without a patch embedding, for ``mix_token``.
    """

    reads = TokenLogits
    reads_labels = True
    short_name = "token_labeling"
    is_task = True

    def __init__(
        self,
        source: Source = "teacher",
        dense_weight: float | None = None,
        mix_token: bool = True,
        mix_at: str = "patch_embed",
        ground_truth: bool = False,
        smoothing: float = 0.1,
        fill: Fill | None = None,
        convention: Literal["default", "release"] = "default",
        weight: float | Weight = 1.0,
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        if source not in ("teacher", "maps", "labels"):
            raise ValueError(f"source must be 'teacher', 'maps' or 'labels', got {source!r}")
        if convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        released = convention == "release"
        self.source = source
        self.taught_by_targets = source != "teacher"
        self.dense_weight = dense_weight if dense_weight is not None else 1.0 if released else 0.5
        self.mix_token, self.mix_at = mix_token, mix_at
        self.ground_truth = ground_truth
        self.smoothing = smoothing
        self.fill: Fill = fill or ("zero" if released else "auto")
        self.convention = convention
        self._box: Tensor | None = None

    def changes(self, student: nn.Module) -> Mapping[str, Callable[[Tensor], Tensor]]:
        if not self.mix_token:
            return {}
        place = mix_place(student, self.mix_at)
        return {self.mix_at: lambda tokens: self._mixed(tokens, place)}

    def forget(self) -> None:
        self._box = None

    def _mixed(self, tokens: Tensor, place: MixPlace) -> Tensor:
        grid = place.grid_of(tokens)
        self._box = draw_box((grid[0] // place.scale, grid[1] // place.scale), device=tokens.device)
        return mix(tokens, self._box * place.scale, place.layout, grid)

    def forward(self, student: TokenLogits, teacher: TokenLogits | None, targets: Any) -> Tensor:
        box, self._box = self._box, None
        classes, tokens = student.classes, student.tokens
        if classes is None:
            raise ValueError("the student's output holds no class logits (B, C): give an adapter that finds them")
        lam: float | Tensor = 1.0
        if box is not None:
            tokens, lam = mix(tokens, box, "bnc", student.grid), realised(box, student.grid)
        labels = hard_labels(targets, classes)
        truth = smoothed(labels, classes.shape[1], self.smoothing)
        if self.source == "labels":
            return token_label_loss(classes, tokens, truth, lam=lam, dense_weight=self.dense_weight).total
        image, dense, known = self._taught(student, teacher, targets)
        soft = soft_targets(image, dense, labels, self.smoothing, normalized=self.convention == "default")
        return token_label_loss(
            classes,
            tokens,
            soft.image,
            soft.tokens,
            ground_truth=truth if self.ground_truth else None,
            lam=lam,
            dense_weight=self.dense_weight,
            token_weight=known,
        ).total

    @torch.no_grad()
    def _taught(
        self, student: TokenLogits, teacher: TokenLogits | None, targets: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The annotator's logits of the views (B, C) and of the student's tokens (B, C, h, w), and how much of each
        token has a label, (B, N)."""
        if teacher is not None:
            cells = teacher.tokens.float().transpose(1, 2).unflatten(2, teacher.grid)
            return cells.mean((2, 3)), whole_view(cells, student.grid), None
        maps = targets.get("label_map") if isinstance(targets, Mapping) else None
        if not isinstance(maps, Sequence) or not all(isinstance(m, LabelMap) for m in maps):
            raise ValueError(
                'source="maps" reads label maps: call model(pictures, {"labels": ..., "label_map": [a LabelMap a '
                "picture]})"
            )
        found = pooled(
            maps, student.tokens.shape[2], student.grid, self.fill, self.convention, device=student.tokens.device
        )
        return found.image, found.tokens, found.known.flatten(1)


def whole_view(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (B, C, h, w) on another grid over the same view, as RoIAlign pools it: (B, C, *grid)."""
    height, width = cells.shape[2:]
    box = cells.new_tensor([[0, 0, width, height]])
    return roi_align(cells, [box] * len(cells), grid, aligned=True)
