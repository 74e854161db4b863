"""Conversion of mappings to settings: every error names the field, the value and what is allowed."""

# ruff: noqa: E501  (a table of sentences: one row a line)

from typing import Annotated, Any, Literal

import msgspec
import pytest
from fedbonsai.runtime.configuration.convert import convert
from fedbonsai.runtime.errors import ConfigError


class Small(msgspec.Struct, frozen=True, tag="small", tag_field="name", forbid_unknown_fields=True):
    pass


class Large(msgspec.Struct, frozen=True, tag="large", tag_field="name", forbid_unknown_fields=True):
    size: Annotated[float, msgspec.Meta(gt=0)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    weight: float = 1.0


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: Annotated[int, msgspec.Meta(ge=1)] = 1
    colour: Literal["red", "green"] = "red"
    share: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    limit: Annotated[float, msgspec.Meta(gt=0)] | None = None

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("inner.count is 13; it must be any other number")


class Outer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    inner: Inner = Inner()
    kind: Small | Large = Small()
    entries: tuple[Entry, ...] = ()
    pair: tuple[float, float] = (0.0, 0.0)
    free: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    flag: bool = False


def test_values_are_converted_at_every_depth():
    raw = {"inner": {"count": 2, "colour": "green"}, "kind": {"name": "large", "size": 3}, "entries": [{"name": "a"}]}
    assert convert(raw, Outer) == Outer(
        inner=Inner(count=2, colour="green"), kind=Large(size=3.0), entries=(Entry("a"),)
    )


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"iner": {}}, "iner is not a setting (did you mean 'inner'?); allowed here: inner, kind, entries, pair, free, numbers, flag"),
        ({"inner": {"cnt": 1}}, "inner.cnt is not a setting (did you mean 'count'?); allowed here: count, colour, share, limit"),
        ({"kind": {"name": "large", "size": 1, "x": 1}}, "kind.x is not a setting; allowed here: name, size"),
        ({"entries": [{"name": "a"}, {"nme": "b"}]}, "entries[1].nme is not a setting (did you mean 'name'?); allowed here: name, weight"),
        ({"kind": {"name": "medium"}}, "kind.name is 'medium'; it must be one of small, large"),
        ({"kind": {}}, "kind.name is None; it must be one of small, large"),
        ({"kind": {"name": "large"}}, "kind.size is missing; it has no default"),
        ({"entries": [{}]}, "entries[0].name is missing; it has no default"),
        ({"inner": {"count": 0}}, "inner.count is 0; it must be a whole number >= 1"),
        ({"inner": {"count": 1.5}}, "inner.count is 1.5; it must be a whole number"),
        ({"inner": {"count": True}}, "inner.count is True; it must be a whole number"),
        ({"inner": {"count": "two"}}, "inner.count is 'two'; it must be a whole number"),
        ({"inner": {"count": None}}, "inner.count is None; it must be a whole number"),
        ({"inner": {"colour": "blue"}}, "inner.colour is 'blue'; it must be one of red, green"),
        ({"inner": {"colour": 3}}, "inner.colour is 3; it must be one of red, green"),
        ({"inner": {"share": 1}}, "inner.share is 1; it must be a number < 1"),
        ({"inner": {"share": -0.5}}, "inner.share is -0.5; it must be a number >= 0"),
        ({"inner": {"share": float("nan")}}, "inner.share is nan; it must be a finite number"),
        ({"inner": {"limit": float("inf")}}, "inner.limit is inf; it must be a finite number"),
        ({"inner": {"limit": "x"}}, "inner.limit is 'x'; it must be a number or null"),
        ({"inner": {"count": 13}}, "inner.count is 13; it must be any other number"),
        ({"inner": 5}, "inner is 5; it must be a mapping"),
        ({"entries": "a"}, "entries is 'a'; it must be a list"),
        ({"entries": ["a"]}, "entries[0] is 'a'; it must be a mapping"),
        ({"pair": [1]}, "pair is [1]; it must be a list of length 2"),
        ({"pair": [1, "b"]}, "pair[1] is 'b'; it must be a number"),
        ({"free": {1: 2}}, "free is {1: 2}; its keys must be text"),
        ({"numbers": {"a": "b"}}, "numbers is {'a': 'b'}; each of its values must be a whole number"),
        ({"flag": 1}, "flag is 1; it must be true or false"),
        (5, "the configuration is 5; it must be a mapping"),
        ({"inner": "x" * 200}, f"inner is '{'x' * 76}...; it must be a mapping"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_sentence_with_field_value_and_what_is_allowed(raw, sentence):
    with pytest.raises(ConfigError) as caught:
        convert(raw, Outer)
    assert str(caught.value) == sentence


def test_keyword_arguments_of_the_users_own_may_be_anything():
    assert convert({"free": {"a": float("inf"), "b": [1, {"c": None}]}}, Outer).free["b"] == [1, {"c": None}]
