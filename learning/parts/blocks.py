"""Cuts a model that torch.fx can trace into ordered, named blocks that run one after the other.

``cuts`` decides where. Blocks share the parameters and the tensor names of the model: nothing is copied, and training a block
trains the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from ..sparse.layers import sparse_layers
from ..tensors import numpy_name
from .cuts import attribute, block_names, cut_positions, uncut_reason, used_tensors, weight_layer
from .structure import BlockSpec, ModelSpec, Role, TensorSpec, frozen_names
from .trace import FLAG, TracedModel, TrainingFlag, trace
from .trace_guard import Untraceable


@dataclass(frozen=True)
class Blocks:
    """A model in blocks.

    ``modules``: one runnable module per block, in order; together their state dicts are the model's, name by name.
    ``spec``: names, shapes and roles of the tensors. ``reason``: why the model could not be cut, if it is a single block; else
    "". Set modes by ``train()`` and ``eval()`` on the modules, or on the model as a whole.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    spec: ModelSpec
    reason: str = ""
    _traced: TracedModel | None = None
    _cuts: tuple[int, ...] = ()

    def run(self, names: Iterable[str], x: Any) -> Any:
        """Run the named blocks on ``x``, one after the other in the given order."""
        for name in names:
            x = self.modules[name](x)
        return x


def cut(model: nn.Module) -> Blocks:
    """Cut ``model`` into as many blocks as there are clean positions before its weight layers (see ``cuts``).

    All blocks in sequence equal the model bit for bit, in training and evaluation mode. A model that cannot be traced
    becomes one block, named ``model``. Every model of one block has a ``reason``. Parameters and buffers that no operation
    uses belong to the last block. Tied tensors are listed once, under their first name. Raises ``ValueError`` for a tensor of a
    type that numpy, and so a packet, does not have.
    """
    try:
        traced = trace(model)
    except Untraceable as error:
        return Blocks(model, {"model": model}, _spec(model, {}, ["model"]), reason=str(error))
    cuts = cut_positions(model, traced)
    blocks = _assemble(model, traced, cuts)
    return blocks if cuts else replace(blocks, reason=uncut_reason(model, traced))


def cut_like(blocks: Blocks, model: nn.Module) -> Blocks:
    """Cut ``model``, built like that of ``blocks``, at the same places: the same as ``cut``, without tracing it again."""
    if blocks._traced is None:
        return Blocks(model, {"model": model}, _spec(model, {}, ["model"]), reason=blocks.reason)
    traced = replace(blocks._traced, constants=deepcopy(blocks._traced.constants))
    return replace(_assemble(model, traced, blocks._cuts), reason=blocks.reason)


def model_spec(model: nn.Module) -> ModelSpec:
    """Names, shapes and roles of a model's tensors, block by block."""
    return cut(model).spec


def grouped(blocks: Blocks, num: int) -> Blocks:
    """Merge neighbouring blocks into ``num`` blocks, minimising the number of parameters of the largest one.

    Ties are resolved by the most even grouping (least sum of squares). Raises ``ValueError`` if there are fewer than ``num``
    blocks.
    """
    available = len(blocks.modules)
    if not 1 <= num <= available:
        why = f" ({blocks.reason})" if blocks.reason else ""
        raise ValueError(f"the number of blocks is {num}; this model can be cut into 1 to {available}{why}")
    if blocks._traced is None:
        return blocks
    sizes = [ModelSpec((block,)).parameters for block in blocks.spec.blocks]
    starts = _balanced(sizes, num)
    return _assemble(blocks.model, blocks._traced, tuple(blocks._cuts[start - 1] for start in starts[1:]))


def _balanced(sizes: Sequence[int], num: int) -> tuple[int, ...]:
    """The first index of each of ``num`` groups of neighbours, see ``grouped``."""
    Option = tuple[int, int, tuple[int, ...]]  # largest group, sum of squares, starts; smaller is better
    best: dict[int, Option] = {0: (0, 0, ())}  # by the number of blocks grouped so far
    for _ in range(num):
        options: dict[int, list[Option]] = {}
        for start, (largest, squares, starts) in best.items():
            for end in range(start + 1, len(sizes) + 1):
                size = sum(sizes[start:end])
                options.setdefault(end, []).append((max(largest, size), squares + size**2, (*starts, start)))
        best = {end: min(choices) for end, choices in options.items()}
    return best[len(sizes)][2]


def _assemble(model: nn.Module, traced: TracedModel, cuts: tuple[int, ...]) -> Blocks:
    """Build the blocks between ``cuts``."""
    *_, output = traced.nodes
    bounds = list(zip((1, *cuts), (*cuts, len(traced.nodes) - 1), strict=True))
    stretches = [traced.nodes[start:end] for start, end in bounds]
    names = block_names([[n for node in stretch if (n := weight_layer(model, node))] for stretch in stretches])
    modules: dict[str, nn.Module] = {}
    value, outside = traced.nodes[0], set(traced.nodes)
    for number, (name, stretch) in enumerate(zip(names, stretches, strict=True)):
        outside -= set(stretch)
        result = output.args[0] if name == names[-1] else _block_output([value, *stretch], outside)
        modules[name] = _block(model, traced, stretch, value=value, result=result, number=number)
        value = result if isinstance(result, fx.Node) else value
    owner = {id(t): name for name, nodes in zip(names, stretches, strict=True) for t in _tensors_of(model, nodes)}
    spec = _spec(model, owner, names)
    _attach_tensors(model, modules[names[-1]], [tensor.name for tensor in spec.blocks[-1].tensors])
    return Blocks(model, modules, spec, _traced=traced, _cuts=cuts)


def _block_output(nodes: Iterable[fx.Node], outside: set[fx.Node]) -> fx.Node:
    """The one value of ``nodes`` that the operations of later blocks (``outside``) use."""
    (value,) = [node for node in nodes if outside & node.users.keys()]
    return value


def _tensors_of(model: nn.Module, nodes: Iterable[fx.Node]) -> list[Tensor]:
    return [tensor for node in nodes for tensor in used_tensors(model, node).values()]


def _block(
    model: nn.Module, traced: TracedModel, stretch: Sequence[fx.Node], *, value: fx.Node, result: Any, number: int
) -> fx.GraphModule:
    """Build one block: input ``value``, operations ``stretch``, output ``result``."""
    graph = fx.Graph()
    copies = {value: graph.placeholder("x")}
    for node in stretch:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(result, copies.__getitem__))
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target == FLAG:
            node.target = f"{FLAG}_{number}"
            if not hasattr(model, node.target):  # added to the model too, so that its train() and eval() set it
                model.add_module(node.target, TrainingFlag().train(model.training))
        if node.op in ("call_module", "get_attr"):
            name = str(node.target)
            root[name] = traced.constants[name] if name in traced.constants else attribute(model, name)
    block = fx.GraphModule(root, graph)
    state = model.state_dict().keys()
    for name in [name for name, _ in block.named_buffers() if name not in state]:
        # torch.fx adds every tensor that it uses to the state dict; the model does not.
        owner, _, field = name.rpartition(".")
        tensor = block.get_buffer(name)
        delattr(block.get_submodule(owner), field)
        block.get_submodule(owner).register_buffer(field, tensor, persistent=False)
    return block.train(model.training)


def _attach_tensors(model: nn.Module, block: nn.Module, names: Iterable[str]) -> None:
    """Register the named tensors of ``model`` in ``block``, except those that it has already."""
    for name in set(names) - block.state_dict().keys():
        *path, field = name.split(".")
        owner = block
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        tensor = attribute(model, name)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(field, tensor)
        else:
            owner.register_buffer(field, tensor)


def _spec(model: nn.Module, owner: Mapping[int, str], names: Sequence[str]) -> ModelSpec:
    """Specification of the model. ``owner``: block of each tensor, by ``id``; the default is the last of ``names``."""
    tensors: dict[str, list[TensorSpec]] = {name: [] for name in names}
    listed, frozen = set[int](), frozen_names(model)
    sparse = {f"{name}.weight".lstrip(".") for name, _ in sparse_layers(model)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in listed:
            listed.add(id(tensor))
            tensors[owner.get(id(tensor), names[-1])].append(
                tensor_spec(name, tensor, frozen=name in frozen, sparse=name in sparse)
            )
    return ModelSpec(tuple(BlockSpec(name, tuple(specs)) for name, specs in tensors.items()))


def tensor_spec(name: str, tensor: Tensor, *, frozen: bool = False, sparse: bool = False) -> TensorSpec:
    """Describe a parameter or buffer. ``sparse``: it is the weight of a layer with sparse products.

    Raises ``ValueError`` for a type that numpy, and so a packet, does not have.
    """
    role: Role = "statistic" if tensor.is_floating_point() else "counter"
    if isinstance(tensor, nn.Parameter):
        role = "sparse" if sparse else "weight" if tensor.dim() > 1 else "vector"
    try:
        dtype = numpy_name(tensor.dtype)
    except TypeError as error:
        dtype_name = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"model: {name!r} is of type {dtype_name}; it must be one that numpy has, such as float32"
        ) from error
    return TensorSpec(name, tuple(tensor.shape), dtype, role, frozen=frozen)
