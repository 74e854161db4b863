"""Snapshot of a module's attributes, by which changes can be detected and undone after its code has run.

A model's ``forward`` is arbitrary Python code. It may assign attributes and buffers (``self.steps += 1``), append to lists, or
change a tensor in place. If it runs on anything but training data (symbols during tracing, samples during evaluation), all such
changes must be undone.
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
_REGISTERED = ("_parameters", "_buffers", "_modules")  # their entries are attributes of the module
_INTERNALS = vars(nn.Module()).keys() - set(_REGISTERED)  # internals of nn.Module such as hooks: not followed
_CODE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
# Objects of these packages are compared as a whole: their attributes are not those of a user's model.
_OPAQUE_PACKAGES = sys.stdlib_module_names | {"torch", "torchvision", "numpy"}


@dataclass(frozen=True)
class _Container:
    """A dictionary, list, set or queue, and a copy of its content. ``name``: its dotted name in the module."""

    name: str
    value: Any
    copy: Any


@dataclass(frozen=True)
class _TensorRecord:
    """A tensor, its counter of in-place changes (None: not counted), and a copy of its values if they are kept."""

    name: str
    tensor: Tensor
    version: int | None
    values: Tensor | None


class ModuleState:
    """Snapshot of the attributes of a module and of all modules in it.

    Submodules, containers, and objects of a user's own classes are followed. Parameters are compared, but their values are not
    copied, since only an optimiser changes them.
    """

    def __init__(self, module: nn.Module, *, values: bool = False) -> None:
        """``values``: also copy buffers and other tensors, so that in-place changes can be undone."""
        self._containers: list[_Container] = []
        self._tensors: list[_TensorRecord] = []
        self._seen: set[int] = set()
        self._keep_values = values
        self._visit("", module)

    def changed(self) -> str:
        """The dotted name of the first attribute that has changed; "" if none has."""
        return next((name for name in self._changes() if name), "")

    def restore(self) -> None:
        """Restore all attributes, and the copied values."""
        for container in self._containers:
            if any(_differences(container)):
                _refill(container.value, container.copy)
        with torch.no_grad():
            for record in self._tensors:
                if record.values is not None:
                    record.tensor.copy_(record.values)

    def _changes(self) -> Iterator[str]:
        for container in self._containers:
            yield from _differences(container)
        for record in self._tensors:
            if record.version != _version(record.tensor):
                yield record.name

    def _visit(self, name: str, value: Any) -> None:
        """Record ``value`` and everything in it."""
        if isinstance(value, (*_PLAIN, *_CODE)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            kept = value.detach().clone() if self._keep_values and not isinstance(value, nn.Parameter) else None
            self._tensors.append(_TensorRecord(name, value, _version(value), kept))
        elif isinstance(value, dict):
            self._record_container(name, value, dict(value))
            for key, inner in value.items():
                self._visit(_joined(name, key), inner)
        elif isinstance(value, list | set | deque):
            self._record_container(name, value, list(value))
            for inner in value:
                self._visit(name, inner)
        elif isinstance(value, tuple | frozenset):
            for inner in value:
                self._visit(name, inner)
        elif isinstance(value, nn.Module) or _is_user_object(value):
            attributes = vars(value)
            self._record_container(name, attributes, dict(attributes))
            skipped: Collection[str] = _INTERNALS if isinstance(value, nn.Module) else ()
            for key, inner in attributes.items():
                if key not in skipped and not isinstance(inner, _PLAIN):
                    self._visit(name if key in _REGISTERED else _joined(name, key), inner)

    def _record_container(self, name: str, value: Any, copy: Any) -> None:
        self._containers.append(_Container(name, value, copy))


def _joined(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _is_user_object(value: Any) -> bool:
    """Whether ``value`` is an object with attributes, of a user's own class."""
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _OPAQUE_PACKAGES


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _differences(container: _Container) -> Iterator[str]:
    """Names of the entries of a container that have changed."""
    value, copy = container.value, container.copy
    if isinstance(value, dict):
        for key in [*copy, *(key for key in value if key not in copy)]:
            if key not in value or key not in copy or not _same(value[key], copy[key]):
                yield _joined(container.name, key)
    elif len(value) != len(copy) or not all(_same(one, other) for one, other in zip(value, copy, strict=True)):
        yield container.name


def _same(one: Any, other: Any) -> bool:
    """Whether an attribute is unchanged: the same object, or an equal plain value."""
    if isinstance(one, tuple) and isinstance(other, tuple) and type(one) is type(other):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other))


def _refill(value: Any, copy: Any) -> None:
    """Restore the content of a container in its order."""
    value.clear()
    if isinstance(value, dict | set):
        value.update(copy)
    else:
        value.extend(copy)
