"""One file per model family: how it is run and where its views are."""

from __future__ import annotations

from torch import nn

from distillkit.core.adapter import Adapter, comes_from

#: an attribute of the model, so that copies of a model have its adapter too
_OWN = "_distillkit_adapter"


def with_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The same model; ``adapter_for`` of it, and of its copies, is ``adapter`` from now on."""
    setattr(model, _OWN, adapter)
    return model


def own_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that a model was given, if it was."""
    return getattr(model, _OWN, None)


def adapter_for(model: nn.Module, fallback: Adapter | None = None) -> Adapter:
    """A model's adapter: the one it was given, else its family's where distillkit knows it, else ``fallback``, else the
    one for plain models."""
    own = own_adapter(model)
    if own is not None:
        return own
    from distillkit.models.cam import CamClassifier
    from distillkit.models.gfl import GFL
    from distillkit.models.nanodet import NanoDet
    from distillkit.models.rotated_gfl import RotatedGFL
    from distillkit.models.rotated_retina import RotatedRetina

    if isinstance(model, CamClassifier):
        from distillkit.adapters.cam import CamAdapter

        return CamAdapter(background=model.background, softmax=model.softmax)
    if isinstance(model, GFL):
        from distillkit.adapters.gfl import gfl

        return gfl(model)
    if isinstance(model, NanoDet):
        from distillkit.adapters.nanodet import nanodet

        return nanodet(model)
    if isinstance(model, RotatedGFL):
        from distillkit.adapters.rotated_gfl import rotated_gfl

        return rotated_gfl(model)
    if isinstance(model, RotatedRetina):
        from distillkit.adapters.rotated_retina import rotated_retina

        return rotated_retina(model)
    if comes_from(model, "mmdet.models.detectors."):
        from distillkit.adapters.mmrotate import is_rotated, mmrotate

        if is_rotated(model):
            return mmrotate(model)
        from distillkit.adapters.mmdet import mmdet

        return mmdet(model)
    if comes_from(model, "torchvision.models.detection."):
        from distillkit.adapters.torchvision import torchvision_detector

        if (detector := torchvision_detector(model)) is not None:
            return detector
    if comes_from(model, "transformers.modeling_utils"):
        from distillkit.adapters.transformers import transformers_model

        return transformers_model(model)
    if comes_from(model, "ultralytics.nn."):
        from distillkit.adapters.ultralytics import ultralytics

        return ultralytics(model)
    from distillkit.adapters.segmenter import Segmenter, is_segmenter

    if is_segmenter(model):
        return Segmenter()
    if fallback is None:
        from distillkit.adapters.classifier import Classifier, is_classifier

        return Classifier() if is_classifier(model) else Adapter()
    return fallback
