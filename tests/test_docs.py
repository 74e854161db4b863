"""The documentation is true: every setting has its default there, every YAML block loads, every Python block runs.

A block whose first line is ``# name.py`` or ``# name.yaml`` is also a file of that name beside the other blocks of its page,
and YAML that begins with ``# fleet`` is a fleet. The blocks of a page run in order, in one namespace, in a folder that holds
the examples. Blocks that cannot run (a fragment, a file of another program) are marked as another language.
"""

import re
import shutil
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fedbonsai.clusters.availability import Availability, Dropout, Jitter
from fedbonsai.clusters.fleet import DeviceClass, Fleet, HostProfile, ServerProfile, SharedLink, load_fleet
from fedbonsai.clusters.yaml_text import parse_yaml
from fedbonsai.learning.data.config import Partition
from fedbonsai.learning.spec import Call
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.presets import PRESETS
from fedbonsai.policies.resolve_policy import BUILT_IN, make_policy
from fedbonsai.policies.view import View
from fedbonsai.runtime.configuration.config import Config, load_config
from fedbonsai.runtime.events import AnyEvent
from fedbonsai.runtime.reporting.summary import Summary

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.is_file()]
BLOCK = re.compile(r"^```(yaml|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE_NAME = re.compile(r"# (?:fleet: )?(\S+\.(?:py|yaml))\n")
ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \|.*?\| ([^|]*?) \|[^|]*\|$", re.MULTILINE)  # names, ..., default, meaning


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the page's blocks."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with the examples; its modules are removed afterwards."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "examples"), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_every_block_loads_or_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, text in blocks(page):
        if name := FILE_NAME.match(text):
            (folder / name[1]).write_text(text, encoding="utf-8")
    namespace = types.ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, namespace.__name__, namespace)  # where dataclasses look up annotations
    for number, (language, text) in enumerate(blocks(page)):
        if language == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec"), namespace.__dict__)
        elif text.startswith("# fleet"):
            assert load_fleet(parse_yaml(text)).num_devices > 0
        else:
            path = folder / f"block_{number}.yaml"
            path.write_text(text, encoding="utf-8")
            config = load_config(path)
            assert config.load_fleet().num_devices > 0
            make_policy(config.policy)


def structs_in(kind: Any) -> list[type[msgspec.Struct]]:
    """Struct types that a field of this type may hold."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [struct for inner in typing.get_args(kind) for struct in structs_in(inner)]


def settings(kind: type[msgspec.Struct], section: str) -> Iterator[tuple[str, str, Any]]:
    """(section, field, default) of all settings below; parts that occur often are documented once."""
    for field in msgspec.structs.fields(kind):
        default = (
            field.default_factory() if field.default is msgspec.NODEFAULT and not field.required else field.default
        )
        yield section, field.name, default
        for struct in structs_in(field.type):
            elsewhere = field.name == "public" or (struct is Call and field.name != "model")
            if not elsewhere:
                yield from settings(struct, field.name if section == "Top level" else section)


def sections(page: str) -> dict[str, str]:
    """The text under each heading of the second level."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}


def rows(text: str) -> dict[str, str]:
    """The default in the table row of each name."""
    return {name: default for names, default in ROW.findall(text) for name in re.findall(r"`(\w+)`", names)}


def as_written(default: Any) -> Any:
    """A default as a user writes it: a named part by its name alone."""
    plain = msgspec.to_builtins(default)
    if isinstance(plain, list | tuple):
        return [as_written(entry) for entry in plain]
    return plain["name"] if isinstance(plain, dict) and "name" in plain else plain


def test_every_setting_is_documented_with_its_default() -> None:
    page = sections("configuration.md")
    compared = 0
    for section, field, default in settings(Config, "Top level"):
        assert f"`{field}`" in page[section], f"docs/configuration.md, {section}: {field} is missing"
        cell = re.fullmatch(r"`(.*)`|(null)", rows(page[section]).get(field, ""))
        if cell is not None:  # else it is a section, or described in words
            compared += 1
            expected = as_written(default)
            assert parse_yaml(cell[1] or cell[2]) == expected, f"docs/configuration.md, {section}.{field}: {expected!r}"
    assert compared > 60


def test_every_documented_setting_exists() -> None:
    known: dict[str, set[str]] = {}
    for section, field, _ in settings(Config, "Top level"):
        known.setdefault(section, set()).add(field)
    for section, text in sections("configuration.md").items():
        for table in text.split("| setting |")[1:]:
            names = set(rows(table.partition("\n\n")[0]))
            assert names <= known[section], f"docs/configuration.md, {section}: {names - known[section]}"


def test_partitions_events_and_summary_keys_are_documented() -> None:
    page = sections("configuration.md")
    assert all(f"| `{kind.__struct_config__.tag}` |" in page["data"] for kind in typing.get_args(Partition))
    folder = page["Run folder"]
    for event in typing.get_args(AnyEvent):
        (row,) = re.findall(rf"^\| `{event.__name__}` \|(.*)$", folder, re.MULTILINE)
        assert all(f"`{field}`" in row for field in event.__struct_fields__ if field != "time_s"), event
    assert all(f"`{key}`" in folder for key in Summary().to_dict())


@pytest.mark.parametrize(
    "kind", [DeviceClass, SharedLink, HostProfile, ServerProfile, Fleet, Availability, Dropout, Jitter]
)
def test_every_field_of_a_fleet_is_documented(kind: type[msgspec.Struct]) -> None:
    text = sections("fleets.md")["Fields"]
    missing = [field for field in kind.__struct_fields__ if f"`{field}`" not in text]
    assert not missing


def test_views_decisions_and_the_built_in_policies_are_documented() -> None:
    text = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    names = {field for field in View.__dataclass_fields__ if field not in ("plan_maker", "estimator")}
    names |= set(Decision.__struct_fields__) | set(BUILT_IN) | set(PRESETS)
    names |= {field for policy in BUILT_IN.values() for field in getattr(policy, "__dataclass_fields__", {})}
    assert not {name for name in names if f"`{name}`" not in text}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_is_named_exists(page: Path) -> None:
    folders = "runtime|actors|policies|clusters|comms|learning|tests|benchmarks|examples|docs"
    named = re.findall(rf"`((?:{folders})/[\w/.]+)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]
