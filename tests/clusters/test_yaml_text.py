"""YAML 1.2 scalars, equal keys, and limits."""

import pytest
from fedbonsai.clusters.yaml_text import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1.5E+2", 150.0), ("-2e3", -2000.0), (".5e1", 5.0), ("1_000", 1000), ("12", 12), ("0.1", 0.1)],
)
def test_numbers_are_numbers(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize("text", ["e3", "1e", "1e3x", "one"])
def test_text_that_only_resembles_a_number_is_text(text):
    assert parse_yaml(text) == text


def test_a_key_that_occurs_twice_is_refused_with_its_line():
    with pytest.raises(ValueError, match=r"^key 'seed' occurs twice \(line 3, column 1\)$"):
        parse_yaml("seed: 1\nname: a\nseed: 2\n")


def test_a_key_may_occur_again_elsewhere():
    assert parse_yaml("a: {name: 1}\nb: {name: 1}") == {"a": {"name": 1}, "b": {"name": 1}}


def test_anchors_still_merge():
    assert parse_yaml("a: &x {p: 1}\nb: {<<: *x, q: 2}")["b"] == {"p": 1, "q": 2}


def test_merged_keys_may_be_overridden():
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
def test_unsafe_yaml_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="line 1") as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def bomb(kind):
    """A few lines whose aliases stand for more values than a machine holds."""
    first = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" if kind == "list" else "a0: &a0 {k: 1}\n"
    lines = [first]
    for i in range(1, 30):
        nine = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(
            f"a{i}: &a{i} [{nine}]\n" if kind == "list" else f"a{i}: &a{i} {{<<: [{nine}], k{i}: *a{i - 1}}}\n"
        )
    return "".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (bomb("list"), "aliases stand for more than 100,000 values"),
        (bomb("mapping"), "aliases stand for more than 100,000 values"),
        ("a: &a [1, *a]", "an alias stands inside the value that it names"),
        ("a: &a {b: {c: *a}}", "an alias stands inside the value that it names"),
        ("[" * 1500 + "]" * 1500, "values are nested more than 100 deep"),
        ("{a: " * 1500 + "1" + "}" * 1500, "values are nested more than 100 deep"),
        ("- " * 1500 + "1", "values are nested more than 100 deep"),
        ("a: !!timestamp foo", "tag '!!timestamp' is not allowed in settings"),
        ("a: !!binary foo", "tag '!!binary' is not allowed in settings"),
        ("a: !!set {b}", "tag '!!set' is not allowed in settings"),
        ("a: !mine 3", "tag '!mine' is not allowed in settings"),
        ("a: !!int foo", "'foo' cannot be read as !!int"),
        ("a: !!bool 3", "'3' cannot be read as !!bool"),
        ("a: !!int ''", "'' cannot be read as !!int"),
        ("a: " + "9" * 5000, "'9999999999999999999999999999999999999...' cannot be read as !!int"),
        ('a: "\\ud800"', r"text '\ud800' holds half of a surrogate pair"),
    ],
    ids=lambda text: text[:20],
)
def test_input_that_no_settings_file_needs_is_refused_with_its_place(text, problem):
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(f"{problem} (line ")


def test_moderate_aliases_and_dates_are_read():
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert parse_yaml("a: 2001-01-01") == {"a": "2001-01-01"}  # YAML 1.2: text


def test_a_long_file_without_aliases_is_read(monkeypatch):
    monkeypatch.setattr("fedbonsai.clusters.yaml_text.MOST_ALIASED", 10)
    rows = [[device, start, start + 1] for device in range(2) for start in range(50)]
    assert parse_yaml(str(rows)) == rows
    with pytest.raises(ValueError, match="aliases stand for more than 10 values"):
        parse_yaml("a: &a [1, 2, 3]\nb: [*a, *a, *a, *a]")
