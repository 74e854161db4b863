"""Any model that torch.fx can trace as ordered, named blocks that run one after the other.

Where it is cut is told in ``learning.cuts``. Blocks share the parameters and the tensor names of the model: nothing is
copied, and training a block trains the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from ..tensors import numpy_name
from .cuts import attribute, block_names, places, used_tensors, weight_layer, why_whole
from .frozen import frozen_names
from .structure import BlockSpec, ModelSpec, Role, TensorSpec
from .trace import FLAG, Trace, TrainingFlag, trace
from .unrecorded import Untraceable


@dataclass(frozen=True)
class Blocks:
    """A model in blocks.

    ``modules``: one runnable module per block, in order; together their states are the model's, name by name.
    ``spec``: names, shapes and roles. ``reason``: why the model is a single block, where it could not be cut; else "".
    Modes are set on the modules (or on the model as a whole) by ``train()`` and ``eval()``.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    spec: ModelSpec
    reason: str = ""
    _trace: Trace | None = None
    _cuts: tuple[int, ...] = ()

    def run(self, names: Iterable[str], x: Any) -> Any:
        """What the named blocks make of ``x``, one after the other in the order given."""
        for name in names:
            x = self.modules[name](x)
        return x


def cut(model: nn.Module) -> Blocks:
    """``model`` in as many blocks as there are clean places before its weight layers.

    All blocks in sequence equal the model bit for bit, in training and evaluation mode. A model that cannot be traced
    comes back as one block, named ``model``; it and any other model of one block have a ``reason``. Parameters and buffers that
    no operation uses belong to the last block. Tied tensors are listed once, under their first name. Raises ``ValueError`` for
    a tensor of a type that numpy, and so a packet, does not have.
    """
    try:
        found = trace(model)
    except Untraceable as error:
        return Blocks(model, {"model": model}, _spec(model, {}, ["model"]), reason=str(error))
    cuts = places(model, found)
    whole = _assemble(model, found, cuts)
    return whole if cuts else replace(whole, reason=why_whole(model, found))


def model_spec(model: nn.Module) -> ModelSpec:
    """Names, shapes and roles of a model's tensors, block by block."""
    return cut(model).spec


def grouped(blocks: Blocks, num: int) -> Blocks:
    """The same model in ``num`` blocks: neighbours merged so that the largest has as few parameters as can be.

    Among equals the most even grouping wins (least sum of squares). Raises ``ValueError`` when there are not so many blocks.
    """
    have = len(blocks.modules)
    if not 1 <= num <= have:
        why = f" ({blocks.reason})" if blocks.reason else ""
        raise ValueError(f"the number of blocks is {num}; this model can be cut into 1 to {have}{why}")
    if blocks._trace is None:
        return blocks
    sizes = [ModelSpec((block,)).parameters for block in blocks.spec.blocks]
    starts = _balanced(sizes, num)
    return _assemble(blocks.model, blocks._trace, tuple(blocks._cuts[start - 1] for start in starts[1:]))


def _balanced(sizes: Sequence[int], num: int) -> tuple[int, ...]:
    """Where each of ``num`` groups of neighbours starts."""
    Option = tuple[int, int, tuple[int, ...]]  # largest group, sum of squares, starts: in the order of preference
    best: dict[int, Option] = {0: (0, 0, ())}  # by the number of blocks that are grouped so far
    for _ in range(num):
        options: dict[int, list[Option]] = {}
        for start, (largest, squares, starts) in best.items():
            for end in range(start + 1, len(sizes) + 1):
                size = sum(sizes[start:end])
                options.setdefault(end, []).append((max(largest, size), squares + size**2, (*starts, start)))
        best = {end: min(choices) for end, choices in options.items()}
    return best[len(sizes)][2]


def _assemble(model: nn.Module, found: Trace, cuts: tuple[int, ...]) -> Blocks:
    """Build the blocks between ``cuts``."""
    *_, output = found.nodes
    bounds = list(zip((1, *cuts), (*cuts, len(found.nodes) - 1), strict=True))
    stretches = [found.nodes[start:end] for start, end in bounds]
    names = block_names([[n for node in stretch if (n := weight_layer(model, node))] for stretch in stretches])
    modules: dict[str, nn.Module] = {}
    value, outside = found.nodes[0], set(found.nodes)
    for number, (name, stretch) in enumerate(zip(names, stretches, strict=True)):
        outside -= set(stretch)
        result = output.args[0] if name == names[-1] else _handed_over([value, *stretch], outside)
        modules[name] = _block(model, found, stretch, value=value, result=result, number=number)
        value = result if isinstance(result, fx.Node) else value
    owner = {id(t): name for name, nodes in zip(names, stretches, strict=True) for t in _tensors_of(model, nodes)}
    spec = _spec(model, owner, names)
    _adopt(model, modules[names[-1]], [tensor.name for tensor in spec.blocks[-1].tensors])
    return Blocks(model, modules, spec, _trace=found, _cuts=cuts)


def _handed_over(nodes: Iterable[fx.Node], outside: set[fx.Node]) -> fx.Node:
    """The one value that later blocks use: ``outside`` are their operations."""
    (value,) = [node for node in nodes if outside & node.users.keys()]
    return value


def _tensors_of(model: nn.Module, nodes: Iterable[fx.Node]) -> list[Tensor]:
    return [tensor for node in nodes for tensor in used_tensors(model, node).values()]


def _block(
    model: nn.Module, found: Trace, stretch: Sequence[fx.Node], *, value: fx.Node, result: Any, number: int
) -> fx.GraphModule:
    """One block: from ``value``, through the operations of ``stretch``, to ``result``."""
    graph = fx.Graph()
    copies = {value: graph.placeholder("x")}
    for node in stretch:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(result, copies.__getitem__))
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target == FLAG:
            node.target = f"{FLAG}_{number}"
            if not hasattr(model, node.target):  # on the model as well, so that its train() and eval() reach it
                model.add_module(node.target, TrainingFlag().train(model.training))
        if node.op in ("call_module", "get_attr"):
            name = str(node.target)
            root[name] = found.constants[name] if name in found.constants else attribute(model, name)
    block = fx.GraphModule(root, graph)
    state = model.state_dict().keys()
    for name in [name for name, _ in block.named_buffers() if name not in state]:
        # torch.fx makes every tensor that it meets a part of the state; the model does not.
        owner, _, field = name.rpartition(".")
        tensor = block.get_buffer(name)
        delattr(block.get_submodule(owner), field)
        block.get_submodule(owner).register_buffer(field, tensor, persistent=False)
    return block.train(model.training)


def _adopt(model: nn.Module, block: nn.Module, names: Iterable[str]) -> None:
    """Give ``block`` those of the named tensors of ``model`` that it does not have yet."""
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
    """``owner``: block of each tensor, by ``id``; what has none goes to the last of ``names``."""
    tensors: dict[str, list[TensorSpec]] = {name: [] for name in names}
    listed, frozen = set[int](), frozen_names(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in listed:
            listed.add(id(tensor))
            tensors[owner.get(id(tensor), names[-1])].append(tensor_spec(name, tensor, frozen=name in frozen))
    return ModelSpec(tuple(BlockSpec(name, tuple(found)) for name, found in tensors.items()))


def tensor_spec(name: str, tensor: Tensor, *, frozen: bool = False) -> TensorSpec:
    """What is known of a parameter or buffer; raises ``ValueError`` for a type that numpy, and so a packet, does not have."""
    role: Role = "statistic" if tensor.is_floating_point() else "counter"
    if isinstance(tensor, nn.Parameter):
        role = "weight" if tensor.dim() > 1 else "vector"
    try:
        dtype = numpy_name(tensor.dtype)
    except TypeError as error:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"model: {name!r} is of type {kind}; it must be one that numpy has, such as float32"
        ) from error
    return TensorSpec(name, tuple(tensor.shape), dtype, role, frozen=frozen)
