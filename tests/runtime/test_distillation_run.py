"""Ensemble distillation, whole runs: the same bits in process and on Ray, also when the distiller dies; and what is refused."""

import os
import signal
import textwrap
import threading

import fedbonsai
import pytest
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import Notice, RunStarted, TaskEnded, VersionClosed

from .processes import actor_pids, wait_until
from .resuming import BASE as RESUMED
from .resuming import METHODS, told

BASE = {
    "preset": "reft",
    "seed": 3,
    "backend": "inline",
    "policy": [
        {"name": "random", "cohort": 1.0},
        {"name": "width", "rule": "deadline", "channels": "l1"},
        {"name": "distillation", "steps": 60, "check_every": 10, "held_out": 0.2},
    ],
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 0.3}, "public_share": 0.3},
    "training": {"batch_size": 16, "epochs": 2},
    "stop": {"rounds": 3},
}


def finished(config=BASE, **changes):
    """Summary, notices and tasks of a run."""
    run, notices, tasks = fedbonsai.run(config | changes), [], []
    for event in run:
        notices += [event.text] if isinstance(event, Notice) else []
        tasks += [event] if isinstance(event, TaskEnded) else []
    return run.summary, notices, tasks


@pytest.fixture(name="expected", scope="module")
def expected_fixture():
    summary, _, tasks = finished()
    assert sum(task.students[""].best_step > 0 for task in tasks) >= 2, "rounds depend on their distillation"
    return summary


def test_distillation_changes_the_model(expected):
    without = BASE | {"policy": [*BASE["policy"][:2], BASE["policy"][2] | {"steps": 0}]}
    assert finished(without)[0]["model_hash"] != expected["model_hash"]


@pytest.mark.soak  # with the distiller killed: below
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_on_ray_the_run_is_the_same(expected, workers):
    summary, notices, _ = finished(backend="ray", workers=workers)
    assert told(summary) | {"workers": 1} == told(expected)
    assert not [text for text in notices if "distiller" in text]


@pytest.mark.usefixtures("cluster")
def test_only_a_run_with_tasks_has_a_bundle_for_a_distiller():
    import ray

    def reserved(policy):
        """CPUs of the bundles of a run that has begun."""
        with fedbonsai.run(
            BASE | {"policy": policy, "backend": "ray", "ray": {"distiller_cpus": 0.07}}, workers=1
        ) as run:
            assert any(isinstance(event, RunStarted) for event in run)  # iterated this far, and no further
            groups = ray.util.placement_group_table().values()
            return [group["bundles"][0]["CPU"] for group in groups if group["state"] == "CREATED"]

    assert sorted(reserved(BASE["policy"])) == [0.01, 0.07, 0.1, pytest.approx(2 - 0.18)]
    assert sorted(reserved(BASE["policy"][:1])) == [0.01, 0.1, pytest.approx(2 - 0.11)]


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A transform that blocks a distiller on Ray when it computes what the file "trap" names, which is then removed."""
    (tmp_path / "blocking.py").write_text(
        textwrap.dedent(
            f"""
            import time
            from pathlib import Path
            import torch

            FOLDER = Path({str(tmp_path)!r})
            ACTOR = Path("/proc/self/cmdline").read_bytes().startswith(b"ray::DistillerActor")

            def transform(x, generator):
                doing = "distil" if torch.is_grad_enabled() else "logits"
                if ACTOR and (FOLDER / "trap").exists() and (FOLDER / "trap").read_text() == doing:
                    (FOLDER / "trap").rename(FOLDER / "caught")
                    time.sleep(1000)
                return x
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("cluster")
def test_on_ray_the_run_is_the_same_when_the_distiller_is_killed_while_it_starts_and_while_it_computes(trap):
    config = BASE | {"data": BASE["data"] | {"test_transforms": [{"name": "blocking:transform"}]}}
    expected, _, _ = finished(config)

    def kill_all():
        wait_until(lambda: actor_pids("DistillerActor"))
        os.kill(actor_pids("DistillerActor")[0], signal.SIGKILL)
        for doing in ("logits", "distil"):
            (trap / "new").write_text(doing)
            (trap / "new").rename(trap / "trap")
            wait_until((trap / "caught").exists)
            (trap / "caught").unlink()
            os.kill(actor_pids("DistillerActor")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    summary, notices, tasks = finished(config, backend="ray", workers=1)
    killer.join()
    assert sum(task.students[""].best_step > 0 for task in tasks) >= 2
    starting, *computing = [text for text in notices if "distiller" in text]
    assert starting.startswith("distiller died while it started (")
    assert starting.endswith(") and is replaced")
    assert [(text[:16], text[-16:]) for text in computing] == [("distiller died (", ") and is replaced"[-16:])] * 2
    assert told(summary) == told(expected)


@pytest.mark.soak
@pytest.mark.usefixtures("cluster")
def test_on_ray_the_run_is_the_same_when_the_server_is_killed(tmp_path):
    config = RESUMED | METHODS["reft"] | {"stop": {"rounds": 5}}
    expected, _, tasks = finished(config)
    assert any(task.students[""].best_step > 0 for task in tasks[3:]), "what is computed again depends on distillation"
    run = fedbonsai.run(config, backend="ray", workers=1, out=tmp_path / "run")
    notices, kills_in = [], 3
    for event in run:
        notices += [event.text] if isinstance(event, Notice) else []
        if isinstance(event, VersionClosed) and event.version == kills_in:
            kills_in = None
            os.kill(actor_pids("ServerActor")[0], signal.SIGKILL)
    assert notices[-1].startswith("the run goes on after version ")
    assert told(run.summary) == told(expected)


MINE = """
from dataclasses import dataclass
from msgspec.structs import replace
from fedbonsai.learning.data.vision import load_digits
from fedbonsai.policies.policy import NEEDS_PLANS
from fedbonsai.policies.tasks import Distil

def twin(*, num_devices, seed, root):
    return load_digits()

@dataclass(frozen=True)
class GivesTasks:
    '''Its tasks are not known before its first decision.'''

    writes = ("tasks",)
    needs = NEEDS_PLANS
    distils = True

    def init(self):
        return None

    def decide(self, view, state, decision):
        first = bool(decision.plans) and not view.dispatched
        return replace(decision, tasks=(Distil(steps=5),)) if first else decision, state

def ends(x, generator):
    if len(x) == PUBLIC:
        raise ValueError("too many images")
    return x
"""
TASKS = [{"name": "random", "cohort": 1.0}, {"name": "own_tasks:GivesTasks"}]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's data set, policy and transform; it fails for as many samples as are public."""
    (tmp_path / "own_tasks.py").write_text(MINE.replace("PUBLIC", "431"))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("mine", "cluster")
@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=pytest.mark.soak)])
def test_a_public_set_that_is_not_disjoint_is_refused_before_the_run(backend):
    config = BASE | {"server": {"public": {"name": "own_tasks:twin"}}, "backend": backend}
    events = []
    with pytest.raises(ConfigError, match=r"^the public set .* has \d+ samples, of which \d+ are also on a device"):
        events.extend(fedbonsai.run(config, workers=1))
    assert not [event for event in events if isinstance(event, RunStarted)]


@pytest.mark.usefixtures("mine")
def test_a_task_that_is_not_known_before_the_run_is_checked_in_its_round():
    with pytest.raises(RunError, match=r"^round 0, stage task: the public set has "):
        finished(policy=TASKS, data={"public_share": 0.001})
    assert [task.teachers for task in finished(policy=TASKS, stop={"rounds": 1})[2]] == [8]


@pytest.mark.usefixtures("mine", "cluster")
@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=pytest.mark.soak)])
def test_what_the_distiller_cannot_compute_ends_the_run_in_one_sentence(backend):
    data = BASE["data"] | {"test_transforms": [{"name": "own_tasks:ends"}]}
    with pytest.raises(RunError, match=r"^round 0, stage task: too many images$"):
        finished(data=data, backend=backend, evaluation={"batch_size": 1000})
