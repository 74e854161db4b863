"""From plain mappings to typed settings, with errors that name the field, the value and what is allowed.

msgspec checks the values; its messages are rewritten here, since they say neither what was given nor, for a choice, what
there is to choose from. Keys are checked before, at every depth, so that a misspelt one is met with its right spelling.
"""

import difflib
import math
import re
import types
import typing
from typing import Any, TypeVar

import msgspec

from ...clusters.units import shown
from ..errors import ConfigError

T = TypeVar("T")
_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


def convert(raw: Any, kind: type[T]) -> T:
    """``raw`` as ``kind``; raises ``ConfigError`` in one sentence for an unknown key or a value that is not allowed."""
    _check(raw, kind, "")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_sentence(str(error), raw, kind)) from error


def _check(raw: Any, kind: Any, path: str) -> None:
    """Refuse unknown keys at every depth, with the allowed ones, and numbers that are not finite."""
    if isinstance(raw, float) and not math.isfinite(raw) and float in _choices(kind):
        raise ConfigError(f"{path} is {raw!r}; it must be a finite number")
    if isinstance(raw, list | tuple):
        for position, item in enumerate(raw):
            _check(item, _inside(kind, position), f"{path}[{position}]")
    chosen = _struct(raw, kind, path)
    if chosen is None:
        return
    tag = chosen.__struct_config__.tag_field
    fields = {field.encode_name: field for field in msgspec.structs.fields(chosen)}
    for key, value in raw.items():
        here = f"{path}.{key}" if path else str(key)
        if key in fields:
            _check(value, fields[key].type, here)
        elif key != tag:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            allowed = ", ".join([*([tag] if tag else []), *fields])
            raise ConfigError(f"{here} is not a setting{hint}; allowed here: {allowed}")
    if missing := [name for name, field in fields.items() if field.required and name not in raw]:
        raise ConfigError(f"{path}.{missing[0]} is missing; it has no default".lstrip("."))


def _struct(raw: Any, kind: Any, path: str) -> type[msgspec.Struct] | None:
    """The struct that ``raw`` is to become: of several, the one whose tag it carries. None when it is not to become one."""
    structs = [choice for choice in _choices(kind) if isinstance(choice, type) and issubclass(choice, msgspec.Struct)]
    if not isinstance(raw, dict) or not structs:
        return None
    tag = structs[0].__struct_config__.tag_field
    if tag is None:
        return structs[0]
    named = {struct.__struct_config__.tag: struct for struct in structs}
    if raw.get(tag) not in named:
        raise ConfigError(f"{path}.{tag} is {raw.get(tag)!r}; it must be one of {', '.join(map(str, named))}")
    return named[raw.get(tag)]


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself, without annotations."""
    if typing.get_origin(kind) is typing.Annotated:
        return _choices(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(choice for arg in typing.get_args(kind) for choice in _choices(arg))
    return (kind,)


def _inside(kind: Any, step: str | int) -> Any:
    """The type of a list's entry, or of a struct's field, where it is declared."""
    for choice in _choices(kind):
        arguments = typing.get_args(choice)
        if typing.get_origin(choice) is tuple and isinstance(step, int):
            return arguments[0] if arguments[-1] is ... else arguments[min(step, len(arguments) - 1)]
        if isinstance(choice, type) and issubclass(choice, msgspec.Struct):
            for field in msgspec.structs.fields(choice):
                if field.encode_name == step:
                    return field.type
    return Any


def _sentence(message: str, raw: Any, kind: Any) -> str:
    """msgspec's message as ours: the field, then the value, then what is allowed."""
    match = re.fullmatch(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?", message, re.DOTALL)
    assert match is not None
    path, what = (match["path"] or "").lstrip("."), match["what"]
    if not what.startswith(("Expected", "Invalid")):  # our own sentence, from a struct's own check
        return what
    value: Any = raw
    for name, position in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", f"{path}"):
        step = name or (int(position) if position.isdigit() else position)
        kind = _inside(kind, step)
        if step == "...":  # an entry of a mapping, which msgspec does not name
            return f"{path.partition('[...]')[0]} is {shown(value)}; each of its values must be {_allowed(what)}"
        value = value[step]
    if match["key"]:
        return f"{path} is {shown(value)}; its keys must be {_allowed(what)}"
    literals = [typing.get_args(c) for c in _choices(kind) if typing.get_origin(c) is typing.Literal]
    if literals:
        return f"{path} is {shown(value)}; it must be one of {', '.join(map(str, literals[0]))}"
    return f"{path or 'the configuration'} is {shown(value)}; it must be {_allowed(what)}"


def _allowed(what: str) -> str:
    """ "Expected `float | null`, got `str`" as "a number or null"."""
    expected = what.removeprefix("Expected ").partition(", got")[0]
    words = re.sub(r"[a-z]+", lambda word: _WORDS.get(word[0], word[0]), expected)
    return re.sub(r"(\d)\.0\b", r"\1", words.replace("`", "").replace(" | ", " or "))
