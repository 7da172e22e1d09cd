"""Two gloo ranks give the losses and gradients of one process; an image repeated in a batch gives those of one.

BatchNorm is frozen in all of them. With ``nn.SyncBatchNorm`` nothing can be run here: torch refuses it on a CPU.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import distillkit
from distillkit import (
    LD,
    EMATeacher,
    FeatureImitation,
    LocalToGlobal,
    LogitKD,
    Main,
    OnlineTeacher,
    SelfLD,
    Teacher,
    Valuable,
    Weight,
)
from distillkit.bench.ranks import RANKS, on_two_ranks
from distillkit.core.errors import WrapError
from distillkit.core.wrap import DistilledModel
from tests.test_adapters import detector, scene
from tests.test_local_to_global import Cam, pictures
from tests.tiny import MSE, Net, batch

IMAGES = 8
DATA = os.environ.get("DISTILLKIT_DATA")
needs_nanodet = pytest.mark.skipif(not DATA, reason="set DISTILLKIT_DATA to the folder that holds weights_nanodet")


def make() -> DistilledModel:
    torch.manual_seed(0)
    student, teacher = Net(width=8), Net(width=12)
    student.drop = nn.Identity()
    student.stem[1].eval().requires_grad_(True)
    model = distillkit.wrap(
        student,
        teacher,
        [LogitKD(temperature=2.0), FeatureImitation(student_at="blocks.1", teacher_at="blocks.1")],
        criterion=cross_entropy,
    )
    model.train()
    student.stem[1].eval()  # BatchNorm frozen: its statistics are the images' of one rank only
    return model


def results(model: nn.Module, losses: dict, full=lambda t: t) -> dict:
    return {
        "losses": {k: v.detach() for k, v in losses.items() if k != "output"},
        "grads": {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def one_process() -> dict:
    model = make()
    losses = model(*batch(IMAGES))
    losses.total.backward()
    return results(model, losses)


def mine(rank: int) -> tuple:
    x, y = batch(IMAGES)
    return x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]


def ddp(rank: int) -> dict:
    model = make()
    parallel = nn.parallel.DistributedDataParallel(model)
    losses = parallel(*mine(rank))
    assert isinstance(losses, distillkit.Losses)
    losses.total.backward()
    return results(model, losses)


def shard(*modules: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for module in modules:
        fully_shard(module, mesh=mesh)


def fsdp(rank: int) -> dict:
    model = make()
    shard(*model.student.blocks, model)
    losses = model(*mine(rank))
    losses.total.backward()
    return results(model, losses, full=lambda t: t.full_tensor())


def check_same(ranks: list[dict], alone: dict) -> None:
    for name, loss in alone["losses"].items():
        torch.testing.assert_close(sum(r["losses"][name] for r in ranks) / RANKS, loss, rtol=1e-5, atol=1e-7, msg=name)
    for r in ranks:
        assert r["grads"].keys() == alone["grads"].keys()
        for name, grad in alone["grads"].items():
            scale = grad.abs().max().item()
            torch.testing.assert_close(r["grads"][name], grad, rtol=1e-5, atol=1e-5 * scale, msg=name)


def on_a_rank(rank: int) -> dict:
    """Everything that is asked of two ranks, as starting them is what takes the time."""
    return {
        "ddp": ddp(rank),
        "fsdp": fsdp(rank),
        "detectors": detectors_ddp(rank),
        "detectors_fsdp": detectors_fsdp(rank),
        "self_taught": self_taught_ddp(rank),
        "sharded_averages": sharded_averages(),
        "unproven": unproven(rank),
        "transferred": transferred_ddp(rank),
        "transferred_fsdp": transferred_fsdp(rank),
        "resting": resting_ddp(rank),
        "nanodets": nanodets_ddp(rank) if DATA else {},
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return on_two_ranks(on_a_rank)


def test_ddp(ranks: list[dict]):
    check_same([r["ddp"] for r in ranks], one_process())


def test_fsdp2(ranks: list[dict]):
    check_same([r["fsdp"] for r in ranks], one_process())


# ---- a pair of detectors: task losses and distillers'

DETECTION_LOSSES = ["loss_cls", "loss_bbox", "loss_dfl", "ld_main", "ld_valuable", "kd_main", "imitation"]


def detectors() -> DistilledModel:
    """In float64: a fresh student's class logits are so alike that float32 rounds off most of a divergence of them."""
    teacher = Teacher(detector(channels=32, groups=8), dtype=torch.float64)
    distillers = [LD(Main()), LD(Valuable()), LogitKD(Main()), FeatureImitation()]
    return distillkit.wrap(detector(sure=False, freeze_bn=True), teacher, distillers).double()


def scenes() -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Two pictures with unequal numbers of objects."""
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    boxes = torch.tensor([[8.0, 8, 40, 50], [30, 20, 60, 60], [50, 5, 90, 30]], dtype=torch.float64)
    return images, [
        {"boxes": boxes, "labels": torch.tensor([0, 2, 1])},
        {"boxes": boxes[:1] + 3, "labels": torch.tensor([1])},
    ]


@pytest.mark.parametrize("times", [2, 4, 8])
def test_an_image_that_stands_in_the_batch_several_times_changes_no_loss(times: int):
    (image, _), (target, _) = scenes()
    once = detectors()(image[None], [target])
    again = detectors()(image.expand(times, -1, -1, -1), [target] * times)
    assert list(once) == [*DETECTION_LOSSES, "output"]
    for name in DETECTION_LOSSES:
        assert once[name] > 0
        torch.testing.assert_close(again[name], once[name], rtol=1e-5, atol=0, msg=name)


def detectors_ddp(rank: int) -> dict:
    images, targets = scenes()
    model = detectors()
    parallel = nn.parallel.DistributedDataParallel(model)
    losses = parallel(images[[rank]], [targets[rank]])
    losses.total.backward()
    return results(model, losses)


def test_detectors_on_two_ranks(ranks: list[dict]):
    model = detectors()
    losses = model(*scenes())
    losses.total.backward()
    check_same([r["detectors"] for r in ranks], results(model, losses))


def detectors_fsdp(rank: int) -> dict:
    images, targets = scenes()
    model = detectors()
    shard(model.student.backbone, model.student.head, model)
    losses = model(images[[rank]], [targets[rank]])
    losses.total.backward()
    return results(model, losses, full=lambda t: t.full_tensor())


def test_sharded_detectors_on_two_ranks(ranks: list[dict]):
    model = detectors()
    losses = model(*scenes())
    losses.total.backward()
    check_same([r["detectors_fsdp"] for r in ranks], results(model, losses))


# ---- a running average as teacher


def self_taught() -> DistilledModel:
    student = detector(sure=False, freeze_bn=True)
    return distillkit.wrap(student, None, [SelfLD(temperature=1.0, decay=0.5)]).double()


def two_steps(model: DistilledModel, called: nn.Module, *batch: object) -> dict:
    """In the first the average is the student itself, and its loss 0."""
    called(*batch).total.backward()
    torch.optim.SGD(model.student.parameters(), lr=0.5).step()
    model.zero_grad()
    losses = called(*batch)
    losses.total.backward()
    return {**results(model, losses), "average": dict(model.averages.named_parameters())}


def self_taught_ddp(rank: int) -> dict:
    images, targets = scenes()
    model = self_taught()
    return two_steps(model, nn.parallel.DistributedDataParallel(model), images[[rank]], [targets[rank]])


def test_a_running_average_on_two_ranks(ranks: list[dict]):
    model = self_taught()
    start = {name: average.clone() for name, average in model.averages.named_parameters()}
    alone = two_steps(model, model, *scenes())
    assert alone["losses"]["self_ld_main"] > 0
    check_same([r["self_taught"] for r in ranks], alone)
    assert any(not torch.equal(start[name], average) for name, average in alone["average"].items())
    for r in ranks:
        torch.testing.assert_close(r["self_taught"]["average"], alone["average"], rtol=1e-9, atol=1e-12)


def sharded_averages() -> list[str]:
    """What a wrapper says whose student, or which itself, is sharded."""
    said = []
    for whole in (False, True):
        model = distillkit.wrap(Net(), EMATeacher(0.9), [MSE("stem")], criterion=cross_entropy)
        shard(model if whole else model.student)
        try:
            model(*batch(IMAGES))
        except WrapError as error:
            said.append(str(error))
    return said


def test_a_running_average_of_a_sharded_student_is_refused(ranks: list[dict]):
    for r in ranks:
        assert ["EMA teacher" in said and "DistributedDataParallel" in said for said in r["sharded_averages"]] == [
            True
        ] * 2


# ---- trained detectors


def nanodets() -> DistilledModel:
    from distillkit.models.nanodet import nanodet

    teacher = Teacher(nanodet("nanodet-plus-m_320"), dtype=torch.float64)
    return distillkit.wrap(nanodet("nanodet-m"), teacher, [LD(Main()), LD(Valuable()), LogitKD(Main())]).double()


NANODET_LOSSES = ["loss_cls", "loss_bbox", "loss_dfl", "ld_main", "ld_valuable", "kd_main"]


@needs_nanodet
def test_an_image_that_stands_in_the_batch_several_times_changes_no_loss_of_nanodet():
    (image, _), (target, _) = scenes()
    once = nanodets()(image[None], [target])
    again = nanodets()(image.expand(4, -1, -1, -1), [target] * 4)
    assert list(once) == [*NANODET_LOSSES, "output"]
    for name in NANODET_LOSSES:
        assert once[name] > 0
        torch.testing.assert_close(again[name], once[name], rtol=1e-5, atol=0, msg=name)


def nanodets_ddp(rank: int) -> dict:
    images, targets = scenes()
    model = nanodets()
    parallel = nn.parallel.DistributedDataParallel(model)  # kept: thrown away, it would not reduce
    losses = parallel(images[[rank]], [targets[rank]])
    losses.total.backward()
    return results(model, losses)


@needs_nanodet
def test_nanodet_on_two_ranks(ranks: list[dict]):
    model = nanodets()
    losses = model(*scenes())
    losses.total.backward()
    check_same([r["nanodets"] for r in ranks], results(model, losses))


# ---- the proof


def unproven(rank: int) -> list[bool]:
    """Student and teacher, after a step in which the student predicts nothing on one of the ranks."""
    student = detector()
    student.inference = replace(student.inference, score=2.0 if rank else 0.05)
    model = distillkit.wrap(student, detector(), [LD(Main())])
    model(*scene())
    return [model._student_side.unproven, model._teacher_sides["teacher"].unproven]


def test_ranks_agree_on_whether_a_model_is_to_predict_again(ranks: list[dict]):
    """A sharded model waits for the other ranks when it runs, so all of them run it or none."""
    assert [r["unproven"] for r in ranks] == [[True, False]] * RANKS


# ---- a teacher that is trained in the same step


def transferred() -> DistilledModel:
    """Shape transfer from the four corners: the crops of a picture are the same on whichever rank it is."""
    torch.manual_seed(0)
    distiller = LocalToGlobal(saliency="targets", corners=True, student_at="maps", local_at="maps")
    return distillkit.wrap(Cam(), distillers=[distiller]).double()


def salient(ranks: slice = slice(None)) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Four pictures: one has no saliency map, one an empty one."""
    x, labels = pictures(4)
    saliency = torch.zeros(4, 1, 56, 56, dtype=torch.float64)
    saliency[1:, :, 10:40, 20:] = 1
    saliency[2] = 0
    targets = {"labels": labels, "saliency": saliency, "has_saliency": torch.tensor([False, True, True, True])}
    return x.double()[ranks], {name: value[ranks] for name, value in targets.items()}


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def transferred_ddp(rank: int) -> dict:
    model = transferred()
    parallel = nn.parallel.DistributedDataParallel(model)
    losses = parallel(*salient(half(rank)))
    losses.total.backward()
    return results(model, losses)


def transferred_fsdp(rank: int) -> dict:
    model = transferred()
    shard(model.student.stem, model.online["local"], model)
    losses = model(*salient(half(rank)))
    losses.total.backward()
    return results(model, losses, full=lambda t: t.full_tensor())


@pytest.mark.parametrize("way", ["transferred", "transferred_fsdp"])
def test_local_to_global_transfer_on_two_ranks(ranks: list[dict], way: str):
    model = transferred()
    losses = model(*salient())
    losses.total.backward()
    alone = results(model, losses)
    assert alone["grads"].keys() == dict(model.named_parameters()).keys()
    assert all(grad.any() for grad in alone["grads"].values())
    check_same([r[way] for r in ranks], alone)


STEPS_TAUGHT = 2


def resting() -> DistilledModel:
    """An online teacher that is read in two steps, and then no more."""
    torch.manual_seed(0)
    student, teacher = Net(width=8), Net(width=12)
    for net in (student, teacher):
        net.stem[1] = net.drop = nn.Identity()
    online = OnlineTeacher(teacher, cross_entropy)
    distiller = FeatureImitation(
        student_at="blocks.1", teacher_at="blocks.1", weight=Weight(1.0, "until", STEPS_TAUGHT)
    )
    return distillkit.wrap(student, online, [distiller], criterion=cross_entropy).double()


def steps_until_it_rests(model: DistilledModel, called: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[dict]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(STEPS_TAUGHT + 2):
        losses = called(x.double(), y)
        losses.total.backward()
        found.append(results(model, losses))
        optimizer.step()
        optimizer.zero_grad()
    return found


def resting_ddp(rank: int) -> list[dict]:
    model = resting()
    return steps_until_it_rests(model, nn.parallel.DistributedDataParallel(model), *mine(rank))


def test_ddp_does_not_wait_for_an_online_teacher_that_rests(ranks: list[dict]):
    model = resting()
    alone = steps_until_it_rests(model, model, *batch(IMAGES))
    for step, once in enumerate(alone):
        check_same([r["resting"][step] for r in ranks], once)
        taught = step < STEPS_TAUGHT
        assert (once["losses"]["teacher"] > 0) == taught
        assert any(grad.any() for name, grad in once["grads"].items() if name.startswith("online.")) == taught
        assert once["losses"]["task"] > 0
