"""The figures on a page of the documentation, and those that no committed result holds. tests/test_figures.py has the rule."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SIZES, TIMES = r"bytes|memory|remembered|budget|[kMG]i?B|_mb", r"_s\b|_s_|_ms|second"
RATIOS = r"times|ratio|over|_than_|_by_|speedup|spread|efficiency|faster"
# Units of measured figures: what the name of a value in the result must contain, and by what the value may be multiplied.
UNITS: dict[str, tuple[str, tuple[float, ...]]] = {
    "%": ("", (100.0,)),
    "points": ("", (1.0, 100.0)),
    "times": (RATIOS, (1.0,)),
    "x": (RATIOS, (1.0,)),
    "bytes": (SIZES, (1.0,)),
    "kB": (SIZES, (1.0, 1e-3, 1e3)),
    "MB": (SIZES, (1.0, 1e-6)),
    "GB": (SIZES, (1e-3, 1e-9)),
    "KiB": (SIZES, (2.0**-10,)),
    "MiB": (SIZES, (1.0, 2.0**-20)),
    "GiB": (SIZES, (2.0**-30,)),
    "Mb": ("Mb", (1.0,)),
    "ms": (TIMES, (1.0, 1e3)),
    "s": (TIMES, (1.0, 1e-3)),
    "seconds": (TIMES, (1.0, 1e-3)),
    "minutes": (TIMES, (1 / 60,)),
    "hours": (TIMES, (1 / 3600,)),
    "GMACs": ("MACs", (1.0, 1e-9)),
}
UNIT = "|".join(sorted(UNITS, key=len, reverse=True)).replace("minutes", "minutes?").replace("hours", "hours?")
NUMBER = re.compile(
    rf"(?<![\w.,^])(?<![A-Za-z]-)(\d[\d,]*(?:\.\d+)?|\.\d+)(?:[ -]?(?:simulated |virtual )?({UNIT})(?![\w/]))?(?![\w^])"
)
ACCURACY = re.compile(r"accuracy (?:of |is |was )?$")
RESULT = re.compile(r"\]\((?:\.\./)*benchmarks/results/(\w+)\.json\)")
OF_OTHERS = re.compile(r"arXiv|doi|\bpapers?\b|\bet al\.")
SENTENCE = re.compile(r"(?<=[\w)%§]\.)\s+(?=[A-Z§])")
ITEM = re.compile(r"\s*(?:-|\d+\.) ")
# What is no text, and what stands in its place.
NOT_TEXT = [
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"`[^`]*`"), "§"),
    (re.compile(r"(?<=\])\([^)]*\)"), ""),
    (re.compile(r"arXiv:? ?\d{4}\.\d{4,5}"), "arXiv"),
    (re.compile(r"[*_]{2}"), ""),
]


class Block(NamedTuple):
    """A paragraph, list item or table: its first line, its text, and the results that its figures must be in."""

    line: int
    text: str
    results: tuple[str, ...]


class Number(NamedTuple):
    """A number as it is printed, with its unit; "" without one."""

    line: int
    text: str
    value: float
    decimals: int
    unit: str
    sentence: str


class Source(NamedTuple):
    """A result: its numbers with their names, and those in the text of its script."""

    values: list[tuple[str, float]]
    script: str


def blocks_of(page: str) -> list[Block]:
    """All blocks of a page. Output is none: neither in a fence nor indented; comments in shell commands are."""
    found: list[Block] = []
    lines: list[str] = []
    start, fence, results = 0, "", ()

    def end() -> None:
        nonlocal results
        if lines:
            text, item = "\n".join(lines), ITEM.match(lines[0])
            own = tuple(RESULT.findall(text))
            results = results if item else own or results
            found.append(Block(start, text[item.end() :] if item else text, own or results))
            lines.clear()

    for number, line in enumerate([*page.splitlines(), ""], 1):
        table = line.startswith("|")
        if line.startswith(("```", "#")) or fence or not line.strip() or table != _is_table(lines) or ITEM.match(line):
            end()
        if line.startswith("```"):
            fence = "" if fence else line[3:].strip() or "text"
        elif fence:
            if fence == "sh" and " # " in line:
                found.append(Block(number, line.partition(" # ")[2], ()))
        elif line.startswith("#"):
            results = ()
        elif line.strip() and (lines or not line.startswith("    ")):
            start = start if lines else number
            lines.append(line)
    return found


def _is_table(lines: list[str]) -> bool:
    return bool(lines) and lines[0].startswith("|")


def text_of(block: str) -> str:
    """The text without code, addresses, citations and comments, line by line; the numbers of sizes (32 x 32) apart."""
    for pattern, instead in NOT_TEXT:
        block = pattern.sub(lambda match, instead=instead: instead + "\n" * match[0].count("\n"), block)  # type: ignore[misc]
    for _ in range(2):
        block = re.sub(r"(\d) ?x ?(?=\d)", r"\1 ", block)
    return block


def numbers_in(block: Block) -> Iterator[Number]:
    """All numbers of a block. One without a unit that follows the word accuracy has the unit "accuracy"."""
    text = text_of(block.text)
    ends = [*(match.start() for match in SENTENCE.finditer(text)), len(text)]
    for match in NUMBER.finditer(text):
        printed = match[1].rstrip(",")
        decimals = len(printed.partition(".")[2])
        unit = {"minute": "minutes", "hour": "hours"}.get(match[2] or "", match[2] or "")
        if not unit and decimals and ACCURACY.search(text[: match.start()]):
            unit = "accuracy"
        line = block.line + text[: match.start()].count("\n")
        begin = max((end for end in ends if end <= match.start()), default=0)
        sentence = text[begin : next(end for end in ends if end >= match.end())]
        yield Number(line, match[0].strip(" ,"), float(printed.replace(",", "")), decimals, unit, sentence)


def source_of(name: str, root: Path) -> Source:
    """A committed result. Raises ``AssertionError`` if it is partial, or not of a commit."""
    result = json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert not result.get("partial"), f"{name}.json is partial"
    assert not result["machine"]["commit"].endswith("-dirty"), f"{name}.json is of no commit"
    names = {result["machine"]["command"].split()[0], f"{name}.py"}
    scripts = [root / "benchmarks" / each for each in sorted(names)]
    text = "\n".join(script.read_text(encoding="utf-8") for script in scripts if script.exists())
    return Source(list(_values(result, "")), re.sub(r"(?<=\d)[_,](?=\d)", "", text))


def _values(result: Any, name: str) -> Iterator[tuple[str, float]]:
    """(name, value) of all numbers; those within names and texts have the name "text"."""
    if isinstance(result, dict):
        for key, value in result.items():
            yield from _values(key, "")
            yield from _values(value, f"{name}/{key}")
    elif isinstance(result, list):
        for value in result:
            yield from _values(value, name)
    elif isinstance(result, str):
        yield from (("text", float(each.replace(",", ""))) for each in re.findall(r"\d[\d,]*(?:\.\d+)?", result))
    elif isinstance(result, int | float) and not isinstance(result, bool):
        yield name, abs(float(result))


def is_in(source: Source, number: Number, units: set[str]) -> bool:
    """Whether a value of the result is the number after rounding, or the script or a text of the result has it as a setting."""
    half = 0.5 * 10.0**-number.decimals * (1 + 1e-9) + 1e-12
    plain = number.unit not in UNITS
    for name, value in source.values:
        scales = [1.0] if plain or name == "text" else []
        for unit in units if plain else {number.unit}:
            hint, factors = UNITS[unit]
            if re.search(hint, name):
                scales += factors
        if any(abs(value * scale - number.value) <= half for scale in scales):
            return True
    printed = re.escape(number.text.replace(",", ""))
    return re.search(rf"(?<![\w.]){printed}(?!\.?\d)", source.script) is not None


def unproven(page: str, root: Path, *, examples: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    """(line, number) of all figures of a page that break the rule; ``examples``: beginnings of sentences that may."""
    wrong, above = [], ""
    for block in blocks_of(page):
        context = text_of(f"{above}\n{block.text}" if block.text.startswith("|") else block.text)
        units = {unit for unit in UNITS if re.search(rf"(?<![A-Za-z]){unit}(?![\w/])", context)}
        above, sources = block.text, [source_of(name, root) for name in block.results]
        for number in numbers_in(block):
            if sources:
                proven = any(is_in(source, number, units) for source in sources)
            else:
                proven = not number.unit or OF_OTHERS.search(number.sentence) is not None
                proven = proven or number.sentence.strip().startswith(examples)
            if not proven:
                wrong.append((number.line, number.text))
    return wrong
