"""A graph of values as bytes and back: what a checkpoint does to all that a run remembers.

What is saved are numbers, texts, containers, arrays, tensors, and dataclasses and msgspec structs of this package; nothing
else is let in or out, so reading runs no code of the file's. Two places that hold one object hold one object afterwards, which
is what shared tensors, and tests with ``is``, rely on. Arrays from 16 KiB on are files of their own, named by what they hold.

A thing with state says what of it is saved, and all the rest is built anew from the configuration:

    SAVED = ("time_s", "_journeys", ...)        names of attributes, which may be such things themselves
    saved(), restore(value)                     where that does not do
"""

import dataclasses
import importlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from ..comms.channel import Channel

_LARGE_BYTES = 16 * 1024
_PACKAGE = __package__.rpartition(".")[0]
_MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter, "defaultdict": dict}
_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Bytes that are a file of their own, and are not read before somebody asks."""

    name: str
    read: Callable[[], bytes]


def collect(thing: Any) -> Any:
    """What is to be saved of a thing."""
    if hasattr(thing, "saved"):
        return thing.saved()
    values = {name: getattr(thing, name) for name in thing.SAVED}
    return {name: collect(value) if _has_state(value) else value for name, value in values.items()}


def restore(thing: Any, value: Any) -> None:
    """Put what ``collect`` found, after a way through bytes, into a thing that was built anew."""
    if hasattr(thing, "restore"):
        thing.restore(value)
        return
    assert set(value) == set(thing.SAVED), f"{type(thing).__name__}: {sorted(set(value) ^ set(thing.SAVED))}"
    for name, inner in value.items():
        held = getattr(thing, name)
        if _has_state(held):
            restore(held, inner)
        elif isinstance(held, dict):  # others may hold it too
            held.clear()
            held.update(inner)
        else:
            setattr(thing, name, inner)


def _has_state(thing: Any) -> bool:
    return hasattr(type(thing), "SAVED") or hasattr(type(thing), "saved")


class Freezer:
    """Values to bytes. ``keep``: makes a file of bytes, and tells its name; ``keep_file``: the same with a file.

    ``name``: is told of files that are there already.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        keep: Callable[[bytes], str],
        keep_file: Callable[[Path], str],
        name: Callable[[str], Any],
    ) -> None:
        """For one snapshot."""
        self._channel, self._keep, self._keep_file, self._name = channel, keep, keep_file, name
        self._nodes: list[list[Any]] = []
        self._known: dict[int, int] = {}
        self._alive: list[Any] = []  # else an id might be given away

    def freeze(self, value: Any) -> bytes:
        """The bytes of a value: a list of nodes, and the one that is the value itself."""
        return msgspec.msgpack.encode([self._item(value), self._nodes])

    def _item(self, value: Any) -> Any:
        """A scalar as it is, all else as [the number of its node]."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or (isinstance(value, bool | int | float | str | bytes) and not isinstance(value, Enum)):
            return value
        if id(value) not in self._known:
            self._known[id(value)] = number = len(self._nodes)
            self._alive.append(value)
            self._nodes.append([])
            self._nodes[number] = self._node(value)
        return [self._known[id(value)]]

    def _node(self, value: Any) -> list[Any]:
        """What is not a scalar."""
        kind = type(value).__name__
        if isinstance(value, np.ndarray):
            return ["array", *self._bytes(safetensors.numpy.save({"": np.asarray(value, order="C")}))]
        if isinstance(value, torch.Tensor):
            return ["tensor", *self._bytes(safetensors.torch.save({"": value.detach().contiguous()}))]
        if type(value) in (dict, OrderedDict, Counter, defaultdict):
            return [kind, *(self._item(each) for pair in value.items() for each in pair)]
        if type(value) in (list, tuple, set, frozenset, deque):
            return [kind, *map(self._item, value)]
        if isinstance(value, Path):
            return ["stored", self._keep_file(value)]
        if isinstance(value, Stored):
            self._name(value.name)
            return ["stored", value.name]
        path = f"{type(value).__module__}:{type(value).__qualname__}"
        assert path.startswith(f"{_PACKAGE}."), f"a {path} cannot be saved"
        if isinstance(value, Enum):
            return ["enum", path, value.value]
        if isinstance(value, msgspec.Struct):
            return ["struct", path, msgspec.msgpack.encode(value)]
        assert dataclasses.is_dataclass(value), f"a {path} cannot be saved"
        fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        # (A reference means nothing in another process: what is saved is the packet behind it.)
        opened = [(name, self._channel.get(held) if name == "reference" else held) for name, held in fields]
        return ["object", path, *(self._item(each) for pair in opened for each in pair)]

    def _bytes(self, data: bytes) -> list[Any]:
        """A few bytes here, many in a file."""
        return [data] if len(data) < _LARGE_BYTES else [None, self._keep(data)]


class Thawer:
    """Bytes to values. ``read``: the bytes of a file."""

    def __init__(self, channel: Channel, *, read: Callable[[str], bytes]) -> None:
        """For one snapshot."""
        self._channel, self._read = channel, read
        self._nodes: list[list[Any]] = []
        self._made: dict[int, Any] = {}

    def thaw(self, data: bytes) -> Any:
        """The value whose bytes these are."""
        value, self._nodes = msgspec.msgpack.decode(data)
        return self._value(value)

    def _value(self, item: Any) -> Any:
        """A scalar, or what a node is made into, once."""
        if not isinstance(item, list):
            return item
        (number,) = item
        if number not in self._made:
            self._made[number] = self._make(*self._nodes[number])
        return self._made[number]

    def _make(self, kind: str, *rest: Any) -> Any:
        """What is not a scalar."""
        if kind in ("array", "tensor"):
            load = safetensors.numpy.load if kind == "array" else safetensors.torch.load
            return load(rest[0] if rest[0] is not None else self._read(rest[1]))[""]
        if kind in _MAPPINGS:
            values = [self._value(item) for item in rest]
            return _MAPPINGS[kind](dict(zip(values[::2], values[1::2], strict=True)))
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](self._value(item) for item in rest)
        if kind == "stored":
            (name,) = rest
            return Stored(name, lambda: self._read(name))
        found = _class(rest[0])
        if kind == "enum":
            return found(rest[1])
        if kind == "struct":
            return msgspec.msgpack.decode(rest[1], type=found)
        made = object.__new__(found)
        values = [self._value(item) for item in rest[1:]]
        for name, value in zip(values[::2], values[1::2], strict=True):
            object.__setattr__(made, name, self._channel.put(value) if name == "reference" else value)
        return made


def _class(path: str) -> Any:
    """A class of this package that holds data, by its path."""
    module, _, name = path.partition(":")
    assert module.startswith(f"{_PACKAGE}."), path
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type), path
    assert dataclasses.is_dataclass(found) or issubclass(found, Enum | msgspec.Struct), path
    return found
