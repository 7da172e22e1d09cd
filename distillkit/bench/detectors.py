"""GFL of mmdet with ResNet-18 and ResNet-50, as it installs them, taught by mmdet's own LD and by distillkit's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import distillkit
from distillkit.bench.contenders import Contender, quietly, stepping, twin
from distillkit.bench.peers import MMDET

CLASSES = 80
LD_WEIGHT = 0.25  # as in mmdet's config


def absent() -> str:
    """Why mmdet's rows cannot be measured; "" where they can."""
    if MMDET.absent:
        return MMDET.absent
    from distillkit.integrations import openmmlab

    try:
        with quietly():
            openmmlab.prepare()
    except (ImportError, OSError, ValueError) as error:
        return f"fails: {type(error).__name__}: {error}"[:160]
    return ""


def config(depth: int, **head: Any) -> dict[str, Any]:
    """mmdet's gfl_r50_fpn_1x_coco, at another depth, that loads nothing."""
    from distillkit.integrations import openmmlab

    model = openmmlab.read_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py").model
    model.backbone.init_cfg = None
    if depth < 50:
        model.backbone.depth = depth
        model.neck.in_channels = [64, 128, 256, 512]
    model.bbox_head.update(head)
    return model


class MMPair:
    """A student, a teacher and a batch that all contenders share.

    Args:
        size: of square pictures, in pixels.
        batch: of how many.
        objects: boxes in each.
        narrow: ResNet-18 on both sides.
    """

    def __init__(self, size: int, batch: int, objects: int = 6, narrow: bool = False, seed: int = 0):
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        from distillkit.integrations import openmmlab

        self.student: Any
        self.teacher: Any
        with quietly():
            torch.manual_seed(seed)
            self.student = openmmlab.build(config(18)).train()
            self.teacher = openmmlab.build(config(18 if narrow else 50)).eval().requires_grad_(False)
        student_head, teacher_head = self.student.bbox_head, self.teacher.bbox_head
        # as far from uniform as a trained head's, so that there is something to transfer, and sure of some classes, so
        # that an adapter finds predictions to prove itself by
        nn.init.normal_(teacher_head.gfl_reg.weight, std=0.1)
        for head in (student_head, teacher_head):
            nn.init.constant_(head.gfl_cls.bias, -2.0)
        self.batch = batch
        self.pictures = torch.randn(batch, 3, size, size)
        self.samples = []
        for _ in range(batch):
            corner, side = torch.rand(objects, 2) * size * 0.6, torch.rand(objects, 2) * size * 0.35 + 8
            sizes = dict.fromkeys(("img_shape", "pad_shape", "batch_input_shape", "ori_shape"), (size, size))
            sample = DetDataSample(metainfo={**sizes, "scale_factor": (1.0, 1.0)})
            labels = torch.randint(0, CLASSES, (objects,))
            sample.gt_instances = InstanceData(bboxes=torch.cat([corner, corner + side], 1), labels=labels)
            self.samples.append(sample)


def total(losses: dict[str, Any]) -> Tensor:
    """As mmengine adds them up."""
    return torch.stack(
        [torch.stack(list(v)).sum() if isinstance(v, list | tuple) else v for k, v in losses.items() if "loss" in k]
    ).sum()


def ideal(pair: MMPair, head: bool = True) -> Contender:
    """Student forward, its losses, backward; teacher forward to its head's outputs, or to its neck's; SGD."""
    student, teacher = twin(pair.student), twin(pair.teacher)

    def loss() -> Tensor:
        with torch.no_grad():
            maps = teacher.extract_feat(pair.pictures)  # type: ignore[operator]
            if head:
                teacher.bbox_head(maps)  # type: ignore[operator]
        return total(student.loss(pair.pictures, pair.samples))  # type: ignore[operator]

    return Contender(stepping(loss, _trained(student)), loss, student, teacher, student)


def ideal_to_the_neck(pair: MMPair) -> Contender:
    return ideal(pair, head=False)


def ours(pair: MMPair, *distillers: distillkit.Distiller) -> Contender:
    """The region that mmdet's LDHead distils in, unless others are given."""
    student, teacher = twin(pair.student), twin(pair.teacher)
    chosen = list(distillers) or [distillkit.LD(distillkit.Main(), weight=LD_WEIGHT)]
    with quietly():
        model = distillkit.wrap(student, teacher, chosen).train()

    def loss() -> Tensor:
        return model(pair.pictures, pair.samples, mode="loss").total

    return Contender(stepping(loss, _trained(model)), loss, student, teacher, model)


def ours_all(pair: MMPair) -> Contender:
    main, valuable = distillkit.Main(), distillkit.Valuable()
    return ours(pair, distillkit.LD(main), distillkit.LD(valuable), distillkit.LogitKD(main))


def ours_features(pair: MMPair) -> Contender:
    return ours(pair, distillkit.FeatureImitation("whole", weight=0.1))


def theirs(pair: MMPair) -> Contender:
    """mmdet's KnowledgeDistillationSingleStageDetector with its LDHead, around the same tensors."""
    model = their_detector(pair)

    def loss() -> Tensor:
        return total(model.loss(pair.pictures, pair.samples))

    return Contender(stepping(loss, _trained(model)), loss, model, model.teacher_model, model)


def their_detector(pair: MMPair) -> Any:
    from distillkit.integrations import openmmlab

    own = config(
        18, type="LDHead", loss_ld={"type": "KnowledgeDistillationKLDivLoss", "loss_weight": LD_WEIGHT, "T": 10}
    )
    own.update(type="KnowledgeDistillationSingleStageDetector", teacher_config={"model": config(18)}, teacher_ckpt=None)
    with quietly():
        model = openmmlab.build(own)
    model.train()
    share(model, pair.student)
    model.teacher_model = twin(pair.teacher)
    return model


def share(model: nn.Module, source: nn.Module) -> None:
    """The same tensors as another model's, by name."""
    for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, tensor)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
