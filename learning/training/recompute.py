"""Activation checkpointing: a block keeps only its input, and is computed again in the backward pass.

    forward    y = block(x); of all tensors that autograd saves, only their places in the order are kept
    backward   at the first saved tensor that is needed: block(x) again, from the same random state and buffers; what it saves
               takes the places of what was not kept

This is the method of Chen et al. (arXiv 1604.06174, sec. 3), with one segment for each block. The gradients are the same bits
as without it: the second pass draws the same random numbers (dropout), starts from the buffers of the first one, and leaves no
trace in random state and buffers (running statistics are updated once).

``torch.utils.checkpoint`` is not used, since its first call imports torch's compiler: seconds, and more than 100 MB, which
under a memory limit belong to the plan. It does not restore buffers either.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from ..parts.blocks import Blocks
from ..randomness import preserved_rng
from ..spec import Precision
from .precision import autocast


def run_blocks(blocks: Blocks, names: Sequence[str], x: Any, *, precision: Precision) -> Any:
    """Run the named blocks on ``x``, as ``Blocks.run`` does, and have those with trainable parameters recomputed."""
    for name in names:
        module = blocks.modules[name]
        x = (
            recomputed(module, x, buffers=list(module.buffers()), precision=precision)
            if is_trained(module)
            else module(x)
        )
    return x


def call_with(module: nn.Module, state: dict[str, Tensor], x: Any) -> Any:
    """``module(x)`` with the tensors of ``state`` in place of its own. A tuple is one argument: blocks may exchange such."""
    return functional_call(module, state, (x,))


def is_trained(module: nn.Module) -> bool:
    """Whether a module has parameters that get gradients."""
    return any(parameter.requires_grad for parameter in module.parameters())


def recomputed(call: Callable[[Any], Any], x: Any, *, buffers: Sequence[Tensor], precision: Precision) -> Any:
    """``call(x)``, of which nothing but ``x`` is kept for the backward pass, where ``call(x)`` is computed again.

    ``buffers``: all tensors that ``call`` changes in place. ``precision``: of the forward pass, whose autocast is active.
    """
    start = [buffer.detach().clone() for buffer in buffers]
    random_state = torch.default_generator.get_state()
    places = 0  # tensors that autograd has saved, in order
    found: dict[int, Tensor] = {}  # those of the second pass that have not been used yet

    def pack(_: Tensor) -> int:
        nonlocal places
        places += 1
        return places - 1

    def unpack(place: int) -> Tensor:
        if place not in found:  # also if a graph is walked through again
            entering = x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            with preserved_rng(), _holding(buffers, start), torch.enable_grad(), autocast(precision):
                torch.default_generator.set_state(random_state)
                found.update(_saved(call, entering, places))
        return found.pop(place)

    with saved_tensors_hooks(pack, unpack):
        return call(x)


class _AllSaved(Exception):
    """Ends the second pass behind the last tensor that is needed."""


def _saved(call: Callable[[Any], Any], x: Any, count: int) -> dict[int, Tensor]:
    """The ``count`` tensors that autograd saves for ``call(x)``, by their places in the order."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> None:
        saved.append(tensor.detach())
        if len(saved) == count:
            raise _AllSaved

    def unpack(_: None) -> Tensor:
        raise AssertionError("the graph of the second pass is never walked through")

    with suppress(_AllSaved), saved_tensors_hooks(pack, unpack):
        call(x)
    if len(saved) != count:
        raise RuntimeError(
            f"training.checkpointing: a block saved {count} tensors in its forward pass and {len(saved)} when it was computed "
            "again; it must do the same both times"
        )
    return dict(enumerate(saved))


@contextmanager
def _holding(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Set ``buffers`` to ``values``; afterwards they have their own values again."""
    own = [buffer.detach().clone() for buffer in buffers]
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, own, strict=True):
                buffer.copy_(value)
