"""CI's speed gates: the work of a step is counted, never timed. The times themselves are in benchmarks/."""

import pytest
import torch

import distillkit
from distillkit import LD, FeatureImitation, LocalToGlobal, LogitKD, Main, Valuable
from distillkit.bench.counting import Dispatched, kept_tensors, live_bytes, modules_run, without_cpu_checks
from tests.test_adapters import detector, scene
from tests.test_local_to_global import Cam, pictures
from tests.tiny import KL, Net, batch


def distillers(dense=None):
    return [LD(Main(), dense=dense), LD(Valuable(), dense=dense), LogitKD(Main(), dense=dense)]


def step(model):
    losses = model(*scene())
    losses.total.backward()


def count(call) -> Dispatched:
    with Dispatched() as counted:
        call()
    return counted


def test_the_accelerator_path_adds_no_host_sync():
    student, teacher = detector(), detector()
    with without_cpu_checks():
        alone = count(lambda: sum(student(*scene()).values()).backward())
        model = distillkit.wrap(student, teacher, distillers(dense=True))
        step(model)  # the first step proves the adapters, which waits
        with_distillers = count(lambda: step(model))
    assert with_distillers.syncs == alone.syncs
    assert with_distillers.operations.total() > alone.operations.total()


def test_a_wrapped_classifier_adds_no_host_sync():
    model = distillkit.wrap(Net(), Net(), [LogitKD(temperature=4.0)], criterion=torch.nn.functional.cross_entropy)
    model(*batch())
    assert not count(lambda: model(*batch()).total.backward()).syncs


def test_the_regions_of_one_step_are_computed_once(monkeypatch):
    from distillkit.boxes import regions

    calls = []
    real = regions.match
    monkeypatch.setattr(regions, "match", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    model = distillkit.wrap(detector(), detector(), distillers())
    model(*scene())
    calls.clear()
    model(*scene())
    assert len(calls) == len(scene()[0])  # once a picture, for three distillers


def test_the_wrapper_itself_adds_a_handful_of_operations():
    student, teacher = Net(), Net()
    x, y = batch()
    model = distillkit.wrap(student, teacher, [KL()], criterion=torch.nn.functional.cross_entropy)
    model(x, y)

    def by_hand():
        logits = student(x)
        with torch.no_grad():
            soft = teacher(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        kl = torch.nn.functional.kl_div(logits.log_softmax(-1), soft.softmax(-1), reduction="batchmean")
        (loss + kl).backward()

    ideal, ours = count(by_hand), count(lambda: model(x, y).total.backward())
    assert ours.operations.total() - ideal.operations.total() <= 16  # step counter, flags of non-finite losses, weights


def test_every_module_runs_once_and_the_teacher_stops_at_its_last_tap():
    student, teacher = detector(), detector()
    model = distillkit.wrap(student, teacher, distillers())
    step(model)
    with modules_run(student) as ran:
        step(model)
    assert ran.count("backbone.conv1") == 1
    assert ran.count("head.gfl_cls") == 3
    with modules_run(teacher) as ran:
        step(model)
    assert ran.count("head.gfl_cls") == 3
    assert "" not in ran  # the detector's own forward, with its non-maximum suppression, did not finish


def test_nothing_of_the_teacher_runs_for_features_but_what_is_read():
    teacher = detector()
    model = distillkit.wrap(detector(), teacher, [FeatureImitation("whole")])
    step(model)
    with modules_run(teacher) as ran:
        step(model)
    assert ran[-1].startswith("neck")


@pytest.mark.parametrize("dense", [False, True])
def test_nothing_is_kept_between_steps(dense):
    student, teacher = detector(), detector()
    model = distillkit.wrap(student, teacher, distillers(dense))
    step(model)
    assert not kept_tensors(student, lambda: step(model))
    assert not kept_tensors(teacher, lambda: step(model))


# ---- a teacher that is trained in the same step


def transferring(saliency: bool = True):
    """A student, its local network, and a training step of both; with saliency for some of the pictures."""
    student, local = Cam(), Cam()
    distiller = LocalToGlobal(local, saliency="targets" if saliency else None, student_at="maps", local_at="maps")
    model = distillkit.wrap(student, distillers=[distiller])
    x, labels = pictures()
    targets = {"labels": labels, "saliency": torch.ones(2, 1, 56, 56), "has_saliency": torch.tensor([True, False])}

    def step():
        model(x, targets if saliency else labels).total.backward()
        model.zero_grad()

    return student, local, step


@pytest.mark.parametrize("saliency", [False, True])
def test_local_to_global_transfer_adds_no_host_sync(saliency):
    _, _, step = transferring(saliency)
    step()
    assert not count(step).syncs


def test_local_to_global_transfer_runs_each_network_once():
    student, local, step = transferring()
    step()
    for network in (student, local):
        with modules_run(network) as ran:
            step()
        assert ran.count("") == ran.count("maps") == 1


def test_local_to_global_transfer_adds_less_than_a_hundred_operations():
    student, local, step = transferring(saliency=False)
    x, labels = pictures()
    crops, of_crops = torch.randn(8, 3, 40, 40), labels.repeat_interleave(4, 0)

    def by_hand():
        torch.nn.functional.multilabel_soft_margin_loss(local(crops), of_crops).backward()
        student.maps(student.stem(x)).square().mean().backward()
        for network in (student, local):
            network.zero_grad()

    step()
    ideal, ours = count(by_hand), count(step)
    # crops, targets, RoIAlign and the loss, and the wrapper's own; a third of them are views, which do no work
    assert ours.operations.total() - ideal.operations.total() < 100


def test_nothing_is_kept_between_steps_of_local_to_global_transfer():
    student, local, step = transferring()
    step()
    assert not kept_tensors(student, step)
    assert not kept_tensors(local, step)
    before = live_bytes()
    step()
    assert live_bytes() == before


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.detach().numpy(),
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
    ],
)
def test_the_counter_sees_every_way_of_reading_a_tensor_on_the_host(read):
    with Dispatched() as counted:
        read(torch.arange(3.0))
    assert counted.syncs
    before = counted.syncs.copy()
    read(torch.arange(3.0))
    assert counted.syncs == before  # and no longer than it is asked to
