"""Where a traced model may be cut, and where it should be.

A place between two operations is *clean* when exactly one value is live there (what one side hands to the other is a
single tensor) and no tensor is used on both sides (tied weights). Of the clean places we take the last one before each
weight layer: an operation with a weight of two or more dimensions. Stretches without such weights (normalisation,
activation, pooling) therefore stay with what is before them, and a residual block, which has no clean place inside, whole.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from .trace import FLAG, Trace

# What these return is not one tensor, so it cannot be handed over.
TUPLE_MODULES = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)


def places(model: nn.Module, found: Trace) -> tuple[int, ...]:
    """Indices of the operations before which the model is cut."""
    clean = _clean(model, found.nodes)
    heavy = [index for index, node in enumerate(found.nodes) if weight_layer(model, node)]
    chosen = []
    for previous, index in pairwise(heavy):
        candidates = [place for place in range(previous + 1, index + 1) if clean[place]]
        chosen += candidates[-1:]
    return tuple(chosen)


def why_whole(model: nn.Module, found: Trace) -> str:
    """Why a traced model has no place to be cut at, as the end of a sentence that begins with "it cannot be cut:"."""
    nodes = found.nodes
    heavy = [index for index, node in enumerate(nodes) if weight_layer(model, node)]
    if len(heavy) < 2:
        return f"it has {'only one' if heavy else 'no'} layer with weights of two or more dimensions"
    single = _single(model, nodes)
    between = [place for place in range(heavy[0] + 1, heavy[-1] + 1) if single[place]]
    if not between:
        return "nowhere between its layers with weights is one tensor all that is handed on"
    spans = _spans(model, nodes)
    names = [name for name, first, last in spans if any(first < place <= last for place in between)]
    listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"what it uses on both sides of every such place: {listed} (tied weights, or one dropout for all)"


def block_names(weight_layers: Sequence[Sequence[str]]) -> list[str]:
    """A unique name for each block, from the names of its weight layers.

    The longest dotted prefix that they share (``layer1.0`` for ``layer1.0.conv1`` and ``layer1.0.conv2``), if no weight layer
    of another block is under it; else the name of the first. ``model`` for the one block of a model without weights.
    """
    names = []
    for layers in weight_layers:
        others = [name for other in weight_layers if other is not layers for name in other]
        prefix = _common_prefix(layers)
        alone = prefix and not any(f"{name}.".startswith(f"{prefix}.") for name in others)
        names.append(prefix if alone else next(iter(layers), "model"))
    return names


def _common_prefix(names: Sequence[str]) -> str:
    steps = []
    for together in zip(*(name.split(".") for name in names), strict=False):
        if len(set(together)) > 1:
            break
        steps.append(together[0])
    return ".".join(steps)


def used_tensors(model: nn.Module, node: fx.Node) -> dict[str, Tensor]:
    """Tensors of the model that an operation uses, by name."""
    if node.op == "get_attr":
        value = attribute(model, str(node.target))
        return {str(node.target): value} if isinstance(value, Tensor) else {}
    if (module := called_module(model, node)) is None:
        return {}
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named |= dict(module.named_buffers(remove_duplicate=False))
    return {f"{node.target}.{name}": tensor for name, tensor in named.items()}


def called_module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module of the model that an operation calls, if it does."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" and node.target != FLAG else None


def attribute(model: nn.Module, path: str) -> Any:
    """What the dotted ``path`` names in the model; None when there is nothing."""
    owner, _, field = path.rpartition(".")
    return getattr(model.get_submodule(owner), field, None)


def weight_layer(model: nn.Module, node: fx.Node) -> str:
    """Name of the layer, or of the bare parameter, that makes an operation a weight layer; "" when it is none."""
    wide = [t for t in used_tensors(model, node).values() if isinstance(t, nn.Parameter) and t.dim() > 1]
    return str(node.target) if wide else ""


def _clean(model: nn.Module, nodes: Sequence[fx.Node]) -> list[bool]:
    """For each operation, whether a cut right before it is clean."""
    clean = _single(model, nodes)
    for _, first, last in _spans(model, nodes):
        clean[first + 1 : last + 1] = [False] * (last - first)
    return clean


def _single(model: nn.Module, nodes: Sequence[fx.Node]) -> list[bool]:
    """For each operation, whether one tensor is all that is live right before it."""
    position = {node: index for index, node in enumerate(nodes)}
    live: list[list[fx.Node]] = [[] for _ in nodes]
    for node in nodes:
        last = max((position[user] for user in node.users), default=-1)
        for index in range(position[node] + 1, last + 1):
            live[index].append(node)
    return [len(values) == 1 and not isinstance(called_module(model, values[0]), TUPLE_MODULES) for values in live]


def _spans(model: nn.Module, nodes: Sequence[fx.Node]) -> Iterable[tuple[str, int, int]]:
    """Name, first and last use of everything that must not be used on both sides of a cut."""
    spans: dict[int, tuple[str, int, int]] = {}
    for index, node in enumerate(nodes):
        things: dict[str, object] = dict(used_tensors(model, node))
        module = called_module(model, node)
        # One dropout used everywhere: a frozen block in evaluation mode would switch it off in the next one too.
        things |= {str(node.target): module} if isinstance(module, _DropoutNd) else {}
        for name, thing in things.items():
            known, first, _ = spans.get(id(thing), (name, index, index))
            spans[id(thing)] = known, first, index
    return spans.values()
