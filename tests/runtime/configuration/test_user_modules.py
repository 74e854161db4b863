"""Modules beside a YAML: only those that it names are found when it is run, and no other file of any folder."""

import importlib.util
import os
import sys

import fedbonsai
import pytest
import yaml
from fedbonsai.clusters.user_modules import ModulesBeside
from fedbonsai.runtime.cli import main as cli
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.storage.marker import NAME, encode, new_marker

POLICY = """
from dataclasses import dataclass
from {helper} import choose

@dataclass(frozen=True)
class Mine:
    def init(self):
        return None

    def decide(self, view, state, decision):
        return choose(view, decision), state
"""
HELPER = """
from fedbonsai.policies.decision import Decision

def choose(view, decision):
    return decision if view.dispatched else Decision(plans=(view.new_plan(0),))
"""


@pytest.fixture(name="import_system", autouse=True)
def import_system_fixture(monkeypatch):
    """Restore the import system after the test."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.endswith("_beside_xyz"):
            del sys.modules[name]


def folder_with(folder, digits, prefix):
    """A YAML, the policy that it names, what that imports, and a module that nothing names."""
    folder.mkdir()
    policy, helper, stranger = (f"{prefix}_{name}_beside_xyz" for name in ("policy", "helper", "stranger"))
    (folder / f"{policy}.py").write_text(POLICY.format(helper=helper))
    (folder / f"{helper}.py").write_text(HELPER)
    (folder / f"{stranger}.py").write_text("raise AssertionError('it is not named')\n")
    path = folder / "e.yaml"
    path.write_text(yaml.safe_dump(digits(policy=[{"name": f"{policy}:Mine"}], stop={"rounds": 1})))
    return path, policy, stranger


def test_named_modules_are_found_with_their_imports_and_nothing_else(digits, tmp_path):
    path, policy, stranger = folder_with(tmp_path / "mine", digits, "a")
    before = list(sys.path)
    load_config(path)
    assert importlib.util.find_spec(policy) is None
    run = fedbonsai.run(path)
    list(run)
    assert run.summary["outcomes"]["done"] == 1
    assert sys.path == before
    assert importlib.util.find_spec(stranger) is None
    again = fedbonsai.run(path)
    again.close()
    finders = [
        each for each in sys.meta_path if isinstance(each, ModulesBeside) and each.folder == path.parent.resolve()
    ]
    assert len(finders) == 1


def test_resuming_opens_no_run_folder_for_imports(digits, tmp_path, monkeypatch):
    """A file in another run's folder is not run, even if it is named as a package that some library tries to import."""
    monkeypatch.chdir(tmp_path)
    path, policy, _ = folder_with(tmp_path / "mine", digits, "b")
    config = load_config(path)
    for name in ("stranger", "same"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / NAME).write_bytes(encode(new_marker("run")))
        (folder / "config.yaml").write_text(
            yaml.safe_dump(config.to_dict() | {"seed": 99 if name == "stranger" else 3})
        )
        (folder / "triton_beside_xyz.py").write_text("raise AssertionError('it was run')\n")
        (folder / f"{policy}.py").write_text("raise AssertionError('it was run in place of the user\\'s')\n")
    before = list(sys.path)
    with fedbonsai.run(path, resume="auto") as run:
        next(run)
    assert sys.path == before
    assert importlib.util.find_spec("triton_beside_xyz") is None


def damage_config(folder):
    (folder / "config.yaml").write_text("[" * 3000)


def damage_fleet(folder):
    (folder / "config.yaml").write_text("fleet: {classes: [{name: 3}]}")


def endless_config(folder):
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to("/dev/zero")


def list_for_a_summary(folder):
    (folder / "summary.json").write_text("[]")


def nested_summary(folder):
    (folder / "summary.json").write_text("[" * 100_000)


def endless_summary(folder):
    (folder / "summary.json").unlink()
    (folder / "summary.json").symlink_to("/dev/zero")


def pipe_for_a_summary(folder):
    (folder / "summary.json").unlink()
    os.mkfifo(folder / "summary.json")


def other_words_for_a_summary(folder):
    (folder / "summary.json").write_bytes(b'{"status": "\xff"}')


@pytest.mark.skipif(not os.path.exists("/dev/zero") or not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize(
    "harm",
    [damage_config, damage_fleet, endless_config, list_for_a_summary, nested_summary, endless_summary, pipe_for_a_summary,
     other_words_for_a_summary],
)  # fmt: skip
def test_other_runs_that_cannot_be_read_are_skipped(harm, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fedbonsai.run(digits(seed=8), out=tmp_path / "runs" / "other") as other:
        next(other)
    harm(other.folder.path)
    with fedbonsai.run(digits(), resume="auto") as run:
        next(run)
        assert run.folder.path.name.startswith("test-")
    with pytest.raises(ConfigError) as caught:  # named explicitly, it is refused in one sentence
        fedbonsai.run(digits(), resume=other.folder.path)
    assert str(caught.value).startswith("resume is ") or "classes" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_no_run_has_written_cannot_be_resumed(digits, tmp_path):
    """The user's own experiment in a file called config.yaml, and no marker: nothing there is touched."""
    config = digits()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "summary.json").write_text("the user's")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"which is not the folder of a run$"):
        fedbonsai.run(config, resume=tmp_path)
    with pytest.raises(ConfigError, match=r"which is not empty; name a new folder$"):
        fedbonsai.run(config, out=tmp_path, resume="auto")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_line_finds_them_too(digits, tmp_path, monkeypatch, capsys):
    path, _, _ = folder_with(tmp_path / "mine", digits, "c")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["fedbonsai", "run", str(path), "--json", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0, capsys.readouterr().err
