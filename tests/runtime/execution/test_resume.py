"""Runs that are killed and go on: the same bits as one that was not, whatever was in flight; and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fedbonsai
import pytest
from fedbonsai.runtime.errors import ConfigError, RunError, ServerDied
from fedbonsai.runtime.events import Notice, PlanEnded, VersionClosed
from fsspec.implementations.memory import MemoryFileSystem

from ..resuming import BASE, METHODS, facts, started, told, uninterrupted

ROOT = Path(fedbonsai.__file__).parent.parent
KILLED = """
import json, os, signal, sys
import fedbonsai
config, out, versions = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
with fedbonsai.run(config, resume="auto", out=out) as run:
    for event in run:
        if type(event).__name__ == "PlanEnded" and event.report.plan.version >= versions:
            os.kill(os.getpid(), signal.SIGKILL)
print(json.dumps(run.summary))
"""


def attempt(config, out, *, dies_in):
    command = [sys.executable, "-c", KILLED, json.dumps(config), str(out), json.dumps(dies_in)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent)


# In ``make soak`` alone: methods whose state other rows, or rows of test_composition.py, resume too.
AT_LENGTH = {"reft", "residuals, narrow", "deadline, late plans", "ecofed, in flight", "momentum"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if name in AT_LENGTH else name for name in METHODS]
)
def test_stopped_three_times_it_comes_to_the_same_bits(name, tmp_path):
    config = BASE | METHODS[name]
    expected = uninterrupted(config, tmp_path / "whole")
    ended = 0
    for stops in (1, 3, 6):
        with fedbonsai.run(config, out=tmp_path / "parts", resume="auto") as run:
            for event in run:
                ended += type(event).__name__ == "PlanEnded"
                if type(event).__name__ == "PlanEnded" and event.report.plan.version >= stops:
                    break
    run = fedbonsai.run(config, out=tmp_path / "parts", resume="auto")
    list(run)
    assert told(run.summary) == told(expected)
    assert facts(tmp_path / "parts") == facts(tmp_path / "whole")
    assert run.summary["num_notices"] - expected["num_notices"] == 3


def test_the_fourth_death_of_a_server_from_one_checkpoint_ends_the_run(tmp_path):
    with fedbonsai.run(BASE, out=tmp_path / "run") as run:
        next(event for event in run if isinstance(event, VersionClosed) and event.version == 3)
        died = ServerDied("the server actor died: it was killed")
        for _ in range(3):
            run._recovery.go_back(died)
        sentence = (
            r"^stage server: the server actor died: it was killed; it is the death number 4 from the checkpoint of version 2, "
            r"and no further server is started; go on with --resume '.*/run'$"
        )
        with pytest.raises(RunError, match=sentence):
            run._recovery.go_back(died)


@pytest.mark.parametrize("name", ["fedbuff"])
def test_killed_three_times_it_comes_to_the_same_bits(name, tmp_path):
    config = BASE | METHODS[name]
    expected = uninterrupted(config, tmp_path / "whole")
    for dies_in in (2, 4, 6):
        assert attempt(config, tmp_path / "parts", dies_in=dies_in).returncode == -signal.SIGKILL
        assert not (tmp_path / "parts" / "summary.json").exists()
    last = attempt(config, tmp_path / "parts", dies_in=99)
    assert last.returncode == 0, last.stderr
    assert told(json.loads(last.stdout)) == told(expected)
    assert facts(tmp_path / "parts") == facts(tmp_path / "whole")


@pytest.mark.parametrize("preset", ["fedavg", "fedbuff"])
def test_under_the_wall_clock_plans_and_time_go_on(preset, tmp_path):
    config = BASE | {"preset": preset, "clock": "wall"}
    started(config, tmp_path / "run", stops=2)
    run = fedbonsai.run(config, resume=tmp_path / "run")
    events = list(run)
    assert run.summary["rounds"] == 8
    assert events[0].time_s > 0
    log = facts(tmp_path / "run")
    ended = [event["report"]["plan"]["id"] for event in log if event["type"] == "PlanEnded"]
    assert sorted(ended) == list(range(1, len(ended) + 1))
    times = [event["time_s"] for event in log]
    assert times == sorted(times)


def went_on(config, **how):
    run = fedbonsai.run(config, **how)
    notices = [event.text for event in run if isinstance(event, Notice)]
    return run.summary, notices


def manifests(folder):
    return sorted((folder / "checkpoints").glob("*.checkpoint"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 6}, "seed is 6, and was 5"),
        ({"model": {"name": "mlp"}}, 'model.name is "mlp", and was "digits_cnn"'),
        ({"preset": "resfed"}, 'preset is "resfed", and was "fedavg"; policy is '),
        ({"fleet": "laptop"}, 'fleet.name is "laptop", and was "fleet"; '),
        ({"training": {"batch_size": 4}}, "training.batch_size is 4, and was 8"),
        ({"threads": 2}, "threads is 2, and was 1"),
    ],
)
def test_another_run_is_refused_and_what_differs_is_told(changes, sentence, tmp_path):
    started(BASE, tmp_path / "run")
    log = (tmp_path / "run" / "events.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=f"run', which is another run: {re.escape(sentence)}"):
        fedbonsai.run(BASE | changes, resume=tmp_path / "run")
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == log


def test_other_data_under_the_same_settings_are_refused(tmp_path, monkeypatch):
    started(BASE, tmp_path / "run")
    monkeypatch.setattr("fedbonsai.learning.data.devices.DeviceData.digest", lambda self: {"data": "0", "split": "0"})
    with pytest.raises(ConfigError, match=r"^data: the data has hash 0; the run that is resumed had [0-9a-f]"):
        list(fedbonsai.run(BASE, resume=tmp_path / "run"))


def test_stop_rules_and_where_it_runs_may_differ_and_a_run_that_ended_goes_on(tmp_path):
    expected = uninterrupted(BASE | {"stop": {"rounds": 5}}, tmp_path / "whole")
    uninterrupted(BASE | {"stop": {"rounds": 3}}, tmp_path / "run")
    changes = {"stop": {"rounds": 5}, "name": "longer", "workers": 2, "checkpoint": {"every": 2}}
    summary, _ = went_on(BASE | changes, resume=tmp_path / "run")
    assert told(summary) == told(expected)


@pytest.mark.parametrize("name", ["cosine", "exponential"])
@pytest.mark.parametrize("resume", ["auto", "named"])
def test_a_run_that_is_extended_keeps_the_horizon_of_its_learning_rate(name, resume, tmp_path, monkeypatch):
    """The rate does not jump up again: it stays where the schedule ended, and a notice says so."""
    monkeypatch.chdir(tmp_path)
    short = BASE | {"schedule": {"name": name, "final": 0.25}, "stop": {"rounds": 3}}
    if resume == "auto":
        with fedbonsai.run(short, resume="auto") as run:
            while not isinstance(next(run), VersionClosed):
                pass
            next(run)
        folder = run.folder.path
    else:
        folder = tmp_path / "run"
        uninterrupted(short, folder)
    longer = short | {"stop": {"rounds": 5}}
    run = fedbonsai.run(longer, resume="auto" if resume == "auto" else folder)
    events = list(run)
    assert run.folder.path == folder
    told_of = [event.text for event in events if isinstance(event, Notice)]
    assert told_of[-1] == (
        "stop.rounds is 5, and the schedule of the learning rate ends with round 3, as when the run began: from there on the "
        "rate is 0.25 of the first"
    )
    plans = [event["report"]["plan"] for event in facts(folder) if event["type"] == "PlanEnded"]
    rates = {plan["version"]: plan["training"]["optimiser"]["learning_rate"] for plan in plans}
    assert sorted(rates.values(), reverse=True) == [rates[version] for version in range(5)]
    assert rates[2] == rates[3] == rates[4] == rates[0] / 4
    explicit = uninterrupted(longer | {"schedule": {"name": name, "final": 0.25, "rounds": 3}}, tmp_path / "explicit")
    assert told(run.summary) == told(explicit)


def test_another_horizon_is_another_run(tmp_path):
    cosine = BASE | {"schedule": {"name": "cosine"}, "stop": {"rounds": 3}}
    started(cosine, tmp_path / "run", stops=1)
    with pytest.raises(ConfigError, match=r"which is another run: schedule\.rounds is 5, and was 3$"):
        fedbonsai.run(cosine, settings=["schedule.rounds=5"], resume=tmp_path / "run")


@pytest.mark.parametrize("harm", ["truncated", "flipped", "gone", "torn manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(harm, tmp_path):
    expected = uninterrupted(BASE, tmp_path / "whole")
    started(BASE, tmp_path / "run", stops=3)
    before, newest = [json.loads(path.read_bytes().partition(b"\n")[2]) for path in manifests(tmp_path / "run")][-2:]
    victim = tmp_path / "run" / "checkpoints" / next(name for name in newest["files"] if name not in before["files"])
    data = victim.read_bytes()
    if harm == "truncated":
        victim.write_bytes(data[:-1])
    elif harm == "flipped":
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "gone":
        victim.unlink()
    else:
        manifest = manifests(tmp_path / "run")[-1]
        manifest.write_bytes(manifest.read_bytes()[: 50 if harm == "torn manifest" else 0])
    summary, notices = went_on(BASE, resume=tmp_path / "run")
    assert notices[0].startswith("checkpoint 00000003.checkpoint is damaged (")
    assert notices[0].endswith("); the one before it is used")
    assert notices[1] == "the run goes on after version 2, from its checkpoint"
    assert told(summary) == told(expected)


def test_where_all_are_damaged_one_sentence_says_so(tmp_path):
    started(BASE, tmp_path / "run")
    for manifest in manifests(tmp_path / "run"):
        manifest.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^of 2 checkpoints none can be used; the newest: checkpoint 00000002"):
        fedbonsai.run(BASE, resume=tmp_path / "run")


@pytest.mark.parametrize(("number", "age"), [(7, "older"), (9, "newer")])
def test_another_format_is_refused_in_one_sentence(number, age, tmp_path):
    started(BASE, tmp_path / "run")
    newest = manifests(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes().replace(b"checkpoint/8 ", b"checkpoint/%d " % number, 1))
    sentence = rf"00000002\.checkpoint has format {number}, which is {age} than the 8 that this fedbonsai reads$"
    with pytest.raises(ConfigError, match=sentence):
        fedbonsai.run(BASE, resume=tmp_path / "run")


def test_a_place_of_a_newer_format_is_refused_in_one_sentence(tmp_path):
    started(BASE, tmp_path / "run")
    marker = tmp_path / "run" / "checkpoints" / "fedbonsai.json"
    marker.write_bytes(marker.read_bytes().replace(b'"format":2', b'"format":3'))
    with pytest.raises(ConfigError, match=r"checkpoints', which has format 3, which is newer than the 2 that this"):
        fedbonsai.run(BASE, resume=tmp_path / "run")


def test_a_log_that_lost_its_end_falls_back_to_a_checkpoint_that_it_reaches(tmp_path):
    expected = uninterrupted(BASE, tmp_path / "whole")
    started(BASE, tmp_path / "run", stops=3)
    log = tmp_path / "run" / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    closed = [number for number, line in enumerate(lines) if b'"VersionClosed"' in line]
    log.write_bytes(b"".join(lines[: closed[2]]) + lines[closed[2]][:20])
    summary, notices = went_on(BASE, resume=tmp_path / "run")
    assert "the one before it is used" in notices[0]
    assert told(summary) == told(expected)
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def test_behind_a_url(tmp_path):
    place = f"memory://{tmp_path.name}/checkpoints"
    config = BASE | METHODS["fedbuff"] | {"checkpoint": {"to": place, "keep": 2, "share": None}}
    expected = uninterrupted(BASE | METHODS["fedbuff"], tmp_path / "whole")
    started(config, tmp_path / "run", stops=4)
    names = [path.rpartition("/")[2] for path in MemoryFileSystem().ls(place, detail=False)]
    assert [name for name in sorted(names) if name.endswith(".checkpoint")] == [
        "00000003.checkpoint",
        "00000004.checkpoint",
    ]
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(ConfigError, match=r"which holds checkpoints already; resume their run, or name a new place$"):
        fedbonsai.run(config, out=tmp_path / "other")
    summary, _ = went_on(config, resume=tmp_path / "run")
    assert told(summary) == told(expected)


def test_an_unknown_protocol_is_refused_at_once(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^checkpoint\.to is 'none://a', which cannot be used: Protocol not known: none"
    ):
        fedbonsai.run(BASE | {"checkpoint": {"to": "none://a"}}, out=tmp_path / "run")


def test_one_command_starts_goes_on_and_has_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = BASE | {"name": "mine", "stop": {"rounds": 3}}
    first = started(config, None, resume="auto")
    other = started(config | {"seed": 1}, None, resume="auto")
    assert other.folder.path != first.folder.path
    run = fedbonsai.run(config, resume="auto")
    assert run.folder.path == first.folder.path
    assert [type(event).__name__ for event in run][-1] == "RunEnded"
    again = fedbonsai.run(config, resume="auto")
    assert again.folder.path not in (first.folder.path, other.folder.path)
    again.close()
    named = fedbonsai.run(config, resume="auto", out=first.folder.path)
    assert [type(event).__name__ for event in named] == ["Notice", "Evaluated", "RunEnded"]
    assert told(named.summary) == told(run.summary)


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    expected = uninterrupted(BASE, tmp_path / "whole")
    started(BASE, tmp_path / "run", stops=0)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["fedbonsai.json"]
    summary, notices = went_on(BASE, resume=tmp_path / "run")
    assert (told(summary), notices) == (told(expected), [])
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def test_the_last_version_is_there_though_its_turn_had_not_come(tmp_path):
    uninterrupted(BASE | {"checkpoint": {"every": 5}}, tmp_path / "run")
    assert [path.name for path in manifests(tmp_path / "run")] == ["00000005.checkpoint", "00000008.checkpoint"]


def test_two_processes_do_not_write_one_folder(tmp_path):
    run = fedbonsai.run(BASE, out=tmp_path / "run")
    next(run)
    with pytest.raises(ConfigError, match=r"run', which another process is writing$"):
        fedbonsai.run(BASE, resume=tmp_path / "run")
    run.close()


def test_left_at_the_end_of_a_version_it_writes_what_was_not_due(tmp_path):
    config = BASE | {"checkpoint": {"every": 100}}
    expected = uninterrupted(BASE, tmp_path / "whole")
    with fedbonsai.run(config, out=tmp_path / "run") as run:
        for event in run:
            if isinstance(event, VersionClosed) and event.version == 3:
                break
    assert [path.name for path in manifests(tmp_path / "run")] == ["00000003.checkpoint"]
    summary, _ = went_on(config, resume=tmp_path / "run")
    assert told(summary) == told(expected)


def test_told_to_leave_it_goes_on_to_the_end_of_the_version(tmp_path):
    run = fedbonsai.run(BASE | {"checkpoint": {"every": 100}}, out=tmp_path / "run")
    while not (isinstance(event := next(run), PlanEnded) and event.report.plan.version == 2):
        pass
    assert run.leave()
    with pytest.raises(KeyboardInterrupt):
        list(run)
    assert [path.name for path in manifests(tmp_path / "run")] == ["00000003.checkpoint"]
    assert run.summary["status"] == "interrupted"
    with fedbonsai.run(BASE, out=tmp_path / "every") as run:
        assert not run.leave()  # each version is written anyway
