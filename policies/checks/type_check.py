"""Checks of values against type annotations, as msgspec does while it decodes, for objects that were made in Python.

Neither a dataclass nor a struct checks its fields when it is created, so a plan of a user's policy, or a value that was
restored from a checkpoint, may hold values of any type. ``mismatch`` supports the annotations that are used for such values:
plain types, containers, unions, literals, ``Annotated`` with ``msgspec.Meta`` bounds, arrays, dataclasses and structs. A
mapping from names to annotations stands for a dict with exactly these keys.
"""

import collections
import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from ...clusters.units import shown

Path = tuple[tuple[str, Any], ...]  # ("." or "[" or "key", and the name, the position or the key), outermost first


class Problem(NamedTuple):
    """A part of a value that does not match its annotation: its path, the part, and what it must be."""

    path: Path
    value: Any
    must: str

    def describe(self) -> tuple[str, str]:
        """The path, and what is wrong there, in words."""
        where = "".join(map(_step, self.path)).removeprefix(".")
        return where, f"is {shown(self.value)}; it must {self.must}"


Problems = Iterator[Problem]
_BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}
_WORDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "True or False", "NoneType": "None"}
# Types that an annotation of a container allows, exactly: a Counter in place of a dict would return 0 for missing keys.
_CONTAINERS: dict[Any, tuple[type, ...]] = {
    collections.abc.Sequence: (list, tuple),
    collections.abc.Mapping: (dict,),
    dict: (dict, collections.defaultdict),
}


def mismatch(value: Any, hint: Any, *, into_structs: bool = True) -> tuple[str, str] | None:
    """Path of the first part of ``value`` that does not match its annotation, and what is wrong there; None where all match.

    ``into_structs`` False skips the fields of msgspec structs, which are correct after decoding. An object that occurs several
    times is checked once for each annotation. The annotations must not be recursive.
    """
    return TypeCheck(into_structs=into_structs).mismatch(value, hint)


class TypeCheck:
    """Checks of several values that share parts: a part that matched an annotation is not checked against it again."""

    def __init__(self, *, into_structs: bool = True) -> None:
        """See ``mismatch``. The values must not change during the lifetime of this object."""
        self._into_structs = into_structs
        # By the ids of value and annotation. The entry keeps both alive, so that their ids are not reused.
        self._checked: dict[tuple[int, int], tuple[Any, Any]] = {}

    def mismatch(self, value: Any, hint: Any) -> tuple[str, str] | None:
        """See the function ``mismatch``."""
        problem = next(self._problems(value, hint, ()), None)
        return problem.describe() if problem is not None else None

    def _problems(self, value: Any, hint: Any, path: Path) -> Problems:
        key = id(value), id(hint)
        if key in self._checked:
            return
        yield from self._compare(value, hint, path)
        self._checked[key] = value, hint

    def _compare(self, value: Any, hint: Any, path: Path) -> Problems:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return
        if isinstance(hint, Mapping):
            yield from self._record(value, hint, path)
        elif origin is typing.Annotated:
            yield from self._problems(value, arguments[0], path)
            for meta in hint.__metadata__:
                yield from _out_of_bounds(value, meta, path)
        elif origin in (typing.Union, types.UnionType):
            yield from self._union(value, arguments, path)
        elif origin is typing.Literal:
            if not any(value == each and type(value) is type(each) for each in arguments):
                yield Problem(path, value, f"be one of {', '.join(map(repr, arguments))}")
        elif origin is collections.abc.Callable:
            if not callable(value):
                yield Problem(path, value, "be callable")
        elif origin is not None:
            yield from self._container(value, origin, arguments, path)
        elif not _is(value, hint):
            yield Problem(path, value, f"be {_name(hint)}")
        elif dataclasses.is_dataclass(value) or (self._into_structs and isinstance(value, msgspec.Struct)):
            for name, inner in fields_of(value.__class__).items():
                yield from self._problems(getattr(value, name), inner, (*path, (".", name)))

    def _record(self, value: Any, hints: Mapping[str, Any], path: Path) -> Problems:
        if type(value) is not dict or set(value) != set(hints):
            yield Problem(path, sorted(map(str, value)) if isinstance(value, dict) else value, f"hold {sorted(hints)}")
            return
        for name, inner in hints.items():
            yield from self._problems(value[name], inner, (*path, (".", name)))

    def _union(self, value: Any, choices: tuple[Any, ...], path: Path) -> Problems:
        """No problem if one choice matches; where a single choice has the value's type, the problems by that choice."""
        others = [choice for choice in choices if choice is not types.NoneType]
        if value is None and len(others) < len(choices):
            return
        found = []
        for choice in others:
            problem = next(self._problems(value, choice, path), None)
            if problem is None:
                return
            found.append(problem)
        inside = [problem for problem in found if problem.path != path]
        if inside:
            yield inside[0]
        elif len(others) == 1:
            yield found[0]._replace(must=f"{found[0].must} or None")
        else:
            yield Problem(path, value, f"be {' or '.join(map(_name, choices))}")

    def _container(self, value: Any, origin: Any, arguments: tuple[Any, ...], path: Path) -> Problems:
        allowed = _CONTAINERS.get(origin, (origin,))
        if type(value) not in allowed:
            yield Problem(path, value, f"be a {' or '.join(kind.__name__ for kind in allowed)}")
        elif origin is tuple and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                yield Problem(path, value, f"have {len(arguments)} entries")
                return
            for place, (item, inner) in enumerate(zip(value, arguments, strict=True)):
                yield from self._problems(item, inner, (*path, ("[", place)))
        elif isinstance(value, dict):
            inner = arguments[1] if len(arguments) > 1 else int  # a Counter's
            for key, item in value.items():
                yield from self._problems(key, arguments[0], (*path, ("key", key)))
                yield from self._problems(item, inner, (*path, ("[", key)))
        elif isinstance(value, Iterable) and origin in (tuple, list, set, frozenset, collections.deque, *_CONTAINERS):
            for place, item in enumerate(value):
                yield from self._problems(item, arguments[0], (*path, ("[", place)))


@functools.cache
def fields_of(class_: Any) -> dict[str, Any]:
    """Annotations of the fields of a dataclass or a struct, by name."""
    hints = typing.get_type_hints(class_, include_extras=True)
    if issubclass(class_, msgspec.Struct):
        return {name: hints[name] for name in class_.__struct_fields__}
    return {field.name: hints[field.name] for field in dataclasses.fields(class_)}


def _is(value: Any, expected: Any) -> bool:
    """Whether a value is of a plain type. A bool is not a number here, and an int is accepted as a float."""
    if expected is None:
        return value is None
    if expected in (int, float):
        return isinstance(value, int | float if expected is float else int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _out_of_bounds(value: Any, meta: Any, path: Path) -> Problems:
    if isinstance(meta, msgspec.Meta) and isinstance(value, int | float):
        for name, (word, holds) in _BOUNDS.items():
            bound = getattr(meta, name)
            if bound is not None and not holds(value, bound):
                yield Problem(path, value, f"be {word} {bound:g}")


def _step(step: tuple[str, Any]) -> str:
    """One step of a path, in words."""
    kind, key = step
    if kind == ".":
        return f".{key}"
    return f"[{shown(key)}]" if kind == "[" else f", key {shown(key)},"


def _name(hint: Any) -> str:
    """An annotation, in words."""
    if typing.get_origin(hint) is typing.Annotated:
        return _name(typing.get_args(hint)[0])
    name = "NoneType" if hint is None else getattr(hint, "__name__", str(hint))
    return _WORDS.get(name, f"a {name}")
