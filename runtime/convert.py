"""From plain mappings to typed settings, with errors that name the field, the value and what is allowed."""

import difflib
import re
import types
import typing
from typing import Any, TypeVar

import msgspec

from .errors import ConfigError

T = TypeVar("T")


def convert(raw: Any, kind: type[T]) -> T:
    """``raw`` as ``kind``; raises ``ConfigError`` in one sentence for an unknown key or a value that is not allowed."""
    _check_keys(raw, kind, "")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_sentence(str(error), raw)) from error


def _check_keys(raw: Any, kind: Any, path: str) -> None:
    """Refuse unknown keys at every depth, with the allowed ones."""
    if not isinstance(raw, dict):
        return
    structs = [choice for choice in _choices(kind) if isinstance(choice, type) and issubclass(choice, msgspec.Struct)]
    tagged = [s for s in structs if s.__struct_config__.tag_field]
    if tagged:
        field = tagged[0].__struct_config__.tag_field or "name"
        named = {s.__struct_config__.tag: s for s in tagged}
        if raw.get(field) not in named:
            raise ConfigError(
                f"{path or 'config'}.{field} is {raw.get(field)!r}; it must be one of {', '.join(map(str, named))}"
            )
        chosen, extra = named[raw.get(field)], [field]
    elif len(structs) == 1:
        chosen, extra = structs[0], []
    else:
        return
    fields = {f.encode_name: f for f in msgspec.structs.fields(chosen)}
    for key, value in raw.items():
        here = f"{path}.{key}" if path else str(key)
        if key in fields:
            _check_keys(value, fields[key].type, here)
        elif key not in extra:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"{here} is not a setting{hint}; allowed here: {', '.join([*extra, *fields])}")


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself, without annotations."""
    if typing.get_origin(kind) is typing.Annotated:
        return _choices(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(choice for arg in typing.get_args(kind) for choice in _choices(arg))
    return (kind,)


def _sentence(message: str, raw: Any) -> str:
    """msgspec's message as ours: field first, then the value, then what is allowed."""
    match = re.fullmatch(r"(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?", message, re.DOTALL)
    assert match is not None
    what, path = match["what"], (match["path"] or "$").removeprefix("$").lstrip(".")
    value = raw
    for step in re.findall(r"[^.\[\]]+", path):
        try:
            value = value[int(step)] if isinstance(value, list | tuple) else value[step]
        except (KeyError, IndexError, ValueError, TypeError):
            return f"{path or 'config'}: {what[:1].lower()}{what[1:]}"
    if isinstance(value, dict | list) and len(str(value)) > 60:
        return f"{path or 'config'}: {what[:1].lower()}{what[1:]}"
    allowed = what.removeprefix("Expected ").replace("`", "")
    if what.startswith("Expected"):
        return f"{path or 'config'} is {value!r}; expected {allowed}"
    return f"{path or 'config'} is {value!r}: {what[:1].lower()}{what[1:]}"
