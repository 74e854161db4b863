"""Checks of values against annotations: every form that plans and checkpoints use."""

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from fedbonsai.policies.checks.type_check import mismatch

Count = Annotated[int, msgspec.Meta(ge=0)]


class Colour(Enum):
    RED = 1


class Point(msgspec.Struct, frozen=True):
    x: Annotated[float, msgspec.Meta(gt=0, lt=10)]
    y: int | None = None


@dataclass(frozen=True)
class Box:
    corner: Point
    sizes: tuple[Count, ...] = ()


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (1, float),
        (1.5, float),
        (None, None),
        (None, int | None),
        ("a", str),
        (b"a", bytes),
        (True, bool),
        (Colour.RED, Colour),
        ((1, "a"), tuple[int, str]),
        ((), tuple[int, ...]),
        ([1, 2], list[int]),
        ([1, 2], Sequence[int]),
        (deque([1]), deque[int]),
        ({1}, set[int]),
        (frozenset({1}), frozenset[int]),
        ({"a": (1, 2)}, dict[str, tuple[int, ...]]),
        ({"a": 1}, Mapping[str, int]),
        (OrderedDict(a=1), OrderedDict[str, int]),
        (Counter("aab"), Counter[str]),
        (np.zeros(2), npt.NDArray[Any]),
        ("up", Literal["up", "down"]),
        (Box(Point(1.0), (2, 3)), Box),
        ({"a": 1, "b": [Point(2.0)]}, {"a": int, "b": list[Point]}),
        (print, Any),
    ],
    ids=str,
)
def test_values_that_match_their_annotation(value, hint):
    assert mismatch(value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "where", "what"),
    [
        (True, int, "", "is True; it must be a whole number"),
        (1.0, int, "", "is 1.0; it must be a whole number"),
        ("1", float, "", "is '1'; it must be a number"),
        (None, int, "", "is None; it must be a whole number"),
        ("a", int | None, "", "is 'a'; it must be a whole number or None"),
        ("a", int | list[int], "", "is 'a'; it must be a whole number or a list"),
        (-1, Count, "", "is -1; it must be at least 0"),
        (-1, Count | None, "", "is -1; it must be at least 0 or None"),
        (float("nan"), Annotated[float, msgspec.Meta(ge=0)], "", "is nan; it must be at least 0"),
        ([1], tuple[int, ...], "", "is [1]; it must be a tuple"),
        ((1,), tuple[int, str], "", "is (1,); it must have 2 entries"),
        ((1, 2), tuple[int, str], "[1]", "is 2; it must be text"),
        ({1}, Sequence[int], "", "is {1}; it must be a list or tuple"),
        ({1: 1}, dict[str, int], ", key 1,", "is 1; it must be text"),
        ({"a": "b"}, dict[str, int], "['a']", "is 'b'; it must be a whole number"),
        (Counter(a=1), Mapping[str, int], "", "is Counter({'a': 1}); it must be a dict"),
        (Counter({"a": 1.5}), Counter[str], "['a']", "is 1.5; it must be a whole number"),
        (1, Literal[True], "", "is 1; it must be one of True"),
        (Point(0.0), Point, "x", "is 0.0; it must be above 0"),
        (Box(3), Box, "corner", "is 3; it must be a Point"),
        (Box(Point(1.0), (2, -3)), Box, "sizes[1]", "is -3; it must be at least 0"),
        (Box(Point(1.0, "y")), Box, "corner.y", "is 'y'; it must be a whole number or None"),
        ([Box(Point(11.0))], list[Box], "[0].corner.x", "is 11.0; it must be below 10"),
        ({"a": 1}, {"a": int, "b": int}, "", "is ['a']; it must hold ['a', 'b']"),
        ({"a": "x", "b": 1}, {"a": int, "b": int}, "a", "is 'x'; it must be a whole number"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_does_not_match_is_reported_with_its_path(value, hint, where, what):
    assert mismatch(value, hint) == (where, what)


def test_structs_that_were_decoded_are_not_checked():
    assert mismatch(Box(Point(0.0)), Box, into_structs=False) is None
    assert mismatch(Box(3), Box, into_structs=False) is not None


def test_an_object_that_occurs_several_times_is_checked_once():
    value = []
    for _ in range(200):  # 2 ** 200 when written out
        value = [value, value]
    hint: Any = list[Any]
    for _ in range(199):
        hint = list[hint]
    assert mismatch(value, hint) is None
