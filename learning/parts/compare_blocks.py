"""Whether the blocks of a model in sequence do what the model does, tried on a few samples before anything is cut.

``learning.unrecorded`` notices while a model is traced what it knows tracing to lose. Code that takes another way because its
input is a symbol (``isinstance(x, Tensor)``, ``hasattr``), or a ``torch.autograd.Function`` whose forward pass is no operation,
cannot be noticed there, but shows in what comes out, or in the graph that autograd builds.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..randomness import seeded
from ..resolve import told
from ..tensors import dense
from .blocks import Blocks
from .module_state import ModuleState

# Of the largest value. The same operations on the same numbers give equal bits, except where a kernel adds in no fixed order.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Pass:
    """A forward pass: what came out, the operations that a backward pass would go through, and the buffers afterwards."""

    leaves: list[Any]
    structure: Any
    graph: Counter[str]
    buffers: dict[str, Tensor]


def lost_in_blocks(blocks: Blocks, x: Tensor) -> str:
    """What the blocks do otherwise than the model, in training or evaluation, on a batch ``x``; "" where nothing is.

    The model is left as it was. Raises what the model itself raises on ``x``.
    """
    for train in (True, False):
        whole = _forward(blocks, blocks.model, x, train=train)
        try:
            parts = _forward(blocks, lambda value: blocks.run(blocks.modules, value), x, train=train)
        except Exception as error:  # of a user's code: anything
            return f"its blocks fail where the model does not: {told(error)}"
        if difference := _difference(whole, parts):
            return difference
    return ""


def _forward(blocks: Blocks, run: Callable[[Tensor], Any], x: Tensor, *, train: bool) -> _Pass:
    """One forward pass, from the same attributes, buffers and random numbers each time."""
    state = ModuleState(blocks.model, values=True)
    blocks.model.train(train)
    try:
        with seeded(0), torch.enable_grad():
            leaves, structure = tree_flatten(run(x))
        buffers = {name: buffer.detach().clone() for name, buffer in blocks.model.named_buffers()}
    finally:
        state.restore()
    return _Pass(leaves, structure, _graph(leaves), buffers)


def _graph(leaves: list[Any]) -> Counter[str]:
    """How often each operation is in the graph behind these tensors; the parameters at its ends by their place in memory."""
    left = [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor)]
    seen: set[Any] = set()
    found: Counter[str] = Counter()
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().rpartition("::")[2]
        found[f"{name} {id(node.variable)}" if name == "AccumulateGrad" else name] += 1
        left += [following for following, _ in node.next_functions]
    return found


def _difference(whole: _Pass, parts: _Pass) -> str:
    """The first thing that is different, in words."""
    if whole.structure != parts.structure or not all(map(_alike, whole.leaves, parts.leaves)):
        return "what its blocks give is not what the model gives (its code may look at the type of its input)"
    if whole.graph != parts.graph:
        missing, more = whole.graph - parts.graph, parts.graph - whole.graph
        names = sorted({name.partition(" ")[0] for name in (missing or more)})
        return f"gradients go another way in its blocks, which {'lack' if missing else 'add'} {', '.join(names)}"
    changed = [name for name, buffer in whole.buffers.items() if not _alike(buffer, parts.buffers[name])]
    return f"its blocks leave another {changed[0]!r} than the model" if changed else ""


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are the same up to rounding."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
        return False
    one, other = dense(one), dense(other)
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one.detach().abs().nan_to_num(0, 0, 0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)
