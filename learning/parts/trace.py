"""The operations of a model in order, as torch.fx sees them, made fit for cutting.

torch.fx (Reed et al., MLSys 2022, arXiv 2112.08429) runs a model once on symbols. We depart from its defaults so that what
comes out does what the model does, in training and in evaluation:

- Modules without children stay whole: theirs is the code that looks at ``self.training`` (dropout, stochastic depth).
- Where other code looks at it (``F.dropout(x, training=self.training)``), the model is traced in both modes, and a flag that
  differs is read from a module when the block runs, instead of being frozen at its value while tracing.
- Reading a parameter is placed right before each use, so that it does not look like a value that travels.
- What tracing would lose is noticed (``learning.unrecorded``), and the model is then not cut.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..resolve import told
from ..tensors import dense
from .module_state import ModuleState
from .unrecorded import Untraceable, Watch, refuse_hooks, watching

ROOT = "model"
FLAG = "training_flag"
DIFFERENT = "training and evaluation are different networks"


class TrainingFlag(nn.Module):
    """Its own ``training``, as a value: ``train()`` and ``eval()`` reach it like any module."""

    def forward(self) -> bool:
        """Whether in training mode."""
        return self.training


@dataclass(frozen=True)
class Trace:
    """``nodes``: operations in order, input first and output last. ``constants``: tensors that the model makes itself."""

    nodes: tuple[fx.Node, ...]
    constants: dict[str, torch.Tensor]


class _OneInput(nn.Module):
    """Calls the model with its input alone, so that optional arguments keep their defaults instead of becoming symbols."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    # Else what is computed from buffers alone would be frozen at its value while tracing.
    proxy_buffer_attributes = True

    def __init__(self, watch: Watch | None = None) -> None:
        super().__init__()
        self._watch = watch

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        childless = next(module.children(), None) is None
        return super().is_leaf_module(module, module_qualified_name) or (childless and module_qualified_name != ROOT)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if self._watch is not None and kind.startswith("call"):
            self._watch.operation(target.removeprefix(f"{ROOT}.") if isinstance(target, str) else target)
        return super().create_node(kind, target, *args, **kwargs)


def trace(model: nn.Module) -> Trace:
    """The model's operations, by the names of its own modules and tensors. The model is left as it was.

    Raises ``Untraceable`` when its Python code depends on values (loops or branches over them), when training and
    evaluation are different networks, or when it does what a sequence of operations does not keep (``unrecorded``).
    """
    is_leaf = _Tracer().is_leaf_module
    if is_leaf(model, ROOT):
        raise Untraceable(f"it is a single layer, {type(model).__name__}")
    refuse_hooks(model, is_leaf)
    state = ModuleState(model, values=True)
    try:
        train, evaluate = _trace_once(model.train()), _trace_once(model.eval())
    except Untraceable:
        raise
    except Exception as error:  # the user's code, on symbols: it may fail in any way, and then the model is one block
        raise Untraceable(f"torch.fx cannot trace it: {told(error)}") from error
    finally:
        state.restore()
    _reconcile(train, evaluate)
    _read_where_used(train.nodes[0].graph)
    return Trace(tuple(train.nodes[0].graph.nodes), train.constants)


def _trace_once(model: nn.Module) -> Trace:
    wrapped = _OneInput(model)
    with watching(model) as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the model's code warns of on symbols, it warns of on samples too
        graph = _Tracer(watch).trace(wrapped)
    constants: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        name = str(node.target)
        if name.startswith(f"{ROOT}."):
            node.target = name.removeprefix(f"{ROOT}.")
        else:  # torch.fx hangs what it finds outside the model on the wrapper
            constants[name] = getattr(wrapped, name)
    return Trace(tuple(graph.nodes), constants)


def _reconcile(train: Trace, evaluate: Trace) -> None:
    """Make the training trace right for both modes; its nodes change in place."""
    if len(train.nodes) != len(evaluate.nodes) or train.constants.keys() != evaluate.constants.keys():
        raise Untraceable(DIFFERENT)
    for name, constant in train.constants.items():
        if not (isinstance(constant, torch.Tensor) and torch.equal(dense(constant), dense(evaluate.constants[name]))):
            raise Untraceable("it makes a value of its own that is not the same at every call")
    twin = dict(zip(evaluate.nodes, train.nodes, strict=True))
    for theirs, node in twin.items():
        if (node.op, node.target) != (theirs.op, theirs.target):
            raise Untraceable(DIFFERENT)
        with node.graph.inserting_before(node):
            node.args = _merge(node.args, theirs.args, node.graph, twin)
            node.kwargs = _merge(node.kwargs, theirs.kwargs, node.graph, twin)


def _merge(ours: Any, theirs: Any, graph: fx.Graph, twin: dict[fx.Node, fx.Node]) -> Any:
    """``ours`` where both agree, and a flag read at run time where training has True and evaluation False."""
    if isinstance(theirs, fx.Node):
        theirs = twin[theirs]
    if ours is theirs:
        return ours
    if ours is True and theirs is False:
        return graph.create_node("call_module", FLAG)
    if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list) and len(ours) == len(theirs):
        return type(ours)(_merge(a, b, graph, twin) for a, b in zip(ours, theirs, strict=True))
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return {key: _merge(value, theirs[key], graph, twin) for key, value in ours.items()}
    if isinstance(ours, slice) and isinstance(theirs, slice):
        return slice(*(_merge(getattr(ours, k), getattr(theirs, k), graph, twin) for k in ("start", "stop", "step")))
    if type(ours) is type(theirs) and ours == theirs:
        return ours
    raise Untraceable(DIFFERENT)


def _read_where_used(graph: fx.Graph) -> None:
    """One reading of a parameter or buffer per use, right before it."""
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        for user in list(node.users):
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.create_node("get_attr", node.target))
        graph.erase_node(node)
