"""Batches as OpenMMLab's loaders and preprocessors give them, and a pair of detectors that learns on one."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import distillkit
from distillkit import Distiller


def as_loaded(model: nn.Module, shown: Sequence[tuple[Tensor, Tensor, Tensor]], boxes: Callable[[Tensor], object]):
    """Pictures, their boxes and labels as (inputs, data samples). boxes: what the package keeps boxes in."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    inputs, samples = [], []
    for picture, box, labels in shown:
        inputs.append((picture * 255).round().to(torch.uint8).flip(0))  # they read BGR
        size = tuple(picture.shape[1:])
        sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": (300, 400), "scale_factor": (0.25, 0.3)})
        sample.gt_instances = InstanceData(bboxes=boxes(box.clone()), labels=labels.clone())
        nothing = torch.zeros(0, dtype=torch.long)
        sample.ignored_instances = InstanceData(bboxes=boxes(box[:0].clone()), labels=nothing)
        samples.append(sample)
    data = model.data_preprocessor({"inputs": inputs, "data_samples": samples}, True)
    return data["inputs"], data["data_samples"]


def predicted(model: nn.Module, call) -> list[Tensor]:
    with torch.no_grad():
        rows = model.eval()(call[0], copy.deepcopy(call[1]), mode="predict")
    found = [r.pred_instances for r in rows]
    return [torch.cat([getattr(p.bboxes, "tensor", p.bboxes), p.scores[:, None]], 1) for p in found]


def learns_and_is_handed_back(
    student: nn.Module, teacher: nn.Module, distillers: list[Distiller], call: Callable[[], tuple], share: float
) -> None:
    """In 20 steps on the batch that ``call`` makes the losses fall below this ``share`` of what they were; the student
    predicts through the wrapper and after ``unwrap`` what it predicts in it, and is what it was."""
    keys, kind = list(student.state_dict()), type(student)
    model = distillkit.wrap(student, teacher, distillers).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    totals = []
    for _ in range(20):
        losses = model(*call(), mode="loss")
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert sum(totals[-3:]) < share * sum(totals[:3]), totals
    shown = call()
    model.eval()
    before = predicted(student, shown)
    through = model(shown[0], copy.deepcopy(shown[1]), mode="predict")
    assert [len(r.pred_instances) for r in through] == [len(b) for b in before]
    back = model.unwrap()
    assert back is student
    assert type(back) is kind
    assert list(back.state_dict()) == keys
    for a, b in zip(before, predicted(back, shown), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
