"""Class activation maps: of ``CamClassifier``, and of any classifier with a layer that returns them.

A classifier of timm has them without such a layer: see ``distillkit.adapters.classifier``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from distillkit.adapters import adapter_for
from distillkit.adapters.classifier import Classifier, Layout, input_size, layout_of, token_logits
from distillkit.core.adapter import Adapter
from distillkit.core.errors import ViewError
from distillkit.core.side import Reading, Side
from distillkit.core.taps import Place
from distillkit.core.views import ActivationMaps, View
from distillkit.losses.local_to_global import with_background


class CamAdapter(Adapter):
    """A classifier whose layer ``maps`` returns (B, K, h, w): class logits of every cell.

    Args:
        maps: path of that layer; a path that a distiller names counts before it.
        background: the last of the K maps is the background's, and no class.
        mean, std: as ``Adapter``.
        softmax: ``activation_maps`` are probabilities, the softmax of all K maps (and of a logit of 0 where there is no
            background): what L2G teaches. The release reads its networks' logits; these are lower where several
            classes are likely, and below 0, which is cut off, wherever the others' happen to be high.
    """

    def __init__(
        self,
        maps: str = "maps",
        background: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        softmax: bool = False,
    ):
        super().__init__(mean, std)
        self.maps, self.background, self.softmax = maps, background, softmax

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is not ActivationMaps:
            return super().places(model, kind, at)
        return (Place(at or (self.maps,)),)

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        if kind is not ActivationMaps:
            return super().view(model, kind, tensors, output)
        if len(tensors) != 1 or tensors[0].dim() != 4:
            raise ViewError(
                f"{type(model).__name__}: expected activation maps (B, K, h, w) at one path, got "
                f"{', '.join(str(tuple(t.shape)) for t in tensors)}; name the layer that makes them, the last before "
                "the mean over all places"
            )
        return ActivationMaps(tensors[0], self.background)


def activation_maps(model: nn.Module, pictures: Tensor) -> Tensor:
    """Class logits of every cell of a classifier's last map, or probabilities (``CamAdapter.softmax``), without the
    background's.

    Args:
        model: a ``CamClassifier``, a classifier of timm or one built like them, or a model with an adapter of its own
            (``distillkit.adapters.with_adapter(model, CamAdapter("path.of.the.maps"))``). It runs in its own mode, and
            no further than the maps.
        pictures: (B, 3, H, W), normalised as the model wants them.

    Returns (B, C, h, w).

    Raises:
        ViewError, TapError, AdapterError: the model has no such maps, or not at that path.
    """
    adapter = adapter_for(model)
    if isinstance(adapter, Classifier):
        return _of_tokens(model, pictures)
    try:
        side = Side("model", model, adapter, [Reading(ActivationMaps, None)])
    except ViewError as error:
        raise ViewError(
            f"{error}; where no distiller names the path, distillkit.adapters.with_adapter(model, "
            "distillkit.adapters.cam.CamAdapter('path.of.the.maps')) does"
        ) from None
    try:
        view = side.run((pictures,), {}, exit_early=True)[1].popitem()[1]
    finally:
        side.taps.remove()
    assert isinstance(view, ActivationMaps)
    if isinstance(adapter, CamAdapter) and adapter.softmax:
        return with_background(view.maps, view.classes).softmax(1)[:, : view.classes]
    return view.maps[:, : view.classes]


def _of_tokens(model: nn.Module, pictures: Tensor) -> Tensor:
    """What the head says of each token, the picture's size telling how a sequence of them lies."""
    layout = layout_of(model)
    features = model.forward_features(pictures)  # type: ignore[operator]
    if features.dim() == 3:
        layout = replace(layout, grid=grid_on(model, layout, pictures.shape[2], pictures.shape[3]))
    logits, grid = token_logits(model, layout, features)
    return logits.transpose(1, 2).unflatten(2, grid)


def grid_on(model: nn.Module, layout: Layout, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of tokens on a picture of that size, by the size of one on a picture of the model's own."""
    _, own_height, own_width = input_size(model)
    rows, columns = layout.grid
    return -(-height * rows // own_height), -(-width * columns // own_width)
