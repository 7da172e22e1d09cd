"""Files that are read, and what comes of a distillation: the same in every contender."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distillkit.bench.behaviour import rows
from distillkit.bench.behaviour.kit import MEAN, STD, Kit, Net, Running, kit_deterministic, loss_of, raised
from distillkit.bench.behaviour.rows import Outcome

# ---- files


class Makes:
    """A pickle of it makes a folder where it is loaded without care."""

    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def runner_checkpoint(load: Callable[[nn.Module, Path], object]) -> Outcome:
    """``load``: as the contender loads a teacher's weights from a file."""
    try:
        from mmengine.logging import HistoryBuffer
    except ImportError:
        return rows.does_not_apply("needs mmengine, which writes such files")
    torch.serialization.clear_safe_globals()  # what other packages have allowed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = Net(seed=7).state_dict()
        log = {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}}
        torch.save({"state_dict": weights, "model": weights, "message_hub": log, "meta": {}}, folder / "runner.pth")
        made = folder / "made"
        torch.save({"state_dict": weights, "model": weights, "meta": {"x": Makes(str(made))}}, folder / "bad.pth")
        model = Net()
        error = raised(lambda: load(model, folder / "runner.pth"))
        raised(lambda: load(Net(), folder / "bad.pth"))
        ran = made.exists()
    if error is not None:
        return Outcome(False, f"{type(error).__name__}: {rows.cut_around(str(error), ['Unsupported'], 80)}")
    if not all(torch.equal(value, weights[key]) for key, value in model.state_dict().items()):
        return Outcome(False, "the weights were not loaded")
    return Outcome(not ran, "loaded; a file that names os.mkdir ran it" if ran else "loaded; a file's code did not run")


def runs_code(suffix: str, text: str, read: Callable[[Path], object]) -> Outcome:
    """``text``: a recipe that calls os.mkdir on the folder FOLDER; ``read``: reads and builds it."""
    with tempfile.TemporaryDirectory() as name:
        made = Path(name, "made")
        file = Path(name, f"recipe{suffix}")
        file.write_text(text.replace("FOLDER", str(made)))
        error = raised(lambda: read(file))
        if made.exists():
            return Outcome(False, "os.mkdir ran")
        if error is None:
            return Outcome(True, "nothing ran")
        return Outcome(True, f"{type(error).__name__}: {rows.cut_around(str(error), ['tag', 'mkdir'], 90)}")


# ---- what comes back


def unwrap(kit: Kit, tolerance: float = 0.0) -> Outcome:
    running = kit.start()
    running.train()
    running.forward(*kit.batch(2))[0].backward()
    if running.unwrap is None:
        same = list(running.student.state_dict()) == list(running.plain().state_dict())
        its = "the keys of the untouched one" if same else "other keys"
        return Outcome(False, f"no call does it: the model stays a {type(running.student).__name__}, with {its}")
    x = kit.batch(2)[0]
    twin = running.plain().eval()
    weights = {k: v.detach().clone() for k, v in running.student.state_dict().items()}
    back = running.unwrap()
    wrong = []
    if type(back) is not type(twin):
        wrong.append(f"its class is {type(back).__name__}")
    if list(back.state_dict()) != list(twin.state_dict()):
        wrong.append("its keys are others")
    if hooks := sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in back.modules()):
        wrong.append(f"{hooks} hooks are left")
    keys = weights.keys() & twin.state_dict().keys()
    twin.load_state_dict({k: weights[k] for k in keys}, strict=False)
    with torch.no_grad():
        back.eval()
        one, two = flat(running.predict(back.float(), x)), flat(running.predict(twin, x))
    if one.shape != two.shape or not float((one - two).abs().max()) <= tolerance * float(two.abs().max()):
        wrong.append("it predicts something else")
    return Outcome(not wrong, "; ".join(wrong) or "class, keys and prediction as they were, no hook")


def flat(output: Any) -> Tensor:
    """All tensors of a prediction in one."""
    if isinstance(output, Tensor):
        return output.float().flatten()
    parts = output.values() if isinstance(output, dict) else output
    return torch.cat([flat(part) for part in parts if isinstance(part, Tensor | dict | list | tuple)])


def copies(kit: Kit) -> Outcome:
    running = kit.start()
    running.train()
    running.forward(*kit.batch(2))[0].backward()
    plain = len(pickle.dumps(running.plain()))
    x = kit.batch(2)[0]
    running.student.zero_grad(set_to_none=True)
    with torch.no_grad():
        running.student.eval()
        wanted = flat(running.predict(running.student, x))
    for how, make in {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}.items():
        try:
            twin = make(running.student)
        except Exception as error:
            return Outcome(False, f"{how}: {type(error).__name__}: {rows.short(str(error), 90)}")
        with torch.no_grad():
            twin.eval()  # of some it returns nothing
            if not torch.equal(flat(running.predict(twin, x)), wanted):
                return Outcome(False, f"the {how} predicts something else")
        if hooks := sum(len(m._forward_hooks) for m in twin.modules()):
            return Outcome(False, f"the {how} carries {hooks} hooks")
    size = len(pickle.dumps(running.student)) / plain
    return Outcome(size < 1.1, "both work, carry no hook" if size < 1.1 else f"its pickle is {size:.1f} times as large")


class Precision(TorchDispatchMode):
    """The operations, of those that losses lose digits by, that read bfloat16; not while a model runs."""

    OPS = ("_softmax", "_log_softmax", "mse_loss", "smooth_l1_loss")

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.low: set[str] = set()
        self.inside = 0
        for model in models:
            model.register_forward_pre_hook(lambda m, a: self.enter(1))
            model.register_forward_hook(lambda m, a, out: self.enter(-1))

    def enter(self, step: int) -> None:
        self.inside += step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        low = any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in args)
        if name in self.OPS and low and not self.inside:
            self.low.add(name.strip("_"))
        return func(*args, **(kwargs or {}))


def bf16(kit: Kit, losses_inside: bool = False) -> Outcome:
    """``losses_inside``: the student's own forward computes the losses."""
    running = kit.start()
    running.train()
    models = [running.teacher] if losses_inside else [running.teacher, running.student]
    with Precision(models) as seen, torch.autocast("cpu", torch.bfloat16):
        _, kd = running.forward(*kit.batch(4))
    dtype = str(kd.dtype).removeprefix("torch.")
    low = f", {', '.join(sorted(seen.low))} in bfloat16" if seen.low else ""
    return Outcome(dtype == "float32" and not low, f"the loss is {dtype}{low}")


def normalisation(kit: Kit, running: Running, first: str, given: Any, wanted: Any) -> Outcome:
    """``first``: path of the teacher's first layer; ``given``, ``wanted``: (mean, std) of student and teacher."""
    arrived: list[Tensor] = []
    running.teacher.get_submodule(first).register_forward_pre_hook(lambda m, args: arrived.append(args[0].detach()))
    running.train()
    batch = kit.batch(2)
    running.forward(*batch)
    (m0, s0), (m1, s1) = (tuple(torch.tensor(v).view(-1, 1, 1) for v in pair) for pair in (given, wanted))
    expected = (batch[0] * s0 + m0 - m1) / s1
    off = float((arrived[0] - expected).abs().max())
    return Outcome(off <= 1e-5, f"off by {off:.2g}" if off > 1e-5 else f"its own, to {off:.0e}")


def normalisation_of_classifiers(kit: Kit) -> Outcome:
    teacher, half = Net(1), (0.5,) * 3
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": half, "std": half}
    return normalisation(kit, kit.start(teacher=teacher), "stem.0", (MEAN, STD), (half, half))


def weight(kit: Kit) -> Outcome:
    losses = {}
    for w in (1.0, 2.0):
        try:
            losses[w] = loss_of(kit, kit.start(weight=w, **kit_deterministic(kit)), kit.batch(4))
        except Exception as error:
            return Outcome(False, f"{type(error).__name__}: {rows.short(str(error))}")
    times = losses[2.0] / losses[1.0]
    return Outcome(abs(times - 2) < 1e-4, f"{times:.4g} times")


def no_objects(kit: Kit, batch: tuple[Any, ...]) -> Outcome:
    running = kit.start()
    running.train()

    def step() -> None:
        total, _ = running.forward(*batch)
        total.backward()
        finite = all(bool(p.grad.isfinite().all()) for p in running.student.parameters() if p.grad is not None)
        if not (bool(total.isfinite()) and finite):
            raise ArithmeticError(f"total {float(total.detach())}")

    error = raised(step)
    return Outcome(error is None, "finite" if error is None else f"{type(error).__name__}: {rows.short(str(error))}")
