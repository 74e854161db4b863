"""Detects what torch.fx does not record of a forward pass, while it traces; such a model is not cut.

Symbolic tracing records operations on symbols only. It loses

- modes and settings that are active around an operation: ``torch.no_grad``, ``torch.autocast``, saved-tensor hooks, a seed, ...
- hooks of modules that are traced into;
- assignments of attributes in ``forward``, and random numbers that do not depend on a symbol;
- results computed from parameters or buffers that are not read as attributes (``self.parameters()``): they become constants.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..randomness import seeded
from .module_state import ModuleState

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_TRACE_SEED = 0x5E3D_2C1B_0A09  # no model is expected to set this seed, so any seed that it sets is detected


class Untraceable(Exception):
    """The model cannot be written as one sequence of operations; the message says why."""


def refuse_hooks(model: nn.Module, is_leaf: Callable[[nn.Module, str], bool]) -> None:
    """Raise ``Untraceable`` if a module that is traced into has hooks, since blocks do not call such a module."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if is_leaf(module, name):
            inside.update(module.modules())
            continue
        for field, kind in _HOOKS.items():
            if getattr(module, field):
                raise Untraceable(f"{name or 'the model itself'} has a {kind}, which blocks would not call")


class TraceGuard:
    """Checks one run of a model on symbols."""

    def __init__(self) -> None:
        """Record the settings that are active at the start."""
        self._problem = ""
        self._before = _active_settings()

    def refuse(self, what: str) -> NoReturn:
        """Record what ``forward`` does and tracing would lose, if it is the first, and raise ``Untraceable``."""
        self._problem = self._problem or f"its forward {what}, which a sequence of operations does not keep"
        raise Untraceable(self._problem)

    def check_operation(self, target: Any) -> None:
        """Refuse an operation that runs under other modes and settings than at the start."""
        current = _active_settings()
        for what, before in self._before.items():
            if current[what] != before:
                name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
                self.refuse(f"runs {name!r} under {what}")

    def raise_refusal(self) -> None:
        """Raise ``Untraceable`` again if something was refused, in case the model's code has caught the exception."""
        if self._problem:
            raise Untraceable(self._problem)


@contextmanager
def guard_trace(model: nn.Module) -> Iterator[TraceGuard]:
    """Guard one run of ``model`` on symbols. Raises ``Untraceable`` if tracing loses something.

    Restores the random generators of torch (on the CPU), numpy and Python afterwards.
    """
    attributes = ModuleState(model)
    with seeded(_TRACE_SEED), torch.enable_grad(), ExitStack() as modes:
        states = {name: get() for name, (get, _) in _GENERATORS.items()}
        modes.enter_context(grad_mode := _GradModeCalls())
        modes.enter_context(direct_use := _DirectTensorUse(model))
        guard = TraceGuard()
        grad_mode.guard = direct_use.guard = guard
        try:
            yield guard
        except Exception:
            guard.raise_refusal()  # the model's code may have caught it and then failed for another reason
            raise
        finally:
            advanced = [name for name, (get, _) in _GENERATORS.items() if not _equal_states(get(), states[name])]
            for name, (_, put) in _GENERATORS.items():
                put(states[name])
    guard.raise_refusal()
    if advanced:
        guard.refuse(f"draws numbers from {advanced[0]} that do not depend on its input")
    if name := attributes.changed():
        guard.refuse(f"changes {name!r}, an attribute of the model")


def _active_settings() -> dict[str, Any]:
    """The modes and settings that are active now, by the phrase used in errors."""
    torch.autocast_increment_nesting()
    nesting = torch.autocast_decrement_nesting()
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    kernels: Any = torch.backends.cuda  # it also holds the choice of attention kernels for the CPU
    return {
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.no_grad": torch.is_grad_enabled(),
        "torch.autocast": (nesting, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "hooks on saved tensors (as of torch.utils.checkpoint)": torch._C._autograd._top_saved_tensors_default_hooks(
            True
        ),
        "a torch function mode (such as a default device)": [m for m in modes if not isinstance(m, _GradModeCalls)],
        "a torch dispatch mode": torch._C._len_torch_dispatch_stack(),
        "torch.set_default_dtype": torch.get_default_dtype(),
        "a choice of attention kernels": (
            kernels.flash_sdp_enabled(),
            kernels.mem_efficient_sdp_enabled(),
            kernels.math_sdp_enabled(),
        ),
        "a seed of its own": torch.default_generator.initial_seed(),
    }


class _GradModeCalls(TorchFunctionMode):
    """Refuses ``torch.enable_grad`` even if gradients are enabled: blocks would lose it when they run without gradients."""

    guard: TraceGuard | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and self.guard and args[0] and torch.is_grad_enabled():
            self.guard.refuse("switches gradients on (torch.enable_grad)")
        return func(*args, **(kwargs or {}))


class _DirectTensorUse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations on the model's own tensors that are not symbols, before they are executed."""

    guard: TraceGuard | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: otherwise torch imports its compiler at the first operation, which takes seconds."""
        return False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = [*model.named_parameters(), *model.named_buffers()]
        storages = [(name, storage) for name, tensor in own if (storage := _storage(tensor)) is not None]
        # torch keeps one Python object per storage as long as that object lives.
        self._own = {id(storage): (name, storage) for name, storage in storages}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            own = self._own.get(id(_storage(value))) if isinstance(value, Tensor) else None
            if own is not None and self.guard is not None:
                self.guard.refuse(f"computes with {own[0]!r} other than by reading it as an attribute")
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of a tensor; None for a sparse one, which has several."""
    return tensor.untyped_storage() if tensor.layout == torch.strided else None


def _equal_states(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):  # that of Python's generator holds 625 integers: no call of numpy for each
        return len(one) == len(other) and all(map(_equal_states, one, other))
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray | Tensor) else bool(one == other)


_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's generator": (torch.default_generator.get_state, torch.default_generator.set_state),
    "Python's generator": (random.getstate, random.setstate),
    "numpy's generator": (np.random.get_state, np.random.set_state),
}
