"""What a module holds: its attributes, noted so that they can be compared and put back after its code has run.

A model's ``forward`` is any Python code. It may assign attributes and buffers (``self.steps += 1``), append to lists, or add
to a tensor in place. Where it runs on something else than training data (symbols while it is traced, samples of an
evaluation), none of that may stay.
"""

import sys
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_REGISTERED = ("_parameters", "_buffers", "_modules")  # their entries are attributes of the module, by name
_BOOKS = vars(nn.Module()).keys() - set(_REGISTERED)  # a module's books, such as its hooks: not followed
_CODE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
# Objects of these packages are taken as one value: their insides are no attributes of a user's model.
_CLOSED = sys.stdlib_module_names | {"torch", "torchvision", "numpy"}


@dataclass(frozen=True)
class _Container:
    """A dictionary, list, set or queue, and what was in it. ``name``: its dotted place in the module."""

    name: str
    held: Any
    copy: Any


@dataclass(frozen=True)
class _Values:
    """A tensor, the number of changes in place that it has seen (None: not counted), and its values where they are kept."""

    name: str
    tensor: Tensor
    version: int | None
    values: Tensor | None


class ModuleState:
    """The attributes of a module and of all modules in it, as they are now.

    Followed are submodules, containers, and objects of a user's own classes. Parameters are compared, but only an optimiser
    changes their values, so that these are not kept.
    """

    def __init__(self, module: nn.Module, *, values: bool = False) -> None:
        """``values``: keep copies of buffers and other tensors as well, so that changes in place can be undone."""
        self._containers: list[_Container] = []
        self._tensors: list[_Values] = []
        self._seen: set[int] = set()
        self._keep_values = values
        self._visit("", module)

    def changed(self) -> str:
        """The dotted name of the first attribute that is not as it was; "" where all are."""
        return next((name for name in self._changes() if name), "")

    def restore(self) -> None:
        """Put back every attribute, and the values that are kept."""
        for container in self._containers:
            if any(_differences(container)):
                _refill(container.held, container.copy)
        with torch.no_grad():
            for noted in self._tensors:
                if noted.values is not None:
                    noted.tensor.copy_(noted.values)

    def _changes(self) -> Iterator[str]:
        for container in self._containers:
            yield from _differences(container)
        for noted in self._tensors:
            if noted.version != _version(noted.tensor):
                yield noted.name

    def _visit(self, name: str, value: Any) -> None:
        """Note ``value``, and what is in it."""
        if isinstance(value, (*_PLAIN, *_CODE)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            kept = value.detach().clone() if self._keep_values and not isinstance(value, nn.Parameter) else None
            self._tensors.append(_Values(name, value, _version(value), kept))
        elif isinstance(value, dict):
            self._note(name, value, dict(value))
            for key, inner in value.items():
                self._visit(_joined(name, key), inner)
        elif isinstance(value, list | set | deque):
            self._note(name, value, list(value))
            for inner in value:
                self._visit(name, inner)
        elif isinstance(value, tuple | frozenset):
            for inner in value:
                self._visit(name, inner)
        elif isinstance(value, nn.Module) or _is_open(value):
            attributes = vars(value)
            self._note(name, attributes, dict(attributes))
            closed: Collection[str] = _BOOKS if isinstance(value, nn.Module) else ()
            for key, inner in attributes.items():
                if key not in closed and not isinstance(inner, _PLAIN):
                    self._visit(name if key in _REGISTERED else _joined(name, key), inner)

    def _note(self, name: str, held: Any, copy: Any) -> None:
        self._containers.append(_Container(name, held, copy))


def _joined(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _is_open(value: Any) -> bool:
    """Whether it is an object of a user's own class, with attributes of its own."""
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _CLOSED


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _differences(container: _Container) -> Iterator[str]:
    """Names of what is not in a container as it was."""
    held, copy = container.held, container.copy
    if isinstance(held, dict):
        for key in [*copy, *(key for key in held if key not in copy)]:
            if key not in held or key not in copy or not _same(held[key], copy[key]):
                yield _joined(container.name, key)
    elif len(held) != len(copy) or not all(_same(one, other) for one, other in zip(held, copy, strict=True)):
        yield container.name


def _same(one: Any, other: Any) -> bool:
    """Whether an attribute is as it was: the same object, or a plain value that is equal."""
    if isinstance(one, tuple) and isinstance(other, tuple) and type(one) is type(other):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other))


def _refill(held: Any, copy: Any) -> None:
    """What was in a container, in its order, is in it again."""
    held.clear()
    if isinstance(held, dict | set):
        held.update(copy)
    else:
        held.extend(copy)
