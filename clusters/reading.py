"""Converts mappings as people write them to structs: units become numbers, a mistake one sentence that names the field."""

import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from .units import UNITS, Kind, parse_quantity, shown
from .yaml_text import is_unicode

T = TypeVar("T", bound=msgspec.Struct)
_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "str": "text",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}


def read_struct(raw: Mapping[str, Any], struct: type[T], path: str) -> T:
    """``raw`` as a ``struct``; the unit of a field follows from the end of its name (``memory_bytes``, ``latency_s``).

    ``path``: name of the mapping, for errors (``fleet``). Where an inner struct has a ``shorthand``, a plain number sets the
    fields that it names. Raises ``ValueError`` in one sentence.
    """
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    for key in raw:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{path}.{key} is not a field{hint}; allowed here: {', '.join(fields)}")
    if missing := [name for name, field in fields.items() if field.required and name not in raw]:
        raise ValueError(f"{path}.{missing[0]} is missing; it has no default")
    values = {}
    for name, value in raw.items():
        expected, field, unit = fields[name].type, f"{path}.{name}", _unit(name)
        if isinstance(value, str) and not is_unicode(value):
            raise ValueError(f"{field} is {value!r}, which holds half of a surrogate pair; it must be text")
        plain = (
            parse_quantity(value, kind=unit, field=field)
            if unit and value is not None
            else _inner(value, expected, field)
        )
        try:
            values[name] = msgspec.convert(plain, expected)
        except msgspec.ValidationError as error:
            raise ValueError(_sentence(str(error), value, expected, field)) from error
    return struct(**values)


def _unit(field: str) -> Kind | None:
    """The kind of quantity that a field of this name holds, by its longest ending that is a quantity; None for no quantity."""
    endings = [kind for kind in UNITS if field == kind or field.endswith(f"_{kind}")]
    return max(endings, key=len, default=None)


def _inner(value: Any, annotation: Any, path: str) -> Any:
    """``value`` with its inner structs read; a value of the wrong shape is left to msgspec, which refuses it."""
    annotation = _bare(annotation)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = dict.fromkeys(getattr(annotation, "shorthand", ()), value) or value
        if isinstance(value, Mapping):
            return read_struct(value, annotation, path)
    if typing.get_origin(annotation) is tuple and isinstance(value, list | tuple):
        return [
            _inner(item, typing.get_args(annotation)[0], f"{path}[{position}]") for position, item in enumerate(value)
        ]
    if typing.get_origin(annotation) is dict and isinstance(value, Mapping):
        return {key: _inner(item, typing.get_args(annotation)[1], f"{path}.{key}") for key, item in value.items()}
    return value


def _bare(annotation: Any) -> Any:
    """The type without ``| None`` and annotations."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [choice for choice in typing.get_args(annotation) if choice is not type(None)]
        return _bare(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _choices(annotation: Any) -> list[str]:
    """The values that a ``Literal`` anywhere in the type allows."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return [choice for inner in typing.get_args(annotation) for choice in _choices(inner)]


def _sentence(message: str, value: Any, annotation: Any, path: str) -> str:
    """msgspec's message as a sentence of ours: the field, the value as it was written, what is allowed."""
    match = re.fullmatch(r"(?P<what>.*?)(?: - at `\$(?P<inside>[^`]*)`)?", message, re.DOTALL)
    assert match is not None
    inside = re.fullmatch(r"\[(\d+)\]", match["inside"] or "")
    if inside and isinstance(value, list | tuple):
        path, value = f"{path}{inside[0]}", value[int(inside[1])]
    if _choices(annotation):
        return f"{path} is {shown(value)}; it must be one of {', '.join(_choices(annotation))}"
    what = re.sub(
        r"[a-z]+", lambda word: _WORDS.get(word[0], word[0]), match["what"].removeprefix("Expected ").split(", got")[0]
    )
    what = re.sub(r"(\d)\.0\b", r"\1", what)  # msgspec's bounds of a float: "> 0.0"
    return f"{path} is {shown(value)}; it must be {what.replace('`', '').replace(' | ', ' or ')}"
