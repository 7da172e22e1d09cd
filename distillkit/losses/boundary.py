"""The loss of a boundary map. Cao et al., FakeMix, arXiv:2103.13279, and Xie et al., TransLab, arXiv:2003.13948."""

from typing import Literal

from torch import Tensor

from distillkit.boxes.precision import at_least_float32

Activation = Literal["sigmoid", "none"]


def dice_loss(
    pred: Tensor, target: Tensor, activation: Activation = "sigmoid", labelled: Tensor | None = None
) -> Tensor:
    """Dice loss of boundary maps, the mean over the batch of ``1 - (2 sum p t + 1) / (sum p^2 + sum t^2 + 1)``.

    Sums are over the pixels of a picture, and the ones make a picture without any boundary cost 0 where none is
    predicted.

    Args:
        pred: (B, 1, H, W) or (B, H, W) logits.
        target: (B, H, W) or (B, 1, H, W), in 0..1.
        activation: "sigmoid", the default: p is a probability. "none": p is the raw logit, as the releases of FakeMix
            and TransLab have it (their sigmoid is commented out), so that published weights keep their meaning.
        labelled: bool (B, H, W), the pixels that take part; None: all.

    Returns:
        () float32 or wider: 0..1 of probabilities.

    Raises:
        ValueError: shapes that do not belong together, or another activation.
    """
    if activation not in ("sigmoid", "none"):
        raise ValueError(f"activation: expected 'sigmoid' or 'none', got {activation!r}")
    pred, target = _flat(pred, "pred"), _flat(target, "target")
    if pred.shape != target.shape:
        raise ValueError(
            f"pred and target must have the same pixels, got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    p = at_least_float32(pred)
    p, t = p.sigmoid() if activation == "sigmoid" else p, target.to(p.dtype)
    if labelled is not None:
        p, t = p * labelled, t * labelled
    p, t = p.flatten(1), t.flatten(1)
    overlap, mass = (p * t).sum(1), p.square().sum(1) + t.square().sum(1)
    return (1 - (2 * overlap + 1) / (mass + 1)).mean()


def _flat(maps: Tensor, name: str) -> Tensor:
    """(B, H, W) of maps that may have one channel."""
    if maps.dim() == 4 and maps.shape[1] == 1:
        return maps[:, 0]
    if maps.dim() != 3:
        raise ValueError(f"{name}: expected (B, H, W) or (B, 1, H, W), got {tuple(maps.shape)}")
    return maps
