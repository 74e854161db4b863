"""Every figure of the documentation stands in a committed result, benchmarks/results/NAME.json.

The rule, block by block (a block is a paragraph, a list item, or a table):

1. A block belongs to the results that it links to. A link in a paragraph or table also holds for the blocks below it, up to the
   next heading or to a paragraph with another link; a link in a list item holds for that item.
2. In a block that belongs to a result, every number is a value of that result, rounded to the digits that are printed; or a
   setting: it occurs, with its unit if it has one, in the script (its text says what is measured, and what the aims and the
   paper's figures are), or in a name or text of the result.
3. A number may be in another unit than the value: a share as %, bytes as kB, MB, GB, KiB, MiB or GiB, seconds as ms, minutes or
   hours. A number with a unit of bytes, time or ratio must be a value whose name says that. A number without a unit, as in the
   cell of a table, may have any unit that occurs in the block, of a table also in the block above it.
4. There is no arithmetic: a ratio, difference or mean that a page quotes is written to the result by the script.
5. In a block that belongs to no result, a number with a unit that measures (%, bytes, seconds, times, an accuracy) must be a
   published one (its sentence names a paper) or a setting in code font.
6. Not checked: code and output (in fences, indented, or in code font, except comments in shell commands), numbers in words.

A result that a page links to is complete, and was measured on a commit.
"""

import json
from pathlib import Path

import pytest

from .figures import unproven

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = {
    # Arithmetic on numbers that the sentence gives, not measured.
    "docs/fleets.md": ("So two uploads of 1 MB",),
    "docs/splitting.md": ("For example three micro-batches of 1 s", "A second device on the same host"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_figure_stands_in_a_result(page: Path) -> None:
    name = page.relative_to(ROOT).as_posix()
    wrong = unproven(page.read_text(encoding="utf-8"), ROOT, examples=EXAMPLES.get(name, ()))
    assert not wrong, "\n".join(
        f"{name}:{line}: {number} is in no result that its block links to" for line, number in wrong
    )


def test_exceptions_are_still_there() -> None:
    for name, beginnings in EXAMPLES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert all(beginning in text for beginning in beginnings)


RESULT = {
    "target": 0.9,
    "rows": {
        "small": {
            "accuracy": 0.9474,
            "seconds": 12.34,
            "up_bytes": 1_530_000,
            "overhead_ms": 95.2,
            "times_sooner": 3.42,
        },
        "top 1 %": {"accuracy": 0.8812, "seconds": 60.0, "peak_MB": 838.9},
    },
    "machine": {"command": "measure.py --save", "commit": "0123456789ab", "torch": "2.13.0+cpu", "cores": 2},
}
SCRIPT = '"""Batches of 32 over links of 10 Mb/s; the aim is 30. The paper: 57.4 %."""\nSAMPLES = 10_000\n'
LINK = "([results](../benchmarks/results/measured.json))"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one result and its script."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "measured.json").write_text(json.dumps(RESULT), encoding="utf-8")
    (tmp_path / "benchmarks" / "measure.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


def numbers(page: str, root: Path) -> list[str]:
    return [number for _, number in unproven(page, root)]


@pytest.mark.parametrize(
    "sentence",
    [
        "An accuracy of 0.947, that is 94.7 %, in 12.3 s (a fifth of a minute).",
        "It sends 1.53 MB, or 1,530 kB, or 1.46 MiB, with 95 ms.",
        "It is 3.4 times faster; the target is 90 %.",
        "The other reaches 88.1 % with 1 % of the entries, in 1 minute, with 0.84 GB.",
        "Batches of 32 over 10 Mb/s, 10,000 samples, torch 2.13 on 2 cores; the aim of 30 is missed, the paper's 57.4 % too.",
        "On ResNet-18 and CIFAR-10 (arXiv 2304.05495) with `steps: 77`.",
    ],
)
def test_values_and_settings_of_the_result_are_found(sentence: str, root: Path) -> None:
    assert numbers(f"{sentence} {LINK}", root) == []


@pytest.mark.parametrize(
    ("sentence", "wrong"),
    [
        ("An accuracy of 0.948.", ["0.948"]),
        ("It reaches 94.8 % in 12.4 s.", ["94.8 %", "12.4 s"]),
        ("It sends 1.54 MB.", ["1.54 MB"]),
        ("It takes 94.7 s, or 12.3 MB.", ["94.7 s", "12.3 MB"]),  # values of another kind
        ("It is 4.9 times faster.", ["4.9 times"]),  # 60.0 / 12.34, which the result does not hold
        ("Batches of 33 in 32 s.", ["33", "32 s"]),  # a setting without its unit is no time
        ("A first line of 94.7 %\nand a second of 11.1 %.", ["11.1 %"]),
    ],
)
def test_other_numbers_are_not(sentence: str, wrong: list[str], root: Path) -> None:
    assert numbers(f"{sentence} {LINK}", root) == wrong


def test_a_table_takes_units_from_its_header_and_from_the_sentence_above(root: Path) -> None:
    above = f"Uploads in MB {LINK}:\n\n"
    table = "| | accuracy, % | up | s |\n|---|---|---|---|\n| one | 94.7 | 1.53 | 12.3 |\n"
    assert numbers(above + table, root) == []
    assert numbers(above + table.replace("1.53", "1.55").replace("94.7", "94.9"), root) == ["94.9", "1.55"]


def test_a_link_holds_up_to_the_next_heading(root: Path) -> None:
    below = "It reaches 94.7 %.\n\n- Or 88.1 %.\n- Or 88.2 %.\n"
    assert unproven(f"Measured {LINK}.\n\n{below}", root) == [(6, "88.2 %")]
    assert numbers(f"Measured {LINK}.\n\n## Next\n\n{below}", root) == ["94.7 %", "88.1 %", "88.2 %"]


def test_a_link_in_a_list_item_holds_for_that_item(root: Path) -> None:
    assert numbers(f"- It reaches 94.7 %\n  in 12.3 s {LINK}.\n- It reaches 94.7 %.\n", root) == ["94.7 %"]


@pytest.mark.parametrize(
    "text",
    [
        "Reaches 97 % of it.",
        "It takes 8 simulated seconds.",
        "With an accuracy of 0.97.",
        "It takes 20 s.\nIn a paper it is more (arXiv 1234.56789): another sentence.",
        "It is 16x as fast.",
        "```sh\nfedbonsai run  # some 10 MB up\n```",
        "| a | 3 ms |",
    ],
)
def test_a_figure_without_a_result_is_found(text: str, root: Path) -> None:
    assert len(numbers(text, root)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "The paper's aim is 57 % of it.",
        "Ma et al. report 21 times less ([arXiv 2304.05495](https://arxiv.org/abs/2304.05495)).",
        "At least `1.1` times as fast; up to `1 %`.",
        "Three rounds of 10 devices over 5 MB/s, for 32x32 images, version 1.2, in 2024.",
        "```text\nround 3: 97 %, 12 s\n```",
        "A run prints:\n\n    round 3: 97 %, 12 s\n",
        "<!-- 97 % -->",
    ],
)
def test_published_figures_settings_and_output_need_none(text: str, root: Path) -> None:
    assert numbers(text, root) == []


def test_an_example_is_named_by_its_beginning(root: Path) -> None:
    text = "Three of 1 s take 3 s. A fourth takes 1 s."
    assert unproven(text, root, examples=("Three of",)) == [(1, "1 s")]


@pytest.mark.parametrize("change", [{"partial": True}, {"machine": RESULT["machine"] | {"commit": "0123-dirty"}}])  # type: ignore[operator]
def test_partial_results_and_those_of_no_commit_are_refused(change: dict[str, object], root: Path) -> None:
    (root / "benchmarks" / "results" / "measured.json").write_text(json.dumps(RESULT | change), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"measured\.json is"):
        unproven(f"It reaches 94.7 % {LINK}.", root)
