"""Chooses the positions at which a traced model is cut.

A position between two operations is *clean* if exactly one value is live there (one side passes a single tensor to the other)
and no tensor is used on both sides (tied weights). The model is cut at the last clean position before each weight layer, which
is an operation with a weight of two or more dimensions. Operations without such weights (normalisation, activation, pooling)
therefore belong to the block of the layer before them, and a residual block, which has no clean position inside, is not cut.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from .trace import FLAG, TracedModel

# The output of these is not a single tensor, so it cannot cross a cut.
TUPLE_MODULES = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)


def cut_positions(model: nn.Module, traced: TracedModel) -> tuple[int, ...]:
    """Indices of the operations before which the model is cut."""
    clean = _clean(model, traced.nodes)
    weight_layers = [index for index, node in enumerate(traced.nodes) if weight_layer(model, node)]
    chosen = []
    for previous, index in pairwise(weight_layers):
        candidates = [position for position in range(previous + 1, index + 1) if clean[position]]
        chosen += candidates[-1:]
    return tuple(chosen)


def uncut_reason(model: nn.Module, traced: TracedModel) -> str:
    """Why a traced model has no position to be cut at, as the end of a sentence that begins with "it cannot be cut:"."""
    nodes = traced.nodes
    weight_layers = [index for index, node in enumerate(nodes) if weight_layer(model, node)]
    if len(weight_layers) < 2:
        return f"it has {'only one' if weight_layers else 'no'} layer with weights of two or more dimensions"
    single = _single(model, nodes)
    between = [position for position in range(weight_layers[0] + 1, weight_layers[-1] + 1) if single[position]]
    if not between:
        return "nowhere between its layers with weights is a single tensor passed on"
    spans = _spans(model, nodes)
    names = [name for name, first, last in spans if any(first < position <= last for position in between)]
    listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"every possible cut has these on both sides: {listed} (tied weights, or one dropout module for all)"


def block_names(weight_layers: Sequence[Sequence[str]]) -> list[str]:
    """A unique name for each block, from the names of its weight layers.

    It is the longest dotted prefix that they share (``layer1.0`` for ``layer1.0.conv1`` and ``layer1.0.conv2``), if no weight
    layer of another block has this prefix; else the name of the first one. A model without weights is one block, ``model``.
    """
    names = []
    for layers in weight_layers:
        others = [name for other in weight_layers if other is not layers for name in other]
        prefix = _common_prefix(layers)
        is_unique = prefix and not any(f"{name}.".startswith(f"{prefix}.") for name in others)
        names.append(prefix if is_unique else next(iter(layers), "model"))
    return names


def _common_prefix(names: Sequence[str]) -> str:
    steps = []
    for together in zip(*(name.split(".") for name in names), strict=False):
        if len(set(together)) > 1:
            break
        steps.append(together[0])
    return ".".join(steps)


def used_tensors(model: nn.Module, node: fx.Node) -> dict[str, Tensor]:
    """The model's tensors that an operation uses, by name."""
    if node.op == "get_attr":
        value = attribute(model, str(node.target))
        return {str(node.target): value} if isinstance(value, Tensor) else {}
    if (module := called_module(model, node)) is None:
        return {}
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named |= dict(module.named_buffers(remove_duplicate=False))
    return {f"{node.target}.{name}": tensor for name, tensor in named.items()}


def called_module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module of the model that an operation calls; None if it calls none."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" and node.target != FLAG else None


def attribute(model: nn.Module, path: str) -> Any:
    """The attribute at the dotted ``path`` in the model; None if there is none."""
    owner, _, field = path.rpartition(".")
    return getattr(model.get_submodule(owner), field, None)


def weight_layer(model: nn.Module, node: fx.Node) -> str:
    """Name of the layer or parameter if the operation has a weight of two or more dimensions, else ""."""
    wide = [t for t in used_tensors(model, node).values() if isinstance(t, nn.Parameter) and t.dim() > 1]
    return str(node.target) if wide else ""


def _clean(model: nn.Module, nodes: Sequence[fx.Node]) -> list[bool]:
    """For each operation, whether a cut right before it is clean."""
    clean = _single(model, nodes)
    for _, first, last in _spans(model, nodes):
        clean[first + 1 : last + 1] = [False] * (last - first)
    return clean


def _single(model: nn.Module, nodes: Sequence[fx.Node]) -> list[bool]:
    """For each operation, whether a single tensor is live right before it."""
    position = {node: index for index, node in enumerate(nodes)}
    live: list[list[fx.Node]] = [[] for _ in nodes]
    for node in nodes:
        last = max((position[user] for user in node.users), default=-1)
        for index in range(position[node] + 1, last + 1):
            live[index].append(node)
    return [len(values) == 1 and not isinstance(called_module(model, values[0]), TUPLE_MODULES) for values in live]


def _spans(model: nn.Module, nodes: Sequence[fx.Node]) -> Iterable[tuple[str, int, int]]:
    """Name, first and last use of each tensor and module that must not be used on both sides of a cut."""
    spans: dict[int, tuple[str, int, int]] = {}
    for index, node in enumerate(nodes):
        used: dict[str, object] = dict(used_tensors(model, node))
        module = called_module(model, node)
        # A dropout module used in two blocks: evaluation mode of the frozen one would switch it off in the other one too.
        used |= {str(node.target): module} if isinstance(module, _DropoutNd) else {}
        for name, value in used.items():
            first_name, first, _ = spans.get(id(value), (name, index, index))
            spans[id(value)] = first_name, first, index
    return spans.values()
