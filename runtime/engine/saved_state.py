"""Things with state: objects that a checkpoint saves and restores, each by what it declares of itself.

    SAVED = {"time_s": float, "_round": Round, ...}      attributes with their types, which may be such things themselves
    NOT_SAVED = ("_fleet", ...)                           all others: built anew from the configuration
    saved(), restore(value), SAVED_AS                     where that does not do; the last is the type of what is saved

A test holds both lists against the attributes that the objects of a run have (tests/runtime/test_state.py).
"""

from collections.abc import Mapping
from typing import Any

from ...policies.checks.type_check import TypeCheck
from ..errors import Damaged


def collect(thing: Any) -> Any:
    """What is to be saved of a thing."""
    if hasattr(thing, "saved"):
        return thing.saved()
    values = {name: getattr(thing, name) for name in thing.SAVED}
    return {name: collect(value) if has_state(value) else value for name, value in values.items()}


def check(thing: Any, value: Any, *, where: str = "") -> None:
    """Raise ``Damaged`` unless ``restore`` can put ``value`` into a thing that was built anew. Changes nothing."""
    types = getattr(thing, "SAVED_AS", None) or thing.SAVED
    nested = {} if hasattr(thing, "saved") else {name: getattr(thing, name) for name in types}
    nested = {name: held for name, held in nested.items() if has_state(held)}
    if found := TypeCheck(into_structs=False).mismatch(value, _with_anything(types, nested)):
        raise Damaged(f"{'.'.join(filter(None, (where, found[0])))} {found[1]}")
    for name, held in nested.items():
        check(held, value[name], where=f"{where}.{name}".lstrip("."))


def restore(thing: Any, value: Any) -> None:
    """Put what ``collect`` found, after a way through bytes and ``check``, into a thing that was built anew."""
    if hasattr(thing, "restore"):
        thing.restore(value)
        return
    for name, inner in value.items():
        held = getattr(thing, name)
        if has_state(held):
            restore(held, inner)
        elif isinstance(held, dict):  # others may hold it too
            held.clear()
            held.update(inner)
        else:
            setattr(thing, name, inner)


def has_state(thing: Any) -> bool:
    """Whether an object declares what of it is saved."""
    return hasattr(type(thing), "SAVED")


def _with_anything(types: Any, nested: Mapping[str, Any]) -> Any:
    """The types of what is saved, but for the things that are looked at by themselves."""
    return {**types, **dict.fromkeys(nested, Any)} if nested else types
