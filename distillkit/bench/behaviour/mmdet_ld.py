"""mmdet's own distillation: ``KnowledgeDistillationSingleStageDetector`` with ``LDHead``, its published config made
small. It knows one loss, LD, of GFL heads; the model is the student and holds the teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.bench.behaviour import parallel, product, provoke, rows
from distillkit.bench.behaviour.kit import Kit, Running, pictures, raised
from distillkit.bench.behaviour.rows import Outcome, does_not_apply
from distillkit.integrations import openmmlab

SIZE = 64
NO_LAYERS = "names no layers: its loss reads its own head"


def load() -> None:
    openmmlab.prepare()
    import mmdet.models  # noqa: F401


def small(model: Any) -> Any:
    model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3)
    model.bbox_head.norm_cfg = {"type": "GN", "num_groups": 4, "requires_grad": True}
    return model


def described(weight: float = 0.25) -> Any:
    """The model block of mmdet's LD config."""
    model = small(openmmlab.read_config("mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py").model)
    model.teacher_config = {"model": student_config()}
    model.teacher_ckpt = None
    model.bbox_head.loss_ld.loss_weight = weight
    return model


def student_config() -> Any:
    return small(openmmlab.read_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py").model)


def built(model: Any, seed: int = 0) -> Any:
    """Weights drawn so that the distributions differ."""
    torch.manual_seed(seed)
    detector: Any = openmmlab.made(model)
    detector.init_weights()
    for part in (detector, getattr(detector, "teacher_model", None)):
        if part is not None:
            nn.init.normal_(part.bbox_head.gfl_reg.weight, std=0.3)
    return detector


def plain() -> nn.Module:
    return built(student_config())


def start(weight: float = 0.25, described_as: Any = None, **ddp: Any) -> Running:
    model = built(described_as or described(weight))
    called = nn.parallel.DistributedDataParallel(model, **ddp) if ddp else model

    def forward(x: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        losses = called(x, copy.deepcopy(y), mode="loss")
        terms = {name: torch.stack(value).sum() if isinstance(value, list) else value for name, value in losses.items()}
        return torch.stack(list(terms.values())).sum(), terms["loss_ld"]

    return Running(
        student=model, teacher=model.teacher_model, forward=forward, trained=model, train=model.train,
        plain=plain, loss_names=("loss_ld",), predict=lambda m, x: m(x, mode="tensor"),
    )  # fmt: skip


def samples(count: int, boxes: bool = True) -> list[Any]:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    found = []
    for i in range(count):
        size = (SIZE, SIZE)
        sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "pad_shape": size,
                                         "batch_input_shape": size, "scale_factor": (1.0, 1.0)})  # fmt: skip
        two = torch.tensor([[4.0, 6.0, 40.0, 36.0], [20.0, 24.0, 58.0, 60.0]]) + i
        sample.gt_instances = InstanceData(bboxes=two[: 2 * boxes], labels=torch.tensor([0, 2])[: 2 * boxes])
        found.append(sample)
    return found


def batch(count: int) -> tuple[Tensor, Any]:
    return pictures(count, size=SIZE)[0], samples(count)


def repeat(count: int) -> tuple[Tensor, Any]:
    return pictures(1, size=SIZE)[0].repeat(count, 1, 1, 1), samples(1) * count


def distributed(projection: bool) -> Running:
    return start(find_unused_parameters=True)


KIT = Kit(start, batch, repeat, "bbox_head.gfl_reg", distributed)


def two_losses() -> Outcome:
    return does_not_apply(NO_LAYERS)


def wrong_path() -> Outcome:
    return does_not_apply(NO_LAYERS)


def never_ran() -> Outcome:
    return does_not_apply(NO_LAYERS)


def misspelt_key() -> Outcome:
    model = described()
    model.bbox_head.loss_ld.temprature = model.bbox_head.loss_ld.pop("T")
    return rows.named(raised(lambda: built(model)), ["temprature"])


def trains_nothing() -> Outcome:
    """All but the layer that says the classes."""
    return provoke.trains_nothing(KIT, start(), lambda name: "gfl_cls" not in name)


def class_counts() -> Outcome:
    return does_not_apply("its loss reads no classes")


def compiled_before() -> Outcome:
    return does_not_apply("builds its student itself, and hooks nothing")


def accelerate() -> Outcome:
    return does_not_apply("mmengine's Runner trains it")


def two_ranks() -> Outcome:
    return parallel.two_ranks("mmdet_ld", {"KIT": (KIT, {})})


def loss_parameters() -> Outcome:
    return does_not_apply("its loss has none")


def runner_checkpoint() -> Outcome:
    """As ``teacher_ckpt`` is loaded."""
    from mmengine.runner import load_checkpoint

    def load_weights(model: nn.Module, file: Path) -> object:
        return load_checkpoint(model, str(file), map_location="cpu")

    return product.runner_checkpoint(load_weights)


def runs_code() -> Outcome:
    return product.runs_code(".py", "__import__('os').mkdir('FOLDER')\nmodel = dict()\n", openmmlab.read_config)


def bf16() -> Outcome:
    return product.bf16(KIT, losses_inside=True)


def normalisation() -> Outcome:
    """Its teacher is built with a preprocessor of its own, which is not asked."""
    model = described()
    mine = model.data_preprocessor
    theirs = {**mine, "mean": [127.5] * 3, "std": [127.5] * 3}
    model.teacher_config["model"].data_preprocessor = theirs
    running = start(described_as=model)
    pairs = [(prepared["mean"], prepared["std"]) for prepared in (mine, theirs)]
    return product.normalisation(KIT, running, "backbone.conv1", *pairs)


def no_objects() -> Outcome:
    return product.no_objects(KIT, (batch(2)[0], samples(2, boxes=False)))
