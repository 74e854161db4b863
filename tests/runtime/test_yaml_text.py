"""YAML as people mean it."""

import pytest
from fedbonsai.runtime.yaml_text import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1.5E+2", 150.0), ("-2e3", -2000.0), (".5e1", 5.0), ("1_000", 1000), ("12", 12), ("0.1", 0.1)],
)
def test_numbers_are_numbers(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize("text", ["e3", "1e", "1e3x", "one"])
def test_what_only_looks_like_a_number_is_text(text):
    assert parse_yaml(text) == text


def test_a_key_that_occurs_twice_is_refused_with_its_line():
    with pytest.raises(ValueError, match=r"^key 'seed' occurs twice \(line 3, column 1\)$"):
        parse_yaml("seed: 1\nname: a\nseed: 2\n")


def test_a_key_may_occur_again_elsewhere():
    assert parse_yaml("a: {name: 1}\nb: {name: 1}") == {"a": {"name": 1}, "b": {"name": 1}}


def test_anchors_still_merge():
    assert parse_yaml("a: &x {p: 1}\nb: {<<: *x, q: 2}")["b"] == {"p": 1, "q": 2}


def test_what_is_merged_may_be_overridden():
    text = "a: &x {p: 1, q: 1}\nb: &y {<<: *x, q: 2}\nc: {<<: *y, q: 3}\nd: {<<: [*x, *y]}\n"
    assert parse_yaml(text) == {
        "a": {"p": 1, "q": 1},
        "b": {"p": 1, "q": 2},
        "c": {"p": 1, "q": 3},
        "d": {"p": 1, "q": 1},
    }
    with pytest.raises(ValueError, match=r"^key 'q' occurs twice \(line 2, column 19\)$"):
        parse_yaml("a: &x {p: 1}\nb: {<<: *x, q: 2, q: 3}")


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\t- x", "!!python/object:os.system x"])
def test_what_is_not_safe_yaml_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="line 1") as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
