"""Encodes the state of a run as bytes: a graph of values, which ``restore`` decodes.

The format is closed. A value is a scalar, a container, an array, a tensor, or of a type that the table in ``types`` has a tag
for; nothing else is written or read. A file therefore cannot name code, and renaming a class breaks no file. In msgpack the
graph is its root, an *item*, and a list of *nodes*, each of them one of::

    ["tuple", item, ...]                      a container, by its tag; a mapping has keys and values alternating
    ["tensor", bytes] or [.., null, file]     an array or a tensor as safetensors, inline or, from 16 KiB on, in its own file
    ["plan", bytes]                           a msgspec struct, as msgpack
    ["round", field, item, ...]               a dataclass, with the names of its fields
    ["outcome", value]                        a member of an enumeration
    ["stored", file]                          a file of bytes that is read when it is needed

An item is a scalar, or a list that holds the 0-based number of an *earlier* node. There are no cycles, and decoding needs no
recursion. An object that is referenced twice is one object again after decoding, which shared tensors rely on.
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

from ...comms.channel import Channel, StoredBytes
from .types import CONTAINERS, DATACLASSES, ENUMS, SCALARS, STRUCTS, TAGS

_LARGE_BYTES = 16 * 1024


class StateEncoder:
    """Values to bytes. ``keep``: writes bytes to a file and returns its name; ``keep_file``: the same with a file's bytes.

    ``name``: called with the name of each existing file that the graph refers to.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        keep: Callable[[bytes], str],
        keep_file: Callable[[Path], str],
        name: Callable[[str], Any],
    ) -> None:
        """For one checkpoint."""
        self._channel, self._keep, self._keep_file, self._name = channel, keep, keep_file, name
        self._nodes: list[list[Any]] = []
        self._known: dict[int, int] = {}  # number of the node by id of the object
        self._alive: list[Any] = []  # so that no id is reused

    def encode(self, value: Any) -> bytes:
        """The bytes of a value. Raises ``TypeError`` for a type that is not in the table."""
        return msgspec.msgpack.encode([self._item(value), self._nodes])

    def _item(self, value: Any) -> Any:
        """A scalar unchanged; anything else as [the number of its node]."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in SCALARS:
            return value
        if id(value) not in self._known:
            node = self._node(value)  # nodes that it refers to come first
            self._known[id(value)] = len(self._nodes)
            self._alive.append(value)
            self._nodes.append(node)
        return [self._known[id(value)]]

    def _node(self, value: Any) -> list[Any]:
        """The node of a value that is not a scalar."""
        value_type = type(value)
        if isinstance(value, np.ndarray):
            return ["array", *self._bytes(safetensors.numpy.save({"": np.asarray(value, order="C")}))]
        if isinstance(value, torch.Tensor):
            return ["tensor", *self._bytes(safetensors.torch.save({"": value.detach().contiguous()}))]
        if isinstance(value, Path):
            return ["stored", self._keep_file(value)]
        if isinstance(value, StoredBytes):
            self._name(value.name)
            return ["stored", value.name]
        if value_type not in TAGS:
            raise TypeError(
                f"a {value_type.__module__}.{value_type.__qualname__} cannot be saved; checkpointing/types.py has no tag for it"
            )
        tag = TAGS[value_type]
        if tag in CONTAINERS:
            items = (each for pair in value.items() for each in pair) if isinstance(value, dict) else value
            return [tag, *map(self._item, items)]
        if tag in ENUMS:
            return [tag, value.value]
        if tag in STRUCTS:
            return [tag, msgspec.msgpack.encode(value)]
        packet = DATACLASSES[tag].packet
        fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        resolved = [(name, self._channel.get(inner) if name == packet else inner) for name, inner in fields]
        return [tag, *(each for name, inner in resolved for each in (name, self._item(inner)))]

    def _bytes(self, data: bytes) -> list[Any]:
        """Few bytes inline, many in a file."""
        return [data] if len(data) < _LARGE_BYTES else [None, self._keep(data)]
