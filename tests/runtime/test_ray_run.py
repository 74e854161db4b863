"""Whole runs on a local Ray: the same bits as in process, killed actors, the user's own code, placement."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import fedbonsai
import pytest
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import Notice, PlanEnded, RunStarted, VersionClosed

from .processes import (
    LIMIT_S,
    actor_pids,
    alive,
    command,
    descendants,
    has_closed_a_version,
    heed_interrupts,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("cluster")

BASE = {
    "name": "on-ray",
    "seed": 3,
    "model": "digits_cnn",
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}, "test_share": 0.2},
    "fleet": "laptop",
    "training": {"batch_size": 16},
    "evaluation": {"where": "both", "every": 2},
    "stop": {"rounds": 2},
}


def outcome(**changes):
    """Summary of a run of ``BASE`` with changes."""
    run = fedbonsai.run(BASE | changes)
    for _ in run:
        pass
    return run.summary


def test_same_bits_in_process_and_with_one_or_two_workers():
    inline = outcome(backend="inline")
    one, two = outcome(backend="ray", workers=1), outcome(backend="ray", workers=2)
    assert (one["workers"], two["workers"]) == (1, 2)
    for summary in (one, two):
        assert summary["model_hash"] == inline["model_hash"]
        same = ("accuracy", "loss", "virtual_s", "up_bytes", "down_bytes", "outcomes", "evaluation", "participation")
        assert {k: summary[k] for k in same} == {k: inline[k] for k in same}


def test_links_with_memory_give_the_same_bits_in_process_and_on_ray_with_a_worker_killed():
    changes = {
        "preset": "resfed",
        "server": {"statistics": "batch"},
        "evaluation": {"where": "server"},
        "stop": {"rounds": 6},
    }
    changes["policy"] = [{"name": "random", "cohort": 5}, {"name": "residuals", "up": "drift"}]  # some miss rounds
    inline = outcome(backend="inline", **changes)
    run = fedbonsai.run(BASE | changes, backend="ray", workers=2)
    notices = []
    for event in run:
        if isinstance(event, VersionClosed) and event.version == 2:
            os.kill(actor_pids("WorkerActor")[0], signal.SIGKILL)
        if isinstance(event, Notice):
            notices.append(event.text)
    assert any("is replaced" in text for text in notices)
    same = ("model_hash", "accuracy", "virtual_s", "up_by_kind", "down_by_kind", "resyncs", "outcomes")
    assert {key: run.summary[key] for key in same} == {key: inline[key] for key in same}
    assert run.summary["resyncs"] == 0


def test_a_killed_worker_is_replaced_and_its_plans_are_placed_again():
    changes = {"training": {"batch_size": 8, "epochs": 3}, "stop": {"rounds": 3}}
    inline = outcome(backend="inline", **changes)
    run = fedbonsai.run(BASE | changes, backend="ray", workers=2)
    notices, ended, killed = [], [], False
    for event in run:
        if isinstance(event, VersionClosed) and not killed:
            os.kill(actor_pids("WorkerActor")[0], signal.SIGKILL)
            killed = True
        notices += [event.text] if isinstance(event, Notice) else []
        ended += [event.report] if isinstance(event, PlanEnded) else []
    assert any("died" in text and "is replaced" in text for text in notices), notices
    assert run.summary["outcomes"]["done"] == len(ended) == 24
    assert len({report.plan.id for report in ended}) == 24  # no plan ended twice
    assert run.summary["model_hash"] == inline["model_hash"]


def test_a_killed_server_ends_the_run_in_one_sentence(tmp_path):
    import ray

    run = fedbonsai.run(
        BASE | {"stop": {"rounds": 50}, "checkpoint": {"every": None}}, backend="ray", workers=1, out=tmp_path / "run"
    )
    assert any(isinstance(event, RunStarted) for event in run)  # iterated this far, and no further
    (host,) = actor_pids("ServerActor")
    os.kill(host, signal.SIGKILL)
    with pytest.raises(RunError, match="stage server: the server actor died"):
        list(run)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert ray.is_initialized()  # the user's own Ray is left running


def test_the_users_own_policy_and_model_reach_the_workers(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from torch import nn

            @dataclass(frozen=True)
            class OnlyEven:
                def init(self):
                    return 0
                def decide(self, view, state, decision):
                    if view.dispatched:
                        return decision, state
                    plans = [view.new_plan(d).with_("even") for d in view.devices if d % 2 == 0]
                    from msgspec.structs import replace
                    return replace(decision, plans=tuple(plans)), state + 1

            def net(width, num_classes=10):
                return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"model": {"name": "mine:net", "kwargs": {"width": 8}}, "policy": [{"name": "mine:OnlyEven"}]}
    run = fedbonsai.run(BASE | changes, backend="ray", workers=1)
    chosen = {event.report.plan.device for event in run if isinstance(event, PlanEnded)}
    assert chosen == {0, 2, 4, 6}
    assert run.summary["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert run.summary["model_hash"] == outcome(backend="inline", **changes)["model_hash"]


def test_a_policy_object_from_python_acts_on_ray():
    from fedbonsai.policies.selection.plain import RandomCohort

    run = fedbonsai.run(BASE, policy=RandomCohort(cohort=3), backend="ray", workers=1)
    assert sum(isinstance(event, PlanEnded) for event in run) == 6


def small_fleet(**placement):
    device = {"flop_per_s": 1e9, "memory_bytes": 10**9, "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}
    return {"classes": [device | {"name": "sim", "count": 2}, device | {"name": "real", "count": 1} | placement]}


def test_a_real_device_has_a_worker_of_its_own():
    """Also where nothing of its node's processors is left."""
    changes = {"fleet": small_fleet(resource="board")}
    run = fedbonsai.run(BASE | changes, backend="ray", workers=1)
    events = list(run)
    assert next(e.workers for e in events if isinstance(e, RunStarted)) == 2
    assert run.summary["participation"]["real"]["delivered"] == 1
    assert run.summary["model_hash"] == outcome(backend="inline", fleet=small_fleet())["model_hash"]


def test_a_bundle_that_cannot_be_placed_is_named():
    with pytest.raises(
        ConfigError, match=r"^bundle 2 of 3 \(worker: 99 CPU\) cannot be placed: the largest node has 2 CPU"
    ):
        list(fedbonsai.run(BASE | {"ray": {"cpus": 99, "placement_timeout_s": 0}}, backend="ray", workers=1))


def test_a_real_device_that_has_not_joined_is_named():
    changes = {"fleet": small_fleet(resource="no_such"), "ray": {"placement_timeout_s": 0}}
    why = (
        r"device 2 \(class real\) is missing: a node with a free unit of the resource no_such has not joined within 0 s"
    )
    with pytest.raises(ConfigError, match=rf"^0 of 1 real devices are there, and all are needed .*; {why}$"):
        list(fedbonsai.run(BASE | changes, backend="ray", workers=1))


def line(folder, *arguments):
    """The command line, in a process of its own."""
    config = folder / "config.yaml"
    config.write_text(json.dumps(BASE))
    return [sys.executable, "-m", "fedbonsai", "run", str(config), *arguments]


def alone():
    """An environment without this module's Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def test_the_command_line_on_a_ray_of_its_own_is_quiet(tmp_path):
    done = subprocess.run(
        line(tmp_path, "--json", "--out", str(tmp_path / "run"), "--workers", "1"),
        capture_output=True, text=True, env=alone(), timeout=LIMIT_S, check=True,
    )  # fmt: skip
    assert len(done.stdout.strip().splitlines()) == 1
    summary = json.loads(done.stdout)
    assert summary["model_hash"] == outcome(backend="inline")["model_hash"]
    # Nothing but our own lines: head, rounds, table of eight devices, result, folder; on a loaded machine, what it waits for.
    told = [line for line in done.stderr.splitlines() if not line.startswith("waiting for ")]
    assert told[0].startswith("on-ray: fedavg on 8 devices")
    assert all(line.startswith("round ") for line in told[1:-12])
    assert told[-1] == f"run folder: {tmp_path / 'run'}"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "events.jsonl",
        "fedbonsai.json",
        "summary.json",
        "best.safetensors",
        "final.safetensors",
    } == names


@pytest.mark.parametrize(
    ("number", "send", "code"),
    [(signal.SIGINT, os.killpg, 130), (signal.SIGTERM, os.kill, 143)],
    ids=["ctrl-c", "kill"],
)
def test_a_signal_ends_what_the_run_started(tmp_path, number, send, code):
    """As a terminal does (the whole group), and as ``kill`` does."""
    arguments = line(tmp_path, "--out", str(tmp_path / "run"), "--workers", "1", "--rounds", "100000")
    with command(arguments, env=alone(), start_new_session=True, preexec_fn=heed_interrupts) as process:
        told_to_end(process, tmp_path / "run", number, send, code)


def told_to_end(process, folder, number, send, code):
    """A run that has trained for a round is sent a signal: it ends with all that it started, and leaves a readable folder."""
    wait_until(lambda: process.poll() is not None or has_closed_a_version(folder))
    children = descendants(process.pid)
    assert len(children) >= 4
    send(process.pid, number)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, errors
    assert errors.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["rounds"] >= 1
    wait_until(lambda: not any(map(alive, children)), told="what the run has started has not ended")


@pytest.fixture
def interrupts():
    """SIGINT as a terminal has it: in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_signal_waits_until_ray_has_started_and_a_second_one_does_not():
    from fedbonsai.clusters.ray_backend.ray_cluster import signals_later
    from fedbonsai.runtime.cli.exit_codes import Sigterm
    from ray._private import utils

    def start(*numbers):
        with signals_later():
            utils.set_sigterm_handler(lambda *_: sys.exit(1))  # as ray.init does
            for number in numbers:
                signal.raise_signal(number)
                reached.append(number)

    for numbers, done in (((signal.SIGTERM,), 1), ((signal.SIGINT,), 1), ((signal.SIGINT, signal.SIGINT), 1)):
        reached = []
        with Sigterm() as sigterm:
            with pytest.raises(KeyboardInterrupt):
                start(*numbers)
            assert len(reached) == done
            assert sigterm.received == (signal.SIGTERM in numbers)
            assert signal.getsignal(signal.SIGTERM) == sigterm._interrupt
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_nobody_handles_sigterm_rays_own_handler_stays():
    from fedbonsai.clusters.ray_backend.ray_cluster import signals_later
    from ray._private import utils

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with signals_later():
            utils.set_sigterm_handler(sys.exit)
        assert signal.getsignal(signal.SIGTERM) is sys.exit
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_an_unreachable_address_is_one_sentence(tmp_path, address):
    done = subprocess.run(
        line(tmp_path, "--out", str(tmp_path / "run"), "--set", f"ray.address={address}"),
        capture_output=True, text=True, env=alone(), timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ray.address is ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_only_what_is_code_is_looked_for_as_a_module():
    from fedbonsai.policies.selection.plain import RandomCohort
    from fedbonsai.runtime.configuration.user_modules import named_modules

    fleet = {"classes": [small_fleet()["classes"][0] | {"name": "board:second"}]}
    config = fedbonsai.load_config({"name": "digits:second", "fleet": fleet, "model": "mine:net"})
    assert named_modules(config, RandomCohort(cohort=1)) == ["mine"]
