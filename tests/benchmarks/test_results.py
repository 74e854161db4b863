"""How benchmark scripts save results: a small script in a repository of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMON = Path(__file__).resolve().parents[2] / "benchmarks" / "common.py"
SCRIPT = """
import argparse
import os

from common import Results, add_options, over_seeds


def accuracy(seed):
    if os.environ.get("BREAKS_AT") == str(seed):
        raise RuntimeError("broken")
    return {"accuracy": 0.5 + seed / 10, "pair": (seed, seed)}


parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true")
parser.add_argument("--offset", type=float, default=0.0)
parser.add_argument("--portable", type=int)
parser.add_argument("--note", default="")
parser.add_argument("--seeds", type=int, default=3)
add_options(parser)
options = parser.parse_args()
settings = None if options.portable is None else {"rounds": options.portable}
results = Results("small", options, seeds=range(options.seeds), settings=settings)
by_seed = {str(seed): results.row(f"seed {seed}", accuracy, seed) for seed in range(options.seeds)}
results.finish({"rows": {"method": over_seeds(by_seed)}})
"""


class Checkout:
    """A repository with common.py and the script."""

    def __init__(self, folder: Path) -> None:
        self.root, self.results = folder, folder / "benchmarks" / "results"
        (folder / "benchmarks").mkdir(parents=True)
        shutil.copy(COMMON, folder / "benchmarks" / "common.py")
        (folder / "benchmarks" / "small.py").write_text(SCRIPT, encoding="utf-8")
        (folder / ".gitignore").write_text("__pycache__/\n", encoding="utf-8")
        self.git("init", "-q")
        self.commit()

    def git(self, *words: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", "-C", str(self.root), *identity, *words], check=True, capture_output=True)

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "a state")

    def run(self, *words: str, breaks_at: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.root / "benchmarks" / "small.py"), *words]
        environment = os.environ | {"BREAKS_AT": breaks_at}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    def saved(self, name: str) -> Any:
        return json.loads((self.results / name).read_text(encoding="utf-8"))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


def test_a_result_says_how_it_was_made(checkout: Checkout) -> None:
    done = checkout.run("--offset", "0.5", "--save")
    assert done.returncode == 0, done.stderr
    saved = checkout.saved("small.json")
    assert json.loads(done.stdout.splitlines()[-1]) == saved
    assert "partial" not in saved
    assert not (checkout.results / "small.partial.json").exists()
    machine = saved["machine"]
    assert machine["command"] == "small.py --offset 0.5 --save"
    assert machine["seeds"] == [0, 1, 2]
    assert machine["vectors"]
    assert {"cpu", "cores", "python", "torch", "numpy", "ray", "fedbonsai", "date"} <= set(machine)
    head = subprocess.run(
        ["git", "-C", str(checkout.root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert head.startswith(machine["commit"])
    assert len(machine["commit"]) == 12
    row = saved["rows"]["method"]
    assert (row["accuracy"], row["accuracy_spread"]) == (0.6, 0.2)
    assert [figures["accuracy"] for figures in row["by_seed"].values()] == [0.5, 0.6, 0.7]
    assert row["by_seed"]["1"]["pair"] == [1, 1]
    assert "pair" not in row


def test_the_command_can_be_repeated_as_it_is_written(checkout: Checkout) -> None:
    assert checkout.run("--note", "90 %, all", "--save").returncode == 0
    assert checkout.saved("small.json")["machine"]["command"] == "small.py --note '90 %, all' --save"


def test_without_save_nothing_is_written(checkout: Checkout) -> None:
    assert checkout.run().returncode == 0
    assert not checkout.results.exists()


def test_a_quick_result_does_not_replace_the_whole_one(checkout: Checkout) -> None:
    assert checkout.run("--quick", "--save").returncode == 0
    assert [path.name for path in checkout.results.iterdir()] == ["small_quick.json"]


@pytest.mark.parametrize("file", ["benchmarks/small.py", "new.py"])
def test_changes_and_new_files_are_refused(checkout: Checkout, file: str) -> None:
    (checkout.root / file).write_text(SCRIPT + "\n", encoding="utf-8")
    refused = checkout.run("--save")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert f"--save needs a commit that holds the code: {file} differs" in refused.stderr
    assert not checkout.results.exists()
    assert checkout.run().returncode == 0  # unsaved it may be measured


def test_results_that_are_written_are_no_change(checkout: Checkout) -> None:
    for _ in range(2):
        assert checkout.run("--save").returncode == 0
    assert "commit_at_end" not in checkout.saved("small.json")["machine"]


def test_outside_of_a_repository_nothing_is_saved(checkout: Checkout) -> None:
    shutil.rmtree(checkout.root / ".git")
    refused = checkout.run("--save")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "no git repository" in refused.stderr


def test_an_interrupted_result_is_marked_and_continued(checkout: Checkout) -> None:
    assert checkout.run("--save").returncode == 0
    whole = checkout.saved("small.json")
    broken = checkout.run("--save", breaks_at="2")
    assert broken.returncode == 1
    partial = checkout.saved("small.partial.json")
    assert partial["partial"] is True
    assert list(partial["rows"]) == ["seed 0", "seed 1"]
    assert checkout.saved("small.json") == whole  # the last whole result stays
    done = checkout.run("--save", "--continue", breaks_at="0")  # seed 0 is not measured again
    assert done.returncode == 0, done.stderr
    assert checkout.saved("small.json") == whole
    assert not (checkout.results / "small.partial.json").exists()


@pytest.mark.parametrize(
    ("words", "commits", "reason"),
    [
        (["--save", "--continue", "--offset", "1"], False, "has command 'small.py --save', not 'small.py"),
        (["--save", "--continue"], True, "has commit"),
        (["--continue"], False, "--continue needs --save"),
    ],
)
def test_another_result_is_not_continued(checkout: Checkout, words: list[str], commits: bool, reason: str) -> None:
    checkout.run("--save", breaks_at="2")
    before = checkout.saved("small.partial.json")
    if commits:
        (checkout.root / "benchmarks" / "small.py").write_text(SCRIPT + "\n", encoding="utf-8")
        checkout.git("add", "benchmarks/small.py")
        checkout.git("commit", "-q", "-m", "another state")
    refused = checkout.run(*words)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert reason in refused.stderr
    assert checkout.saved("small.partial.json") == before


def test_rows_that_depend_on_no_machine_are_added_to_a_complete_result(checkout: Checkout) -> None:
    assert checkout.run("--portable", "5", "--seeds", "2", "--save").returncode == 0
    first = checkout.saved("small.json")
    checkout.commit()  # the next rows are of another commit
    done = checkout.run("--portable", "5", "--seeds", "3", "--save", "--continue", breaks_at="0")
    assert done.returncode == 0, done.stderr
    both = checkout.saved("small.json")
    measured, before = both["measured"], first["measured"]
    assert measured["settings"] == {"rounds": 5}
    assert list(measured["rows"]) == ["seed 0", "seed 1", "seed 2"]
    assert list(both["rows"]["method"]["by_seed"]) == ["0", "1", "2"]
    assert measured["machine_of_row"] == {"seed 0": 0, "seed 1": 0, "seed 2": 1}
    assert measured["machines"] == [before["machines"][0], both["machine"]]
    assert before["machines"][0]["commit"] != both["machine"]["commit"]


def test_rows_of_an_interrupted_result_are_kept_with_their_machine(checkout: Checkout) -> None:
    assert checkout.run("--portable", "5", "--save", breaks_at="1").returncode == 1
    partial = checkout.saved("small.partial.json")
    assert (partial["partial"], list(partial["rows"])) == (True, ["seed 0"])
    checkout.commit()
    done = checkout.run("--portable", "5", "--save", "--continue", breaks_at="0")
    assert done.returncode == 0, done.stderr
    assert checkout.saved("small.json")["measured"]["machine_of_row"] == {"seed 0": 0, "seed 1": 1, "seed 2": 1}
    assert not (checkout.results / "small.partial.json").exists()


def test_rows_of_other_settings_are_not_added(checkout: Checkout) -> None:
    assert checkout.run("--portable", "5", "--save").returncode == 0
    before = checkout.saved("small.json")
    refused = checkout.run("--portable", "6", "--save", "--continue")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "has settings {'rounds': 5}, not {'rounds': 6}" in refused.stderr
    assert checkout.saved("small.json") == before


def test_a_result_without_settings_takes_no_further_rows(checkout: Checkout) -> None:
    assert checkout.run("--save").returncode == 0
    refused = checkout.run("--portable", "5", "--save", "--continue")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "small.json has settings None" in refused.stderr


def test_there_must_be_something_to_continue(checkout: Checkout) -> None:
    refused = checkout.run("--save", "--continue")
    assert refused.returncode == 2
    assert "nothing was interrupted" in refused.stderr


SCRIPTS = [path for path in sorted(COMMON.parent.glob("*.py")) if '"__main__"' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    "script",
    [path for path in SCRIPTS if path.stem not in {"picture", "tables"}],  # they show results, and measure nothing
    ids=lambda path: path.stem,
)
def test_every_script_saves_in_this_way(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert "Results(" in text
    assert "add_options(parser)" in text
    assert "results.finish(" in text
    assert '"--save"' not in text
    assert "RESULTS" not in text
