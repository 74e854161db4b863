"""Compares the blocks of a model with the model itself, on a few samples, before a policy cuts it.

``trace_guard`` detects many things that tracing loses. It cannot detect code that branches on the type of its input, which is a
symbol while tracing (``isinstance(x, Tensor)``, ``hasattr``), or a ``torch.autograd.Function``, whose forward pass is not
recorded as an operation. These change the output, or the graph that autograd builds.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..randomness import seeded
from ..resolve import error_line
from ..tensors import dense
from .blocks import Blocks
from .module_state import ModuleState

# Relative to the largest value. Equal operations give equal bits, except in kernels without a fixed order of summation.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Pass:
    """Result of a forward pass: output, operations in autograd's graph, and the buffers afterwards."""

    leaves: list[Any]
    structure: Any
    graph: Counter[str]
    buffers: dict[str, Tensor]


def blocks_difference(blocks: Blocks, x: Tensor) -> str:
    """Describe how the blocks differ from the model on a batch ``x``, in training or evaluation mode; "" if they do not.

    The model is left unchanged. Raises what the model itself raises on ``x``.
    """
    for train in (True, False):
        whole = _forward(blocks, blocks.model, x, train=train)
        try:
            in_blocks = _forward(blocks, lambda value: blocks.run(blocks.modules, value), x, train=train)
        except Exception as error:  # a user's code may raise anything
            return f"its blocks fail where the model does not: {error_line(error)}"
        if difference := _difference(whole, in_blocks):
            return difference
    return ""


def _forward(blocks: Blocks, run: Callable[[Tensor], Any], x: Tensor, *, train: bool) -> _Pass:
    """One forward pass, always with the same attributes, buffers and random numbers; the model is restored afterwards."""
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
    """Number of times each operation is in autograd's graph of these tensors; parameters are distinguished by ``id``."""
    pending = [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor)]
    seen: set[Any] = set()
    counts: Counter[str] = Counter()
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().rpartition("::")[2]
        counts[f"{name} {id(node.variable)}" if name == "AccumulateGrad" else name] += 1
        pending += [following for following, _ in node.next_functions]
    return counts


def _difference(whole: _Pass, in_blocks: _Pass) -> str:
    """Describe the first difference; "" if there is none."""
    if whole.structure != in_blocks.structure or not all(map(_close, whole.leaves, in_blocks.leaves)):
        return "the output of its blocks differs from the model's (its code may depend on the type of its input)"
    if whole.graph != in_blocks.graph:
        missing, more = whole.graph - in_blocks.graph, in_blocks.graph - whole.graph
        names = sorted({name.partition(" ")[0] for name in (missing or more)})
        difference = f"{'lacks' if missing else 'adds'} {', '.join(names)}"
        return f"the backward pass of its blocks differs from the model's: it {difference}"
    changed = [name for name, buffer in whole.buffers.items() if not _close(buffer, in_blocks.buffers[name])]
    return f"the buffer {changed[0]!r} differs from the model's after its blocks have run" if changed else ""


def _close(one: Any, other: Any) -> bool:
    """Whether two values are equal up to rounding."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
        return False
    one, other = dense(one), dense(other)
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one.detach().abs().nan_to_num(0, 0, 0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)
