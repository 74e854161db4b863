"""Workers and hosts that hang or die, and a plan that kills every worker: the run goes on, and other plans are not affected."""

import os
import signal
import textwrap
import threading
import time

import fedbonsai
import pytest
from fedbonsai.runtime.events import Notice, PlanEnded, VersionClosed

from .chaos import CONFIG
from .processes import actor_pids, wait_until

BASE = {
    "seed": 3,
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}},
    "fleet": "laptop",
    "evaluation": {"where": "none"},
    "stop": {"rounds": 3},
}


pytestmark = pytest.mark.usefixtures("cluster")


def told(run, at_first_version=lambda: None):
    """Notices and reports of a run; ``at_first_version`` is called when the first version has closed."""
    notices, ended = [], []
    for event in run:
        notices += [event.text] if isinstance(event, Notice) else []
        ended += [event.report] if isinstance(event, PlanEnded) else []
        if isinstance(event, VersionClosed) and event.version == 1:
            at_first_version()
    return notices, ended


def test_a_worker_that_hangs_is_ended_and_replaced():
    expected = fedbonsai.run(BASE, backend="inline")
    list(expected)
    run, stopped = fedbonsai.run(BASE | {"ray": {"stuck_after_s": 10}}, backend="ray", workers=2), []

    def stop_one():
        stopped.append(actor_pids("WorkerActor")[0])
        os.kill(stopped[0], signal.SIGSTOP)

    notices, ended = told(run, stop_one)
    wait_until(lambda: stopped[0] not in actor_pids("WorkerActor"))  # Ray gives a process some seconds to end by itself
    assert any("stuck: it ran one plan for more than 10 s" in text and "replaced" in text for text in notices), notices
    assert {report.outcome.value for report in ended} == {"done"}
    assert run.summary["model_hash"] == expected.summary["model_hash"]


@pytest.mark.soak
def test_a_partition_host_that_hangs_is_ended_and_replaced():
    expected = fedbonsai.run(CONFIG | {"stop": {"rounds": 3}}, backend="inline")
    list(expected)
    run, stopped = fedbonsai.run(CONFIG | {"ray": {"stuck_after_s": 12}, "stop": {"rounds": 3}}, backend="ray"), []

    def stop_one():
        stopped.append(actor_pids("PartitionHostActor")[0])
        os.kill(stopped[0], signal.SIGSTOP)

    notices, ended = told(run, stop_one)
    why = "died (stuck: it did not answer for more than 12 s) and is replaced"
    assert [text for text in notices if text.endswith(why)]
    assert not [text for text in notices if text.startswith("worker")], "the workers that wait for it are not replaced"
    assert {report.outcome.value for report in ended} <= {"done", "late"}
    assert run.summary["model_hash"] == expected.summary["model_hash"]


def test_a_worker_that_dies_while_it_starts_is_replaced():
    def kill_the_first():
        wait_until(lambda: actor_pids("WorkerActor"))
        os.kill(actor_pids("WorkerActor")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    config = BASE | {"stop": {"rounds": 1}}
    run = fedbonsai.run(config, backend="ray", workers=1)
    notices, ended = told(run)
    killer.join()
    assert any("died while it started (" in text and text.endswith(") and is replaced") for text in notices), notices
    assert {(report.outcome.value, report.plan.attempt) for report in ended} == {("done", 0)}


def test_a_plan_that_kills_every_worker_is_lost_and_those_behind_it_are_not(tmp_path, monkeypatch):
    (tmp_path / "poison.py").write_text(
        textwrap.dedent(
            """
            import os
            from pathlib import Path
            from dataclasses import dataclass
            from msgspec.structs import replace
            from fedbonsai.learning.spec import Call
            from fedbonsai.policies.policy import NEEDS_PLANS

            def loss(output, target):
                if Path("/proc/self/cmdline").read_bytes().startswith(b"ray::WorkerActor"):  # the server measures it
                    os._exit(1)
                return output.sum()

            @dataclass(frozen=True)
            class ForDeviceTwo:
                needs = NEEDS_PLANS
                def init(self):
                    return None
                def decide(self, view, state, decision):
                    plans = tuple(
                        replace(p, training=replace(p.training, loss=Call("poison:loss"))) if p.device == 2 else p
                        for p in decision.plans
                    )
                    return replace(decision, plans=plans), state
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    policy = [{"name": "random", "cohort": 1.0}, {"name": "poison:ForDeviceTwo"}]
    run = fedbonsai.run(BASE | {"policy": policy, "stop": {"rounds": 1}}, backend="ray", workers=1)
    notices, ended = told(run)
    outcomes = {report.plan.device: report.outcome.value for report in ended}
    assert outcomes == {device: "lost" if device == 2 else "done" for device in range(8)}
    (lost,) = [report for report in ended if report.plan.device == 2]
    assert lost.error.startswith("worker died: ")
    assert sum("is replaced" in text for text in notices) == 3


@pytest.mark.soak
def test_a_host_that_dies_while_a_heartbeat_is_pending_is_replaced():
    """The heartbeat and the calls that end its slots fail at once, because the server is stopped while the host dies."""
    config = CONFIG | {"ray": {"stuck_after_s": 8}, "stop": {"rounds": 3}}
    expected = fedbonsai.run(config, backend="inline")
    list(expected)
    run = fedbonsai.run(config, backend="ray")

    def stop_and_kill():
        (server,), host = actor_pids("ServerActor"), actor_pids("PartitionHostActor")[0]
        os.kill(host, signal.SIGSTOP)  # now, before the run has been asked for its next round
        threading.Timer(3.0, kill, [server, host]).start()  # a heartbeat is asked for every two seconds

    def kill(server, host):
        os.kill(server, signal.SIGSTOP)
        os.kill(host, signal.SIGKILL)
        time.sleep(1.5)
        os.kill(server, signal.SIGCONT)

    notices, ended = told(run, stop_and_kill)
    assert [text for text in notices if text.startswith("partition host") and text.endswith("and is replaced")]
    assert {report.outcome.value for report in ended} <= {"done", "late"}
    assert run.summary["model_hash"] == expected.summary["model_hash"]
