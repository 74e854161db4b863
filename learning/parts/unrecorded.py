"""What torch.fx does not record of a forward pass, noticed while it records: then the model is not cut.

Symbolic tracing keeps the operations on symbols, and nothing of what surrounds them. Lost would be

- modes and settings in force around an operation: ``torch.no_grad``, ``torch.autocast``, hooks on saved tensors, a seed, ...
- hooks of modules that are not kept whole;
- attributes that ``forward`` assigns, and random numbers that it draws, where no symbol takes part;
- results computed from parameters or buffers that are reached in another way than as attributes (``self.parameters()``):
  they would be constants.
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

from ..randomness import undisturbed
from .module_state import ModuleState

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


class Untraceable(Exception):
    """The model cannot be expressed as one sequence of operations; the message says why."""


def refuse_hooks(model: nn.Module, is_leaf: Callable[[nn.Module, str], bool]) -> None:
    """Raise ``Untraceable`` where a module that is not kept whole has hooks: these run with it, and blocks do not call it."""
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


class Watch:
    """One run of a model on symbols."""

    def __init__(self) -> None:
        """Nothing was noticed yet."""
        self._problem = ""
        self._before = _surroundings()

    def lost(self, what: str) -> NoReturn:
        """Note the first thing that ``forward`` does and that would be lost, and end the run on symbols with it."""
        self._problem = self._problem or f"its forward {what}, which a sequence of operations does not keep"
        raise Untraceable(self._problem)

    def operation(self, target: Any) -> None:
        """An operation is being recorded: modes and settings must be as they were at the start."""
        now = _surroundings()
        for what, before in self._before.items():
            if now[what] != before:
                name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
                self.lost(f"runs {name!r} under {what}")

    def raise_noticed(self) -> None:
        """Raise what was noticed, should the model's code have caught it."""
        if self._problem:
            raise Untraceable(self._problem)


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Around one run of ``model`` on symbols. Raises ``Untraceable`` where something would be lost.

    Afterwards the random generators of torch (on the CPU), numpy and Python go on from where they were.
    """
    attributes = ModuleState(model)
    with undisturbed(), torch.enable_grad(), ExitStack() as modes:
        drawn = {name: get() for name, (get, _) in _GENERATORS.items()}
        modes.enter_context(calls := _GradientCalls())
        modes.enter_context(reached := _Reached(model))
        watch = Watch()
        calls.watch = reached.watch = watch
        try:
            yield watch
        except Exception:
            watch.raise_noticed()  # the model's code may have caught it, and failed of it later
            raise
        finally:
            moved = [name for name, (get, _) in _GENERATORS.items() if not _equal_states(get(), drawn[name])]
            for name, (_, put) in _GENERATORS.items():
                put(drawn[name])
    watch.raise_noticed()
    if moved:
        watch.lost(f"draws numbers from {moved[0]} that do not depend on its input")
    if name := attributes.changed():
        watch.lost(f"changes {name!r}, an attribute of the model")


def _surroundings() -> dict[str, Any]:
    """What is in force around an operation, by the words for it."""
    torch.autocast_increment_nesting()
    nesting = torch.autocast_decrement_nesting()
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    kernels: Any = torch.backends.cuda  # the choice of attention kernels is kept there for every processor
    return {
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.no_grad": torch.is_grad_enabled(),
        "torch.autocast": (nesting, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "hooks on saved tensors (as of torch.utils.checkpoint)": torch._C._autograd._top_saved_tensors_default_hooks(
            True
        ),
        "a torch function mode (such as a default device)": [m for m in modes if not isinstance(m, _GradientCalls)],
        "a torch dispatch mode": torch._C._len_torch_dispatch_stack(),
        "torch.set_default_dtype": torch.get_default_dtype(),
        "a choice of attention kernels": (
            kernels.flash_sdp_enabled(),
            kernels.mem_efficient_sdp_enabled(),
            kernels.math_sdp_enabled(),
        ),
        "a seed of its own": torch.default_generator.initial_seed(),
    }


class _GradientCalls(TorchFunctionMode):
    """Notices ``torch.enable_grad`` where gradients are on anyway: it would be lost where they are off."""

    watch: Watch | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and self.watch and args[0] and torch.is_grad_enabled():
            self.watch.lost("switches gradients on (torch.enable_grad)")
        return func(*args, **(kwargs or {}))


class _Reached(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices operations on the model's own tensors that are not symbols, before they are carried out."""

    watch: Watch | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else torch imports its compiler at the first operation, which takes seconds."""
        return False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = [*model.named_parameters(), *model.named_buffers()]
        storages = [(name, storage) for name, tensor in own if (storage := _storage(tensor)) is not None]
        # torch keeps one Python object for each storage while that object lives.
        self._own = {id(storage): (name, storage) for name, storage in storages}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            found = self._own.get(id(_storage(value))) if isinstance(value, Tensor) else None
            if found is not None and self.watch is not None:
                self.watch.lost(f"computes with {found[0]!r} other than by reading it as an attribute")
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor; None of a sparse one, which has several pieces of it."""
    return tensor.untyped_storage() if tensor.layout == torch.strided else None


def _equal_states(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(_equal_states(a, b) for a, b in zip(one, other, strict=True))
    return bool(np.array_equal(one, other))


_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's generator": (torch.default_generator.get_state, torch.default_generator.set_state),
    "Python's generator": (random.getstate, random.setstate),
    "numpy's generator": (np.random.get_state, np.random.set_state),
}
