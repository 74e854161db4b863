"""Reads what ``snapshot`` writes: whatever the bytes are, a value whose every field has its declared type, or ``Damaged``.

Nothing in the bytes is trusted: sizes, numbers of nodes and names of files are checked before use, types of fields, bounds and
lengths of packets after an object was put together, and no object of an unknown kind is made.
"""

import dataclasses
from collections.abc import Callable, Container
from typing import Any

import msgspec
import safetensors
import safetensors.numpy
import safetensors.torch

from ...comms.channel import Channel, Stored
from ...policies.checks.type_check import TypeCheck
from ..errors import Damaged
from .types import CONTAINERS, ENUMS, KINDS, SCALARS, STRUCTS, is_packet

_LARGEST_KEY = 10_000  # values that the key of a mapping may be made of: hashing a tuple recurses into all of them


class StateDecoder:
    """Bytes to values. ``files``: those that the checkpoint names. ``read``: the bytes of one; raises ``Damaged``."""

    def __init__(self, channel: Channel, *, files: Container[str], read: Callable[[str], bytes]) -> None:
        """For one snapshot."""
        self._channel, self._files, self._read = channel, files, read
        self._made: list[Any] = []
        self._sizes: list[int] = []  # of each made value: the values that it is made of, shared ones each time
        self._check = TypeCheck(into_structs=False)

    def thaw(self, data: bytes) -> Any:
        """The value whose bytes these are. Raises ``Damaged``."""
        try:
            item, nodes = msgspec.msgpack.decode(data, type=tuple[Any, list[list[Any]]])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Damaged(f"its graph cannot be read: {error}") from error
        for number, node in enumerate(nodes):
            try:
                self._made.append(self._make(node))
            except Damaged as error:
                raise Damaged(f"node {number} of its graph: {error}") from error
        return self._value(item)

    def _value(self, item: Any) -> Any:
        """A scalar, or what a node before was made into."""
        if not isinstance(item, list):
            if item is None or type(item) in SCALARS:
                return item
            raise Damaged(f"a {type(item).__name__} is no value")
        if len(item) == 1 and type(item[0]) is int and 0 <= item[0] < len(self._made):
            return self._made[item[0]]
        raise Damaged(f"{str(item)[:40]} refers to no node before it")

    def _size(self, item: Any) -> int:
        return self._sizes[item[0]] if isinstance(item, list) else 1

    def _make(self, node: list[Any]) -> Any:
        """What is not a scalar."""
        tag, rest = (node[0], node[1:]) if node else (None, [])
        made, items = self._made_of(tag, rest)
        self._sizes.append(min(1 + sum(map(self._size, items)), _LARGEST_KEY + 1))
        return made

    def _made_of(self, tag: Any, rest: list[Any]) -> tuple[Any, list[Any]]:
        """The value of a node, and the items in it."""
        if not isinstance(tag, str):
            raise Damaged("it has no tag")
        if tag in ("array", "tensor"):
            return self._array(tag, rest), []
        if tag in CONTAINERS:
            return self._container(tag, rest), rest
        if tag in KINDS:
            return self._object(tag, rest), rest[1::2]
        if len(rest) != 1:
            raise Damaged(f"a {tag!r} has {len(rest)} entries; it must have one")
        if tag == "stored":
            name = self._named(rest[0])
            return Stored(name, lambda: self._read(name)), []
        try:
            if tag in ENUMS:
                return ENUMS[tag](rest[0]), []
            if tag in STRUCTS and isinstance(rest[0], bytes):
                return msgspec.msgpack.decode(rest[0], type=STRUCTS[tag]), []
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            raise Damaged(f"its {tag} cannot be read: {error}") from error
        raise Damaged(f"tag {tag[:40]!r} is not known")

    def _array(self, tag: str, rest: list[Any]) -> Any:
        """An array or a tensor, from bytes that are here or in a file."""
        if len(rest) == 1 and isinstance(rest[0], bytes):
            data = rest[0]
        elif len(rest) == 2 and rest[0] is None:
            data = self._read(self._named(rest[1]))
        else:
            raise Damaged(f"its {tag} has neither bytes nor a file")
        load = safetensors.numpy.load if tag == "array" else safetensors.torch.load
        try:
            found = load(data)
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise Damaged(f"its {tag} cannot be read: {error}") from error
        if list(found) != [""]:
            raise Damaged(f"its {tag} is not one, but {len(found)}")
        return found[""]

    def _named(self, name: Any) -> str:
        """The name of a file of this checkpoint."""
        if not isinstance(name, str) or name not in self._files:
            raise Damaged(f"{str(name)[:40]!r} is no file of this checkpoint")
        return name

    def _container(self, tag: str, rest: list[Any]) -> Any:
        """A mapping or a sequence."""
        kind: Any = CONTAINERS[tag]
        values = [self._value(item) for item in rest]
        keyed = issubclass(kind, dict)
        keys = rest[::2] if keyed else rest if issubclass(kind, set | frozenset) else []
        if any(self._size(item) > _LARGEST_KEY for item in keys):
            raise Damaged(f"a key of its {tag} is too large")
        try:
            contents: Any = dict(zip(values[::2], values[1::2], strict=True)) if keyed else values
            made: Any = kind(contents)
        except (TypeError, ValueError) as error:  # a key that cannot be one; a key without a value
            raise Damaged(f"its {tag} cannot be made: {error}") from error
        if keys and len(made) != len(keys):
            raise Damaged(f"its {tag} holds a key twice")
        return made

    def _object(self, tag: str, rest: list[Any]) -> Any:
        """An object of a type in the table, with all its fields."""
        kind = KINDS[tag]
        values = [self._value(item) for item in rest[1::2]]
        names = [field.name for field in dataclasses.fields(kind.type)]
        if rest[::2] != names or len(values) != len(names):
            raise Damaged(f"its {tag} has the fields {str(rest[::2])[:200]}; it must have {names}")
        made: Any = object.__new__(kind.type)
        for name, value in zip(names, values, strict=True):
            if name == kind.packet:
                if not is_packet(value) or value.nbytes != values[names.index("num_bytes")]:
                    raise Damaged(f"its {tag} holds no packet of the length that it names")
                value = self._channel.put(value)
            object.__setattr__(made, name, value)
        found = self._check.mismatch(made, kind.type)
        if found is not None:
            raise Damaged(f"its {tag}.{found[0]} {found[1]}")
        if (problem := kind.problem(made)) != "":
            raise Damaged(f"its {tag}: {problem}")
        return made
