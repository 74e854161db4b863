"""Decodes what ``snapshot`` encodes. Any bytes give a value whose fields all have their declared types, or ``Damaged``.

Nothing in the bytes is trusted: sizes, node numbers and file names are checked before they are used; types of fields, their
bounds, and lengths of packets once an object is built. No object of an unknown type is created.
"""

import dataclasses
from collections.abc import Callable, Container
from typing import Any

import msgspec
import safetensors
import safetensors.numpy
import safetensors.torch

from ...comms.channel import Channel, StoredBytes
from ...policies.checks.type_check import TypeCheck
from ..errors import Damaged
from .types import CONTAINERS, DATACLASSES, ENUMS, SCALARS, STRUCTS, is_packet

_LARGEST_KEY = 10_000  # values in the key of a mapping: hashing a tuple recurses into all of them


class StateDecoder:
    """Bytes to values. ``files``: names of the checkpoint's files. ``read``: returns the bytes of one; raises ``Damaged``."""

    def __init__(self, channel: Channel, *, files: Container[str], read: Callable[[str], bytes]) -> None:
        """For one checkpoint."""
        self._channel, self._files, self._read = channel, files, read
        self._values: list[Any] = []  # by number of the node
        self._sizes: list[int] = []  # of each value: the number of values in it, a shared one counted each time
        self._check = TypeCheck(into_structs=False)

    def decode(self, data: bytes) -> Any:
        """The value that was encoded. Raises ``Damaged``."""
        try:
            item, nodes = msgspec.msgpack.decode(data, type=tuple[Any, list[list[Any]]])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Damaged(f"its graph cannot be read: {error}") from error
        for number, node in enumerate(nodes):
            try:
                self._values.append(self._decode_node(node))
            except Damaged as error:
                raise Damaged(f"node {number} of its graph: {error}") from error
        return self._value(item)

    def _value(self, item: Any) -> Any:
        """A scalar, or the value of an earlier node."""
        if not isinstance(item, list):
            if item is None or type(item) in SCALARS:
                return item
            raise Damaged(f"a {type(item).__name__} is not a value")
        if len(item) == 1 and type(item[0]) is int and 0 <= item[0] < len(self._values):
            return self._values[item[0]]
        raise Damaged(f"{str(item)[:40]} refers to no earlier node")

    def _size(self, item: Any) -> int:
        return self._sizes[item[0]] if isinstance(item, list) else 1

    def _decode_node(self, node: list[Any]) -> Any:
        """The value of a node; its size is recorded."""
        tag, rest = (node[0], node[1:]) if node else (None, [])
        value, items = self._decode(tag, rest)
        self._sizes.append(min(1 + sum(map(self._size, items)), _LARGEST_KEY + 1))
        return value

    def _decode(self, tag: Any, rest: list[Any]) -> tuple[Any, list[Any]]:
        """The value of a node, and the items that it contains."""
        if not isinstance(tag, str):
            raise Damaged("it has no tag")
        if tag in ("array", "tensor"):
            return self._array(tag, rest), []
        if tag in CONTAINERS:
            return self._container(tag, rest), rest
        if tag in DATACLASSES:
            return self._object(tag, rest), rest[1::2]
        if len(rest) != 1:
            raise Damaged(f"a {tag!r} has {len(rest)} entries; it must have one")
        if tag == "stored":
            name = self._named(rest[0])
            return StoredBytes(name, lambda: self._read(name)), []
        try:
            if tag in ENUMS:
                return ENUMS[tag](rest[0]), []
            if tag in STRUCTS and isinstance(rest[0], bytes):
                return msgspec.msgpack.decode(rest[0], type=STRUCTS[tag]), []
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            raise Damaged(f"its {tag} cannot be read: {error}") from error
        raise Damaged(f"tag {tag[:40]!r} is not known")

    def _array(self, tag: str, rest: list[Any]) -> Any:
        """An array or a tensor, from inline bytes or from a file."""
        if len(rest) == 1 and isinstance(rest[0], bytes):
            data = rest[0]
        elif len(rest) == 2 and rest[0] is None:
            data = self._read(self._named(rest[1]))
        else:
            raise Damaged(f"its {tag} has neither bytes nor a file")
        load = safetensors.numpy.load if tag == "array" else safetensors.torch.load
        try:
            arrays = load(data)
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise Damaged(f"its {tag} cannot be read: {error}") from error
        if list(arrays) != [""]:
            raise Damaged(f"its {tag} is not one, but {len(arrays)}")
        return arrays[""]

    def _named(self, name: Any) -> str:
        """The name of a file of this checkpoint."""
        if not isinstance(name, str) or name not in self._files:
            raise Damaged(f"{str(name)[:40]!r} is not a file of this checkpoint")
        return name

    def _container(self, tag: str, rest: list[Any]) -> Any:
        """A mapping or a sequence."""
        container: Any = CONTAINERS[tag]
        values = [self._value(item) for item in rest]
        keyed = issubclass(container, dict)
        keys = rest[::2] if keyed else rest if issubclass(container, set | frozenset) else []
        if any(self._size(item) > _LARGEST_KEY for item in keys):
            raise Damaged(f"a key of its {tag} is too large")
        try:
            contents: Any = dict(zip(values[::2], values[1::2], strict=True)) if keyed else values
            value: Any = container(contents)
        except (TypeError, ValueError) as error:  # an unhashable key; a key without a value
            raise Damaged(f"its {tag} cannot be built: {error}") from error
        if keys and len(value) != len(keys):
            raise Damaged(f"its {tag} holds a key twice")
        return value

    def _object(self, tag: str, rest: list[Any]) -> Any:
        """An object of a type in the table, with all its fields."""
        entry = DATACLASSES[tag]
        values = [self._value(item) for item in rest[1::2]]
        names = [field.name for field in dataclasses.fields(entry.type)]
        if rest[::2] != names or len(values) != len(names):
            raise Damaged(f"its {tag} has the fields {str(rest[::2])[:200]}; it must have {names}")
        built: Any = object.__new__(entry.type)
        for name, value in zip(names, values, strict=True):
            if name == entry.packet:
                if not is_packet(value) or value.nbytes != values[names.index("num_bytes")]:
                    raise Damaged(f"its {tag} holds no packet of the length that it declares")
                value = self._channel.put(value)
            object.__setattr__(built, name, value)
        mismatch = self._check.mismatch(built, entry.type)
        if mismatch is not None:
            raise Damaged(f"its {tag}.{mismatch[0]} {mismatch[1]}")
        if (problem := entry.problem(built)) != "":
            raise Damaged(f"its {tag}: {problem}")
        return built
