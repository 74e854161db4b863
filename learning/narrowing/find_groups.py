"""Finds the groups of channels that can be removed from a model.

torch-pruning (Fang et al., DepGraph, arXiv 2301.12900) follows the channels of each convolution and linear layer through the
model's autograd graph. Its result is read once, as *claims*: an index in a dimension of a tensor belongs to a channel. Channels
that claim the same index become one channel (positions of a map that is unflattened, tied tensors), and channels that occur in
the same dimensions become one group. Only layers whose arithmetic is known are narrowed, and ``check_groups`` tries the result.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from ..parts.channels import ChannelGroups
from ..randomness import preserved_rng
from ..resolve import error_line
from .check_groups import Probe, hollow_copy, meta_copy

Index = NDArray[np.int64]
Dimension = tuple[str, int]  # a tensor's first name, and one of its dimensions
_MOST_ELEMENTS = 1 << 22  # of a weight that an operation may copy densely while the model is followed
_OUTPUTS = "its channels are the model's outputs"


def find_groups(model: nn.Module, inputs: Tensor) -> ChannelGroups:
    """Find the removable channels of ``model``.

    ``inputs``: a batch that the model accepts in evaluation mode; the values of floating-point inputs do not matter. Model and
    inputs may be on the meta device. The model itself is never run and stays unchanged; what is run are copies of it without
    its parameters' values, and a full copy only if its code does not run on the meta device.

    Raises ``ValueError`` if no channel can be removed, or if torch-pruning fails on the model.
    """
    with preserved_rng(), warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # from the model's code, which repeats them in training, and from torch-pruning
        claims, shapes = _trace(model, inputs)
        groups = _group(model, claims)
        checked = Probe(model, inputs, shapes).accepted(groups) if groups.sizes else groups
    if not checked.sizes:
        reasons = [f"{layer!r} stays whole, since {why}" for layer, why in checked.whole.items() if why != _OUTPUTS]
        raise ValueError(
            f"this model cannot be narrowed: {next(iter(reasons), 'it has no channels but those of its inputs and outputs')}"
        )
    return checked


@dataclass
class _Claims:
    """Claims of the channels of one model. Channels are numbered as they are found.

    ``names``: all names of each tensor, by ``id``, in the order of the state dict. ``pairs``: arrays of indices and of the
    channels that claim them. ``sizes``: of each claimed dimension. ``layers``, ``reasons``: of each channel the layer where it
    was found, and why it must stay, or "". ``seen``: output channels of each layer that belong to a group.
    """

    names: dict[int, list[str]]
    pairs: dict[Dimension, list[tuple[Index, Index]]] = field(default_factory=dict)
    sizes: dict[Dimension, int] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seen: dict[nn.Module, set[int]] = field(default_factory=dict)

    def add(self, tensor: Tensor, dimension: int, index: Index, channel: Index) -> str:
        """Add claims. Returns why they are not possible; "" if they are."""
        key, size = (self.names[id(tensor)][0], dimension), tensor.shape[dimension]
        if size == 1:  # it is broadcast over the channels of other layers
            return ""
        if index.size and index.max() >= size:
            return f"its channels do not fit those of {key[0]!r}"
        self.pairs.setdefault(key, []).append((index, channel))
        self.sizes[key] = size
        return ""

    def owners(self) -> dict[Dimension, Index]:
        """The channel of each index, or -1, in the order of the state dict.

        Channels that claim the same index become one, with the lowest of their numbers and the first of their reasons.
        """
        order = [(names[0], dimension) for names in self.names.values() for dimension in (0, 1)]
        found = {key: np.concatenate(self.pairs[key], axis=1) for key in order if key in self.pairs}
        owners = {key: np.full(self.sizes[key], -1) for key in found}
        links = []
        for key, (index, channel) in found.items():
            owners[key][index] = channel  # one of those that claim it
            links.append(np.stack([owners[key][index], channel]))
        one, other = np.concatenate([np.empty((2, 0), np.int64), *links], axis=1)
        numbers, before = np.arange(len(self.reasons)), None
        while before is None or (numbers != before).any():
            before, lowest = numbers.copy(), np.minimum(numbers[one], numbers[other])
            np.minimum.at(numbers, one, lowest)
            np.minimum.at(numbers, other, lowest)
        for channel, number in enumerate(numbers.tolist()):
            self.reasons[number] = self.reasons[number] or self.reasons[channel]
        return {key: np.append(numbers, -1)[owner] for key, owner in owners.items()}


def _trace(model: nn.Module, inputs: Tensor) -> tuple[_Claims, list[tuple[int, ...]]]:
    """The claims of the model's channels, and the shapes of its outputs."""
    largest = max((parameter.numel() for parameter in model.parameters()), default=0)
    tries: list[tuple[Callable[[nn.Module], nn.Module], Tensor]] = [
        (meta_copy, torch.empty_like(inputs, device="meta"))
    ]
    if largest <= _MOST_ELEMENTS:
        tries.insert(0, (hollow_copy, torch.zeros_like(inputs, device="cpu")))
    for copied, values in tries:
        try:
            return _read(copied(model), values)
        except Exception as error:  # a user's code may raise anything, and torch-pruning raises many types itself
            fault = error
    if not inputs.is_meta:  # the model's code may need values
        try:
            return _read(deepcopy(model), inputs.clone())
        except Exception as error:
            fault = error
    raise ValueError(f"this model cannot be narrowed: its channels cannot be followed: {error_line(fault)}") from fault


def _read(copy: nn.Module, inputs: Tensor) -> tuple[_Claims, list[tuple[int, ...]]]:
    """Build torch-pruning's graph of ``copy``, which is changed, and read the groups of all layers."""
    from torch_pruning import DependencyGraph

    for parameter in copy.parameters():  # the graph is autograd's, in which frozen layers are missing
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    shapes: list[tuple[int, ...]] = []

    def outputs(result: Any) -> list[Tensor]:
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        shapes.extend(tuple(leaf.shape) for leaf in leaves)
        # The product is an operation of its own: what is an output is not at the same time a value inside the model.
        return [leaf * 1 for leaf in leaves if leaf.requires_grad]

    with torch.enable_grad():
        graph = DependencyGraph().build_dependency(
            copy, inputs, forward_fn=lambda module, x: module(x), output_transform=outputs, verbose=False
        )
    claims = _Claims({})
    for name, tensor in copy.state_dict(keep_vars=True).items():
        claims.names.setdefault(id(tensor), []).append(name)
    layers, opaque = {module: name for name, module in copy.named_modules()}, _block_reshapes(graph)
    for module in layers:
        # A layer with a single output channel would claim the first channel only of a layer that it is multiplied with.
        size = _num_outputs(module) if isinstance(module, _ConvNd | nn.Linear) and module in graph.module2node else 0
        if size > 1 and len(claims.seen.get(module, ())) < size:
            _read_group(claims, graph, module, layers, opaque)
    return claims, shapes


def _block_reshapes(graph: Any) -> set[nn.Module]:
    """Stop at each reshape of ``graph`` that is not a known one; returns them.

    torch-pruning takes every reshape for one that flattens or unflattens maps [n, channels, ...]. At others, as of windows of
    attention, its indices are wrong, and can multiply until memory is full.
    """
    found: set[nn.Module] = set()
    for module, node in graph.module2node.items():
        mappings = [mapping for dependency in node.dependencies for mapping in dependency.index_mapping]
        strides = {mapping._stride for mapping in mappings if hasattr(mapping, "_stride")}
        sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
        is_reshape = type(module).__name__ == "_ReshapeOp"  # its neighbours have mappings too
        if is_reshape and strides and len(sizes) != 2 and strides != {prod(sizes[2:])}:
            node.dependencies.clear()
            found.add(module)
    return found


def _num_outputs(module: nn.Module) -> int:
    size = module.out_channels if isinstance(module, _ConvNd) else module.out_features
    assert isinstance(size, int)
    return size


def _read_group(
    claims: _Claims, graph: Any, module: nn.Module, layers: Mapping[nn.Module, str], opaque: Collection[nn.Module]
) -> None:
    """Add the claims of the output channels of ``module``."""
    first, size, reasons = len(claims.reasons), _num_outputs(module), list[str]()
    for target, is_output, index, channel in _follow(graph, module):
        fields, reason = _dimensions(target, layers.get(target, ""), out=is_output)
        reasons.append("its channels are reshaped in an unknown way" if target in opaque else reason)
        if is_output:
            claims.seen.setdefault(target, set()).update(index.tolist())
        for name, dimension in fields.items():
            if (tensor := getattr(target, name)) is not None:
                reasons.append(claims.add(tensor, dimension, index, channel + first))
    reason = _OUTPUTS if _OUTPUTS in reasons else next(filter(None, reasons), "")
    claims.reasons += [reason] * size
    claims.layers += [layers[module]] * size


class _Pair(NamedTuple):
    """An index and the channel that it belongs to, by the names that torch-pruning's mappings of indices use."""

    idx: int
    root_idx: int


def _follow(graph: Any, module: nn.Module) -> Iterator[tuple[Any, bool, Index, Index]]:
    """Follow the output channels of ``module`` through the graph.

    Returns each module that they reach, whether its outputs or its inputs hold them, and pairs of an index there and a channel.
    (torch-pruning's own groups name a single channel for each index, even if several are coupled there.)
    """
    size, pruner = _num_outputs(module), graph.get_pruner_of_module(module)
    reached: dict[tuple[Any, Any], Index] = {}  # by node and pruning function: pairs as numbers
    waiting = [(graph.module2node[module], pruner.prune_out_channels, np.arange(size) * (size + 1))]
    while waiting:
        node, function, pairs = waiting.pop()
        known = reached.get((node, function), pairs[:0])
        fresh = np.setdiff1d(pairs, known)
        if not fresh.size:
            continue
        reached[node, function] = np.concatenate([known, fresh])
        for dependency in node.dependencies:
            if dependency.is_triggered_by(function):
                waiting.append((dependency.target, dependency.handler, _mapped(fresh, size, dependency.index_mapping)))
    for (node, function), pairs in reached.items():
        yield node.module, function.__name__ == pruner.prune_out_channels.__name__, *np.divmod(pairs, size)


def _mapped(pairs: Index, size: int, mappings: Iterable[Any]) -> Index:
    """Pairs (index * size + channel) after one of torch-pruning's mappings of indices or several."""
    for mapping in filter(None, mappings):
        mapped = mapping([_Pair(*divmod(pair, size)) for pair in pairs.tolist()])
        pairs = np.array([pair.idx * size + pair.root_idx for pair in mapped], dtype=np.int64)
    return pairs


def _dimensions(target: Any, name: str, *, out: bool) -> tuple[dict[str, int], str]:
    """The tensors of a module that hold its output (or input) channels, with their dimension; and why it cannot be narrowed.

    ``target``: a module, one of torch-pruning's operations, or a parameter that belongs to no layer of torch's own.
    """
    if isinstance(target, nn.Parameter):
        return {}, "its channels reach a parameter that belongs to no layer of torch's own"
    if type(target).__module__.startswith("torch_pruning."):
        return {}, _OUTPUTS if type(target).__name__ == "_OutputOp" else ""
    fields, others, is_known = {"weight": 0, "bias": 0}, {"weight", "bias"}, True
    if isinstance(target, _ConvNd):
        depthwise = target.groups > 1 and target.groups == target.in_channels == target.out_channels
        is_known = (target.groups == 1 or depthwise) and not isinstance(target, _ConvTransposeNd)
        fields = fields if out or depthwise else {"weight": 1}
    elif isinstance(target, nn.Linear):
        fields = fields if out else {"weight": 1}
    elif isinstance(target, _BatchNorm | _InstanceNorm):
        fields = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
        others = {"num_batches_tracked"}
    elif isinstance(target, nn.PReLU):
        fields = {"weight": 0}
    else:
        is_known = isinstance(target, nn.GroupNorm) and target.num_groups == 1
        is_known |= isinstance(target, nn.LayerNorm) and len(target.normalized_shape) == 1
    own = {key for key, tensor in (target._parameters | target._buffers).items() if tensor is not None}
    if is_known and own & fields.keys() and own <= fields.keys() | others:
        return fields, ""
    return {}, f"its channels reach {name!r}, a {type(target).__name__} that cannot be narrowed"


def _group(model: nn.Module, claims: _Claims) -> ChannelGroups:
    """Group the channels by the dimensions in which they occur, and number them group after group."""
    owners = claims.owners()
    # Each dimension has a random number. Their sum stands for the set of dimensions in which a channel occurs, and how often.
    signs = np.random.default_rng(0).integers(1 << 63, size=len(owners), dtype=np.uint64)
    sums = np.zeros(len(claims.reasons), np.uint64)
    for sign, owner in zip(signs, owners.values(), strict=True):
        np.add.at(sums, owner[owner >= 0], sign)
    whole = {layer: why for layer, why in zip(claims.layers, claims.reasons, strict=True) if why}
    members: dict[int, dict[int, None]] = {}
    producers: dict[int, list[str]] = {}
    scales: dict[int, list[str]] = {}
    for (name, dimension), owner in owners.items():
        layer, _, tensor = name.rpartition(".")
        module = model.get_submodule(layer)
        if (dimension, tensor) == (0, "weight") and isinstance(module, _ConvNd | nn.Linear | _BatchNorm):
            channels, first = np.unique(owner[owner >= 0], return_index=True)
            for channel in channels[np.argsort(first)].tolist():
                if why := claims.reasons[channel]:
                    whole.setdefault(layer, why)
                    continue
                group = int(sums[channel])
                members.setdefault(group, {})[channel] = None
                names = (scales if isinstance(module, _BatchNorm) else producers).setdefault(group, [])
                names += [] if name in names else [name]
    numbers = np.full(len(claims.reasons) + 1, -1, np.int32)  # the last one stands for the owner -1
    numbers[[channel for group in members.values() for channel in group]] = np.arange(sum(map(len, members.values())))
    named: dict[str, dict[int, NDArray[np.int32]]] = {}
    for names in claims.names.values():
        found = {d: numbers[owners[names[0], d]] for d in (0, 1) if (names[0], d) in owners}
        named |= {name: {d: owner for d, owner in found.items() if (owner >= 0).any()} for name in names}
    groups = ChannelGroups(
        names=tuple(producers[group][0].rpartition(".")[0] for group in members),
        sizes=tuple(len(group) for group in members.values()),
        owners={name: dimensions for name, dimensions in named.items() if dimensions},
        producers=tuple(tuple(producers[group]) for group in members),
        scales=tuple(tuple(scales.get(group, ())) for group in members),
        whole=whole,
    )
    single = [group for group, size in enumerate(groups.sizes) if size == 1]
    return groups.without(dict.fromkeys(single, "it has a single channel of its kind"))
