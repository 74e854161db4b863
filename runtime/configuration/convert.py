"""Converts plain mappings to typed settings, with errors that name the field, the value and what is allowed.

msgspec checks the values. Its messages are rewritten here, since they lack the given value and, for a choice, the options.
Unknown keys are found first, at every depth, so that the error can suggest the right spelling.
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
_RENAMED = {"training.channels_last": "training.layout now: channels_last for true, contiguous for false, or auto"}


def convert(raw: Any, target: type[T]) -> T:
    """``raw`` as ``target``. Raises ``ConfigError`` for an unknown key or a value that is not allowed."""
    _check(raw, target, "")
    try:
        return msgspec.convert(raw, target)
    except msgspec.ValidationError as error:
        raise ConfigError(_sentence(str(error), raw, target)) from error


def _check(raw: Any, target: Any, path: str) -> None:
    """Refuse unknown and missing keys at every depth, and numbers that are not finite."""
    if isinstance(raw, float) and not math.isfinite(raw) and float in _choices(target):
        raise ConfigError(f"{path} is {raw!r}; it must be a finite number")
    if isinstance(raw, list | tuple):
        for position, item in enumerate(raw):
            _check(item, _inside(target, position), f"{path}[{position}]")
    chosen = _struct(raw, target, path)
    if chosen is None:
        return
    tag = chosen.__struct_config__.tag_field
    fields = {field.encode_name: field for field in msgspec.structs.fields(chosen)}
    for key, value in raw.items():
        inner = f"{path}.{key}" if path else str(key)
        if key in fields:
            _check(value, fields[key].type, inner)
        elif inner in _RENAMED:
            raise ConfigError(f"{inner} is {shown(value)}; this setting is {_RENAMED[inner]}")
        elif key != tag:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            allowed = ", ".join([*([tag] if tag else []), *fields])
            raise ConfigError(f"{inner} is not a setting{hint}; allowed here: {allowed}")
    if missing := [name for name, field in fields.items() if field.required and name not in raw]:
        raise ConfigError(f"{path}.{missing[0]} is missing; it has no default".lstrip("."))


def _struct(raw: Any, target: Any, path: str) -> type[msgspec.Struct] | None:
    """The struct that ``raw`` is converted to; of a union, the one with the tag of ``raw``. None if it is not a struct."""
    structs = [choice for choice in _choices(target) if isinstance(choice, type) and issubclass(choice, msgspec.Struct)]
    if not isinstance(raw, dict) or not structs:
        return None
    tag = structs[0].__struct_config__.tag_field
    if tag is None:
        return structs[0]
    by_tag = {struct.__struct_config__.tag: struct for struct in structs}
    if raw.get(tag) not in by_tag:
        raise ConfigError(f"{path}.{tag} is {raw.get(tag)!r}; it must be one of {', '.join(map(str, by_tag))}")
    return by_tag[raw.get(tag)]


def _choices(target: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself, without annotations."""
    if typing.get_origin(target) is typing.Annotated:
        return _choices(typing.get_args(target)[0])
    if typing.get_origin(target) in (typing.Union, types.UnionType):
        return tuple(choice for arg in typing.get_args(target) for choice in _choices(arg))
    return (target,)


def _inside(target: Any, step: str | int) -> Any:
    """The declared type of a list's entry or of a struct's field; ``Any`` if there is none."""
    for choice in _choices(target):
        arguments = typing.get_args(choice)
        if typing.get_origin(choice) is tuple and isinstance(step, int):
            return arguments[0] if arguments[-1] is ... else arguments[min(step, len(arguments) - 1)]
        if isinstance(choice, type) and issubclass(choice, msgspec.Struct):
            for field in msgspec.structs.fields(choice):
                if field.encode_name == step:
                    return field.type
    return Any


def _sentence(message: str, raw: Any, target: Any) -> str:
    """msgspec's message rewritten: the field, then the value, then what is allowed."""
    match = re.fullmatch(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?", message, re.DOTALL)
    assert match is not None
    path, what = (match["path"] or "").lstrip("."), match["what"]
    if not what.startswith(("Expected", "Invalid")):  # raised by a struct's own check
        return what
    value: Any = raw
    for name, position in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", f"{path}"):
        step = name or (int(position) if position.isdigit() else position)
        target = _inside(target, step)
        if step == "...":  # an entry of a mapping, which msgspec does not name
            return f"{path.partition('[...]')[0]} is {shown(value)}; each of its values must be {_allowed(what)}"
        value = value[step]
    if match["key"]:
        return f"{path} is {shown(value)}; its keys must be {_allowed(what)}"
    literals = [typing.get_args(c) for c in _choices(target) if typing.get_origin(c) is typing.Literal]
    if literals:
        return f"{path} is {shown(value)}; it must be one of {', '.join(map(str, literals[0]))}"
    return f"{path or 'the configuration'} is {shown(value)}; it must be {_allowed(what)}"


def _allowed(what: str) -> str:
    """ "Expected `float | null`, got `str`" as "a number or null"."""
    expected = what.removeprefix("Expected ").partition(", got")[0]
    words = re.sub(r"[a-z]+", lambda word: _WORDS.get(word[0], word[0]), expected)
    return re.sub(r"(\d)\.0\b", r"\1", words.replace("`", "").replace(" | ", " or "))
