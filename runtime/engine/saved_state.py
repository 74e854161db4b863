"""Objects with state, which a checkpoint saves and restores by the declarations of their classes.

    SAVED = {"time_s": float, "_round": Round, ...}      attributes with their types, which may be objects with state too
    NOT_SAVED = ("_fleet", ...)                           all other attributes: built anew from the configuration
    saved(), restore(value), SAVED_AS                     for an object that is saved as something else; SAVED_AS is its type

A test compares both lists with the attributes of the objects of a run (tests/runtime/engine/test_saved_state.py).
"""

from collections.abc import Mapping
from typing import Any

from ...policies.checks.type_check import TypeCheck
from ..errors import Damaged


def collect(target: Any) -> Any:
    """The saved state of an object."""
    if hasattr(target, "saved"):
        return target.saved()
    values = {name: getattr(target, name) for name in target.SAVED}
    return {name: collect(value) if has_state(value) else value for name, value in values.items()}


def check(target: Any, value: Any, *, where: str = "") -> None:
    """Raise ``Damaged`` unless ``restore`` can put ``value`` into a new object. Changes nothing.

    ``where``: the path of the object, for the error.
    """
    types = getattr(target, "SAVED_AS", None) or target.SAVED
    nested = {} if hasattr(target, "saved") else {name: getattr(target, name) for name in types}
    nested = {name: inner for name, inner in nested.items() if has_state(inner)}
    if found := TypeCheck(into_structs=False).mismatch(value, _without_nested(types, nested)):
        raise Damaged(f"{'.'.join(filter(None, (where, found[0])))} {found[1]}")
    for name, inner in nested.items():
        check(inner, value[name], where=f"{where}.{name}".lstrip("."))


def restore(target: Any, value: Any) -> None:
    """Put a saved state, which ``check`` has accepted, into a new object."""
    if hasattr(target, "restore"):
        target.restore(value)
        return
    for name, saved in value.items():
        current = getattr(target, name)
        if has_state(current):
            restore(current, saved)
        elif isinstance(current, dict):  # filled in place, since other objects may refer to it
            current.clear()
            current.update(saved)
        else:
            setattr(target, name, saved)


def has_state(target: Any) -> bool:
    """Whether the class of an object declares its saved attributes."""
    return hasattr(type(target), "SAVED")


def _without_nested(types: Any, nested: Mapping[str, Any]) -> Any:
    """The types of the saved attributes, with ``Any`` for objects with state, which are checked separately."""
    return {**types, **dict.fromkeys(nested, Any)} if nested else types
