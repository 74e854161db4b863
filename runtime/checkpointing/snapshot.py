"""A graph of values as bytes: what a checkpoint does to all that a run remembers. ``thaw`` reads it.

The format is closed. A value is a scalar, a container of the usual kinds, an array, a tensor, or of a type that the table in
``checkpoint_types`` has a tag for; nothing else is written, and nothing else is read. So reading can name no code of any
kind, and a renamed class breaks no file. In msgpack it is the value and a list of *nodes*::

    [0-based number of a node, or a scalar]
    ["tuple", item, ...]                      a container, by its tag; a mapping has keys and values in turn
    ["tensor", bytes] or [.., null, file]     an array or a tensor as safetensors, here or, from 16 KiB on, in a file of its own
    ["plan", bytes]                           a msgspec struct, as msgpack
    ["journey", field, item, ...]             a dataclass, with the names of its fields
    ["outcome", value]                        a member of an enumeration
    ["stored", file]                          bytes that are a file, and are read when they are needed

where an item is a scalar, or the number of a node *before* it, in a list. So there are no cycles, and reading needs no
recursion. Two places that hold one object hold one object afterwards, which shared tensors rely on.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from ...comms.channel import Channel, Stored
from .types import CONTAINERS, ENUMS, KINDS, SCALARS, STRUCTS, TAGS

_LARGE_BYTES = 16 * 1024


class StateEncoder:
    """Values to bytes. ``keep``: makes a file of bytes, and returns its name; ``keep_file``: the same with a file.

    ``name``: is called with the names of files that are there already.
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
        """The bytes of a value: the value itself, and the nodes that it refers to. Raises ``TypeError`` for another type."""
        return msgspec.msgpack.encode([self._item(value), self._nodes])

    def _item(self, value: Any) -> Any:
        """A scalar as it is, all else as [the number of its node]."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in SCALARS:
            return value
        if id(value) not in self._known:
            node = self._node(value)  # what it refers to comes before it
            self._known[id(value)] = len(self._nodes)
            self._alive.append(value)
            self._nodes.append(node)
        return [self._known[id(value)]]

    def _node(self, value: Any) -> list[Any]:
        """What is not a scalar."""
        kind = type(value)
        if isinstance(value, np.ndarray):
            return ["array", *self._bytes(safetensors.numpy.save({"": np.asarray(value, order="C")}))]
        if isinstance(value, torch.Tensor):
            return ["tensor", *self._bytes(safetensors.torch.save({"": value.detach().contiguous()}))]
        if isinstance(value, Path):
            return ["stored", self._keep_file(value)]
        if isinstance(value, Stored):
            self._name(value.name)
            return ["stored", value.name]
        if kind not in TAGS:
            raise TypeError(
                f"a {kind.__module__}.{kind.__qualname__} cannot be saved; checkpoint_types has no tag for it"
            )
        tag = TAGS[kind]
        if tag in CONTAINERS:
            items = (each for pair in value.items() for each in pair) if isinstance(value, dict) else value
            return [tag, *map(self._item, items)]
        if tag in ENUMS:
            return [tag, value.value]
        if tag in STRUCTS:
            return [tag, msgspec.msgpack.encode(value)]
        packet = KINDS[tag].packet
        fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        opened = [(name, self._channel.get(held) if name == packet else held) for name, held in fields]
        return [tag, *(each for name, held in opened for each in (name, self._item(held)))]

    def _bytes(self, data: bytes) -> list[Any]:
        """A few bytes here, many in a file."""
        return [data] if len(data) < _LARGE_BYTES else [None, self._keep(data)]
