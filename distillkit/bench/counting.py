"""Counting work instead of timing it: operations and host syncs at the dispatcher, modules that ran, tensors kept."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

#: operations that make the host wait for an accelerator
SYNCS = {
    "aten._local_scalar_dense.default",
    "aten.equal.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.unique_consecutive.default",
    "aten._unique2.default",
    "aten.unique_dim.default",
    "aten.is_nonzero.default",
    "torchvision.nms.default",
}
#: methods that read a tensor on the host, which on the CPU are no operation
READS = ("tolist", "cpu", "numpy")


class Dispatched(TorchDispatchMode):
    """Counts every operation, and those that wait for the device (indexing by a mask is one of them)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __enter__(self) -> "Dispatched":
        self._patches = ExitStack()
        for name in READS:
            self._patches.enter_context(patch.object(torch.Tensor, name, self._counted(name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _counted(self, name: str) -> Callable[..., Any]:
        real = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.syncs[f"Tensor.{name}"] += 1
            return real(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.operations[name] += 1
        by_mask = name.startswith(("aten.index.Tensor", "aten.index_put")) and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in SYNCS or by_mask:
            self.syncs[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def without_cpu_checks() -> Iterator[None]:
    """As on an accelerator: what looks at tensors on the CPU only does not run."""
    with ExitStack() as patches:
        for module in ("models.dense", "adapters.dense_head", "adapters.mmdet"):
            patches.enter_context(patch(f"distillkit.{module}.check_boxes", lambda *args: None))
        yield


@contextmanager
def modules_run(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules of ``model`` that run inside, in order."""
    ran: list[str] = []
    hooks = [m.register_forward_hook(lambda m, a, o, name=name: ran.append(name)) for name, m in model.named_modules()]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def kept_tensors(model: nn.Module, step: Callable[[], None]) -> list[torch.Tensor]:
    """The activations of ``model`` that are still alive after ``step`` has returned (and dropped its result)."""
    refs: list[weakref.ref[torch.Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            refs.append(weakref.ref(output))

    hooks = [m.register_forward_hook(remember) for m in model.modules()]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    gc.collect()
    assert refs
    return [t for r in refs if (t := r()) is not None]


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for o in gc.get_objects():
        if issubclass(type(o), torch.Tensor):  # type: asks no lazy object
            with suppress(RuntimeError):  # what exports and compilers trace with, of which no memory is taken
                storages[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(storages.values())
