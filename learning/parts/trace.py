"""Traces a model with torch.fx into an ordered list of operations that can be cut.

torch.fx (Reed et al., MLSys 2022, arXiv 2112.08429) runs a model once on symbols. This module departs from its defaults so that
the operations compute the same as the model, in training and in evaluation mode:

- Modules without children are not traced into: their code may depend on ``self.training`` (dropout, stochastic depth).
- Other code may depend on it too (``F.dropout(x, training=self.training)``). So the model is traced in both modes, and a flag
  that differs is read from a module when the block runs, instead of keeping its value during tracing.
- A parameter is read right before each use, so that it does not count as a value that crosses cuts.
- ``trace_guard`` detects what tracing would lose; such a model is not cut.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..resolve import error_line
from ..tensors import dense
from .module_state import ModuleState
from .trace_guard import TraceGuard, Untraceable, guard_trace, refuse_hooks

ROOT = "model"
FLAG = "training_flag"
DIFFERENT = "training and evaluation are different networks"


class TrainingFlag(nn.Module):
    """Returns its own ``training``, which ``train()`` and ``eval()`` set as for any module."""

    def forward(self) -> bool:
        """Return whether the module is in training mode."""
        return self.training


@dataclass(frozen=True)
class TracedModel:
    """``nodes``: operations in order, from input to output. ``constants``: tensors that the model's code creates itself."""

    nodes: tuple[fx.Node, ...]
    constants: dict[str, torch.Tensor]


class _OneInput(nn.Module):
    """Calls the model with its input only, so that optional arguments keep their defaults instead of becoming symbols."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    # Otherwise a value computed from buffers alone would be recorded as a constant.
    proxy_buffer_attributes = True

    def __init__(self, guard: TraceGuard | None = None) -> None:
        super().__init__()
        self._guard = guard

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        childless = next(module.children(), None) is None
        return super().is_leaf_module(module, module_qualified_name) or (childless and module_qualified_name != ROOT)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if self._guard is not None and kind.startswith("call"):
            self._guard.check_operation(target.removeprefix(f"{ROOT}.") if isinstance(target, str) else target)
        return super().create_node(kind, target, *args, **kwargs)


def trace(model: nn.Module) -> TracedModel:
    """TracedModel ``model``. Operations refer to its own modules and tensors by name; the model is left unchanged.

    Raises ``Untraceable`` if its Python code depends on values (loops or branches over them), if training and evaluation are
    different networks, or if tracing would lose something (``trace_guard``).
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
    except Exception as error:  # a user's code may raise anything on symbols; the model is then one block
        raise Untraceable(f"torch.fx cannot trace it: {error_line(error)}") from error
    finally:
        state.restore()
    _reconcile(train, evaluate)
    _read_where_used(train.nodes[0].graph)
    return TracedModel(tuple(train.nodes[0].graph.nodes), train.constants)


def _trace_once(model: nn.Module) -> TracedModel:
    wrapped = _OneInput(model)
    with guard_trace(model) as guard, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's code gives the same warnings on samples
        graph = _Tracer(guard).trace(wrapped)
    constants: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        name = str(node.target)
        if name.startswith(f"{ROOT}."):
            node.target = name.removeprefix(f"{ROOT}.")
        else:  # torch.fx attaches values from outside the model to the wrapper
            constants[name] = getattr(wrapped, name)
    return TracedModel(tuple(graph.nodes), constants)


def _reconcile(train: TracedModel, evaluate: TracedModel) -> None:
    """Make the trace of training mode correct for both modes; its nodes are changed in place."""
    if len(train.nodes) != len(evaluate.nodes) or train.constants.keys() != evaluate.constants.keys():
        raise Untraceable(DIFFERENT)
    for name, constant in train.constants.items():
        if not (isinstance(constant, torch.Tensor) and torch.equal(dense(constant), dense(evaluate.constants[name]))):
            raise Untraceable("it creates a value of its own that differs between calls")
    counterpart = dict(zip(evaluate.nodes, train.nodes, strict=True))
    for evaluate_node, node in counterpart.items():
        if (node.op, node.target) != (evaluate_node.op, evaluate_node.target):
            raise Untraceable(DIFFERENT)
        with node.graph.inserting_before(node):
            node.args = _merge(node.args, evaluate_node.args, node.graph, counterpart)
            node.kwargs = _merge(node.kwargs, evaluate_node.kwargs, node.graph, counterpart)


def _merge(train: Any, evaluate: Any, graph: fx.Graph, counterpart: dict[fx.Node, fx.Node]) -> Any:
    """Merge an argument of both modes: if it is True in training and False in evaluation, read the flag at run time."""
    if isinstance(evaluate, fx.Node):
        evaluate = counterpart[evaluate]
    if train is evaluate:
        return train
    if train is True and evaluate is False:
        return graph.create_node("call_module", FLAG)
    if isinstance(train, tuple | list) and isinstance(evaluate, tuple | list) and len(train) == len(evaluate):
        return type(train)(_merge(a, b, graph, counterpart) for a, b in zip(train, evaluate, strict=True))
    if isinstance(train, dict) and isinstance(evaluate, dict) and train.keys() == evaluate.keys():
        return {key: _merge(value, evaluate[key], graph, counterpart) for key, value in train.items()}
    if isinstance(train, slice) and isinstance(evaluate, slice):
        fields = [(getattr(train, name), getattr(evaluate, name)) for name in ("start", "stop", "step")]
        return slice(*(_merge(a, b, graph, counterpart) for a, b in fields))
    if type(train) is type(evaluate) and train == evaluate:
        return train
    raise Untraceable(DIFFERENT)


def _read_where_used(graph: fx.Graph) -> None:
    """Read each parameter or buffer once per use, right before it."""
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        for user in list(node.users):
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.create_node("get_attr", node.target))
        graph.erase_node(node)
