"""Wrapped models in Lightning's Trainer, by either of its names, and in Accelerate as they are."""

import os
from importlib import import_module

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import distillkit
from distillkit import FeatureImitation, LogitKD
from distillkit.bench.ranks import on_two_ranks
from distillkit.core.errors import WrapError
from distillkit.data.scenes import Scenes
from distillkit.integrations.lightning import Distilled
from tests.tiny import Net


def wrapped() -> distillkit.core.wrap.DistilledModel:
    torch.manual_seed(0)
    distillers = [LogitKD(), FeatureImitation(student_at="blocks.1", teacher_at="blocks.1")]
    return distillkit.wrap(Net(8, 10), Net(16, 10), distillers, criterion=cross_entropy)


def scenes() -> list[tuple[torch.Tensor, int]]:
    data = Scenes(8, 32)
    return [(picture, int(target["labels"][0])) for picture, target in (data[(0, i)] for i in range(8))]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[torch.Tensor, int]]:
    return scenes()


@pytest.fixture(params=["lightning", "pytorch_lightning"])
def package(request):
    return pytest.importorskip(request.param, reason='pip install "distillkit[lightning]"')


def module_of(package, model):
    class Distillation(Distilled, package.LightningModule):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    return Distillation(model)


def trainer_of(package, folder, **options):
    callbacks = import_module(
        f"{package.__name__}.callbacks" if package.__name__ != "lightning" else "lightning.pytorch.callbacks"
    )
    saving = callbacks.ModelCheckpoint(dirpath=folder, save_last=True)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **options}
    return package.Trainer(accelerator="cpu", devices=1, callbacks=[saving], log_every_n_steps=1, **options)


def test_it_fits_logs_each_loss_and_saves_no_teacher(package, pairs, tmp_path):
    model = wrapped()
    keys, first = list(model.student.state_dict()), model.student.head.weight.detach().clone()
    model.student.eval()  # as from_pretrained leaves it
    module, loader = module_of(package, model), DataLoader(pairs, batch_size=4)
    trainer = trainer_of(package, tmp_path, max_epochs=2)
    trainer.fit(module, loader, loader)
    logged = trainer.logged_metrics
    assert set(logged) == {"train/task", "train/kd", "train/imitation", "train/loss", "accuracy"}
    parts = logged["train/task"] + logged["train/kd"] + logged["train/imitation"]
    torch.testing.assert_close(logged["train/loss"], parts)
    assert model.step == 4
    assert (model.student.head.weight - first).abs().max() > 1e-3
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"model.{name}" for name in model.state_dict()}
    assert any(name.startswith("model.distillers.imitation.projections") for name in saved)
    student = {name.removeprefix("model.student."): v for name, v in saved.items() if name.startswith("model.student.")}
    assert list(student) == keys
    assert model.unwrap().state_dict().keys() == student.keys()


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(package, pairs, tmp_path):
    loader = DataLoader(pairs, batch_size=4)

    def run(folder, epochs, resume=None):
        torch.manual_seed(1)
        module = module_of(package, wrapped())
        module.model.student.drop.p = 0.0
        trainer_of(package, tmp_path / folder, max_epochs=epochs).fit(module, loader, ckpt_path=resume)
        return module.state_dict()

    whole = run("whole", 2)
    run("half", 1)
    again = run("rest", 2, resume=tmp_path / "half" / "last.ckpt")
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_other_batches_and_models_are_refused_or_called_by_name(package):
    with pytest.raises(WrapError, match="expected a wrapped model, got Net"):
        module_of(package, Net())
    module = module_of(package, wrapped())
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    with pytest.raises(WrapError, match="a batch is a Tensor"):
        module.losses(x)
    by_name, by_place = module.losses({"x": x, "targets": y}), module.losses([x, y])
    assert list(by_name) == list(by_place) == ["task", "kd", "imitation", "output"]


def test_accelerate_prepares_trains_saves_and_loads_a_wrapped_model_as_it_is(pairs, tmp_path):
    def prepared():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = wrapped()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return accelerator, *accelerator.prepare(model, optimizer, DataLoader(pairs, batch_size=4))

    accelerator, model, optimizer, loader = prepared()
    first = [p.detach().clone() for p in model.parameters()]
    for x, y in loader:
        with accelerator.accumulate(model):
            losses = model(x, y)
            accelerator.backward(losses.total)
            optimizer.step()
            optimizer.zero_grad()
    assert list(losses) == ["task", "kd", "imitation", "output"]
    assert all((p - q).abs().max() > 0 for p, q in zip(model.parameters(), first))
    accelerator.save_state(tmp_path)
    other, again, *_ = prepared()
    other.load_state(tmp_path)
    wrapper = other.unwrap_model(again)
    assert wrapper.step == 2
    for (name, a), b in zip(accelerator.unwrap_model(model).state_dict().items(), wrapper.state_dict().values()):
        assert torch.equal(a, b), name
    assert isinstance(wrapper.unwrap(), Net)


def fit_with_accelerate(rank: int, precision: str, batch: int) -> dict[str, torch.Tensor]:
    """Two steps of Accelerate's own loop on eight pictures, ``batch`` a process; what is trained, after them."""
    if torch.distributed.is_initialized():  # it looks for these, though the processes have met
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", LOCAL_WORLD_SIZE="2")
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    assert accelerator.num_processes == (2 if torch.distributed.is_initialized() else 1)
    model = wrapped().train()
    model.student.drop.p = 0.0
    model.student.stem[1].eval()  # else its statistics are those of the pictures of one process
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(scenes(), batch_size=batch))
    for x, y in loader:
        losses = model(x, y)
        accelerator.backward(losses.total)
        optimizer.step()
        optimizer.zero_grad()
    assert list(losses) == ["task", "kd", "imitation", "output"]
    assert losses["output"].dtype is torch.float32  # Accelerate gives outputs back in full precision
    wrapper = accelerator.unwrap_model(model)
    assert isinstance(wrapper, distillkit.core.wrap.DistilledModel)
    assert wrapper.step == 2
    state = {name: value.detach().clone() for name, value in wrapper.state_dict().items()}
    assert isinstance(wrapper.unwrap(), Net)
    return state


def fit_in_both(rank: int, batch: int) -> dict[str, dict[str, torch.Tensor]]:
    return {precision: fit_with_accelerate(rank, precision, batch) for precision in ("no", "bf16")}


def test_two_processes_of_accelerate_learn_what_one_does():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        alone = fit_in_both(0, 4)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # else the next test's mixed precision is this one's
    one, other = on_two_ranks(fit_in_both, 2)
    before = wrapped().state_dict()
    for precision, near in (("no", 1e-5), ("bf16", 1e-4)):
        for name, value in alone[precision].items():
            assert torch.equal(one[precision][name], other[precision][name]), name
            torch.testing.assert_close(one[precision][name], value, rtol=0, atol=near, msg=f"{precision} {name}")
        for name in ("student.head.weight", "distillers.imitation.projections.0.weight"):
            assert (alone[precision][name] - before[name]).abs().max() > 5 * near, name
    assert not torch.equal(alone["no"]["student.head.weight"], alone["bf16"]["student.head.weight"])
