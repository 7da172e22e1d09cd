"""boxes/rotated_nms.py: the boxes kept against a plain greedy loop over polygons."""

import math

import pytest
import shapely
import torch
from torch import Tensor

from distillkit.boxes import rotated_nms as module
from distillkit.boxes.rotated import corners
from distillkit.boxes.rotated_nms import rotated_nms


def detections(number: int, seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes in heaps around common places, scores that often tie, labels."""
    g = torch.Generator().manual_seed(seed)
    places = torch.rand(max(1, number // 8), 5, generator=g).double() * torch.tensor([200, 200, 40, 40, 6.0])
    boxes = places[torch.randint(0, len(places), (number,), generator=g)]
    boxes = boxes + torch.randn(number, 5, generator=g) * torch.tensor([2, 2, 2, 2, 0.1])
    boxes[:, 2:4] = boxes[:, 2:4].abs() + 1
    scores = (torch.rand(number, generator=g) * 20).round() / 20
    return boxes, scores, torch.randint(0, classes, (number,), generator=g)


def greedy(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> list[int]:
    shapes = shapely.polygons(corners(boxes).numpy())
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i].item(), i)):
        mine = [k for k in kept if labels[k] == labels[i]]
        shared = shapely.area(shapely.intersection(shapes[mine], shapes[i], grid_size=1e-9))
        if not (shared / (shapely.area(shapes[mine]) + shapes[i].area - shared) > iou).any():
            kept.append(i)
    return kept


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("iou", [0.1, 0.5])
def test_as_a_plain_loop(block: int, iou: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    for seed in range(3):
        boxes, scores, labels = detections(150, seed)
        want = greedy(boxes, scores, labels, iou)
        assert 10 < len(want) < 140
        assert rotated_nms(boxes, scores, labels, iou).tolist() == want
        assert rotated_nms(boxes, scores, labels, iou, most=9).tolist() == want[:9]
        assert rotated_nms(boxes, scores, None, iou).tolist() == greedy(boxes, scores, torch.zeros(150), iou)


def test_a_box_that_is_hidden_hides_none() -> None:
    """Each overlaps the next only: best to worst, every second stays, however long the row."""
    boxes = torch.tensor([[6.0 * i, 0, 10, 10, 0] for i in range(600)])
    scores = torch.linspace(1, 0.1, 600)
    assert rotated_nms(boxes, scores, None, 0.2).tolist() == list(range(0, 600, 2))


def test_ties_go_to_the_earlier_box() -> None:
    same = torch.tensor([[50.0, 50, 20, 10, 0.5]]).repeat(500, 1)
    same[:, 4] += torch.arange(500) % 3 * math.pi
    assert rotated_nms(same, torch.ones(500), None, 0.9).tolist() == [0]
    scores = torch.ones(500)
    scores[[300, 100]] = 2
    assert rotated_nms(same, scores, None, 0.9).tolist() == [100]
    apart = same.clone()
    apart[:, 0] += 100 * torch.arange(500)
    assert rotated_nms(apart, torch.ones(500), None, 0.9).tolist() == list(range(500))


def test_classes_leave_each_other_alone() -> None:
    same = torch.tensor([[50.0, 50, 20, 10, 0.5]]).repeat(4, 1)
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert rotated_nms(same, scores, torch.arange(4), 0.5).tolist() == [1, 2, 3, 0]
    assert rotated_nms(same, scores, torch.tensor([0, 7, 0, 7]), 0.5).tolist() == [1, 2]


def test_the_threshold_itself_is_no_overlap() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4, 0], [2, 0, 4, 4, 0]]).double()  # a third
    scores = torch.tensor([0.9, 0.8])
    assert rotated_nms(boxes, scores, None, 1 / 3 + 1e-9).tolist() == [0, 1]
    assert rotated_nms(boxes, scores, None, 1 / 3 - 1e-9).tolist() == [0]
    assert rotated_nms(boxes[:1].repeat(3, 1), torch.ones(3), None, 1).tolist() == [0, 1, 2]


def test_large_coordinates_lose_no_pixel() -> None:
    """In float32, next to 50 000, with many classes."""
    boxes, scores, labels = detections(200, classes=15)
    boxes[:, :2] = boxes[:, :2].round()
    far = boxes + torch.tensor([50_000, 50_000, 0, 0, 0])
    assert rotated_nms(far.float(), scores, labels, 0.3).tolist() == rotated_nms(boxes, scores, labels, 0.3).tolist()


def test_none_and_one() -> None:
    for labels in (None, torch.zeros(0, dtype=torch.int64)):
        kept = rotated_nms(torch.zeros(0, 5), torch.zeros(0), labels, 0.5)
        assert kept.shape == (0,)
        assert kept.dtype is torch.int64
    assert rotated_nms(torch.tensor([[1.0, 2, 3, 4, 5]]), torch.ones(1), None, 0.5).tolist() == [0]
    assert rotated_nms(torch.zeros(3, 5), torch.ones(3), None, 0.5).tolist() == [0, 1, 2]  # no area, no overlap
    assert rotated_nms(torch.tensor([[1.0, 2, 3, 4, 5]]), torch.ones(1), None, 0.5, most=0).tolist() == []


def test_bad_input_is_named() -> None:
    boxes, scores = torch.zeros(3, 5), torch.zeros(3)
    with pytest.raises(ValueError, match=r"rotated boxes \(N, 5\) as cx, cy, w, h, angle, got \(3, 4\)"):
        rotated_nms(boxes[:, :4], scores, None, 0.5)
    with pytest.raises(ValueError, match=r"one of scores a box, \(3,\), got \(2,\)"):
        rotated_nms(boxes, scores[:2], None, 0.5)
    with pytest.raises(ValueError, match=r"one of labels a box, \(3,\), got \(3, 1\)"):
        rotated_nms(boxes, scores, torch.zeros(3, 1), 0.5)
    with pytest.raises(ValueError, match=r"iou must be in 0..1, got 50"):
        rotated_nms(boxes, scores, None, 50)
