"""Runs under memory budgets: the same bits as without, devices that run out of memory and learn, and measured needs."""

import json
import re
from contextlib import nullcontext
from typing import Any

import fedbonsai
import pytest
from fedbonsai.actors.enforcement.data_segment import limit_obstacle
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.engine.engine import check_enforcement
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Notice, PlanEnded, RoundStarted, RunStarted

pytestmark = pytest.mark.skipif(bool(limit_obstacle()), reason=f"no limit of the data segment: {limit_obstacle()}")

HUNGRY = """
import numpy as np
from torch.nn import functional as F

def hungry(output, target):
    '''50 MB inside a loss, which a prediction does not see.'''
    return F.cross_entropy(output, target) + 0 * float(np.ones(50_000_000, np.uint8)[0])
"""
LINK = {"up_bytes_per_s": "1 MB/s", "down_bytes_per_s": "1 MB/s", "flop_per_s": 1e9}
FLEET = {
    "classes": [
        {"name": "large", "count": 2, "memory_bytes": "1 GB", **LINK},
        {"name": "little", "count": 2, "memory_bytes": "30 MB", **LINK},
    ]
}
BASE: dict[str, Any] = {
    "seed": 3,
    "backend": "inline",
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}},
    "training": {"batch_size": 16},
    "stop": {"rounds": 2},
}


@pytest.fixture
def hungry(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(HUNGRY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return BASE | {
        "fleet": FLEET,
        "training": {"batch_size": 16, "loss": "my_loss:hungry"},
        "memory": {"enforce": True, "probe": False},
    }


def events_of(config, **options):
    run = fedbonsai.run(config, **options)
    return list(run), run


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "fedavg", "training": {"batch_size": 16, "checkpointing": True}},
        {"preset": "reft", "fleet": "laptop"},
        {"preset": "resfed"},
        {"preset": "splitfed"},
        {"preset": "local_loss"},
    ],
    ids=lambda changes: changes["preset"],
)
def test_the_same_bits_with_and_without_enforcement(changes):
    found = {}
    for enforce in (False, True):
        memory = {"enforce": enforce, "probe": False, "margin": 1.0}
        events, run = events_of(BASE | {"fleet": "uniform-10", "stop": {"rounds": 1}} | changes | {"memory": memory})
        reports = [event.report for event in events if isinstance(event, PlanEnded)]
        assert {report.enforced for report in reports} == {True if enforce else None}
        assert {report.outcome.value for report in reports} == {"done"}
        found[enforce] = run.summary["model_hash"], [report.loss for report in reports]
    assert found[True] == found[False]


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        ({"enforce": True}, "memory.enforce is true, but it has none; allowed here: false, auto"),
        ({"probe": True}, "memory.probe is true, but it has none; allowed here: false, null"),
        ({"enforce": "auto"}, ""),
    ],
)
def test_what_the_system_cannot_is_refused_unless_it_is_left_to_it(memory, sentence):
    config = load_config(BASE | {"memory": memory})
    with pytest.raises(ValueError, match=re.escape(sentence)) if sentence else nullcontext():
        check_enforcement(config, obstacle=lambda: "it has none")
    check_enforcement(config)


def learned(events):
    """(device, outcome) of each plan, and the notices."""
    plans = [(event.report.plan.device, event.report.outcome.value) for event in events if isinstance(event, PlanEnded)]
    return sorted(plans), [event.text for event in events if isinstance(event, Notice)]


def check_learned(events):
    """Both little devices run out of memory in the first round, and are left out of the second."""
    plans, notices = learned(events)
    assert plans == [(0, "done"), (0, "done"), (1, "done"), (1, "done"), (2, "out_of_memory"), (3, "out_of_memory")]
    assert [event.left_out for event in events if isinstance(event, RoundStarted)] == [{}, {"memory": 2}]
    fell = [text for text in notices if "its learned budget is" in text]
    assert len(fell) == 2
    assert fell[0].startswith("device 2 ran out of memory in round 0 under a limit of 30.0 MB, predicted ")
    failed = [event.report for event in events if isinstance(event, PlanEnded) and event.report.outcome != "done"]
    assert {(report.enforced, report.stage, report.plan.memory_bytes) for report in failed} == {
        (True, "train", 30_000_000)
    }


def test_a_device_that_runs_out_of_memory_has_a_smaller_budget_and_is_left_out(hungry):
    events, run = events_of(hungry)
    check_learned(events)
    assert run.summary["outcomes"]["out_of_memory"] == 2


def test_what_plans_need_is_measured_before_the_first_round_and_a_resumed_run_uses_it(hungry, tmp_path):
    folder = tmp_path / "run"
    config = hungry | {"memory": {"enforce": True}, "stop": {"rounds": 1}}
    events, _ = events_of(config, out=folder)
    started = next(event for event in events if isinstance(event, RunStarted))
    ((name, needed),) = started.measured["memory"].items()
    assert name.startswith("4 of 4 blocks trained, batch 16, float32: ")
    assert 50_000_000 < needed < 80_000_000
    assert json.loads((folder / "measured.json").read_text())["memory"] == {name: needed}
    plans, _ = learned(events)
    assert plans == [(0, "done"), (1, "done")]  # the others were left out before anything failed
    assert [event.left_out for event in events if isinstance(event, RoundStarted)] == [{"memory": 2}]

    (folder / "measured.json").write_text(json.dumps({"memory": {name: 10**6}}))
    with pytest.raises(ConfigError, match=r"memory\.probed, what plans were measured to need, differs"):
        list(fedbonsai.run(config | {"stop": {"rounds": 2}}, resume=folder))
    (folder / "measured.json").write_text(json.dumps({"memory": {name: needed}}))
    again, _ = events_of(config | {"stop": {"rounds": 2}}, resume=folder)
    plans, _ = learned(again)
    assert plans == [(0, "done"), (1, "done")]


def test_a_learned_budget_is_in_the_checkpoint(hungry, tmp_path):
    folder = tmp_path / "run"
    events_of(hungry | {"stop": {"rounds": 1}}, out=folder)
    events, _ = events_of(hungry, resume=folder)
    assert [event.left_out for event in events if isinstance(event, RoundStarted)] == [{"memory": 2}]


def test_a_margin_leaves_out_devices_whose_budget_is_near(hungry):
    """Without the loss of 50 MB, some 8 MB are predicted."""
    config = hungry | {"training": {"batch_size": 16}, "stop": {"rounds": 1}}
    for margin, left_out in ((1.0, {}), (6.0, {"memory": 2})):
        memory = {"enforce": True, "probe": False, "margin": margin}
        events, _ = events_of(config | {"memory": memory})
        assert [event.left_out for event in events if isinstance(event, RoundStarted)] == [left_out]


def test_on_ray_a_device_runs_out_of_memory_its_actor_lives_and_the_run_goes_on(cluster, hungry):
    inline, first = events_of(hungry)
    events, second = events_of(hungry | {"backend": "ray", "workers": 1})
    check_learned(events)
    assert not [text for text in learned(events)[1] if "died" in text or "replaced" in text]
    assert second.summary["model_hash"] == first.summary["model_hash"]
    assert learned(inline)[0] == learned(events)[0]


def test_on_ray_streams_and_links_give_the_same_bits_under_limits(cluster):
    for preset in ("splitfed", "resfed"):
        plain = BASE | {"preset": preset, "fleet": "uniform-10", "stop": {"rounds": 1}}
        _, inline = events_of(plain)
        enforced = {"backend": "ray", "workers": 2, "memory": {"enforce": "auto", "probe": False}}
        events, ray = events_of(plain | enforced)
        assert {event.report.enforced for event in events if isinstance(event, PlanEnded)} == {True}
        assert ray.summary["model_hash"] == inline.summary["model_hash"]


def test_on_ray_blocks_fit_where_whole_models_do_not(cluster):
    data = {"name": "synthetic", "kwargs": {"shape": [3, 32, 32], "classes": 10, "samples_per_device": 64}}
    classes = [{"name": name, "count": 1, "memory_bytes": memory, **LINK}
               for name, memory in (("large", "300 MB"), ("little", "120 MB"))]  # fmt: skip
    config = BASE | {
        "backend": "ray",
        "workers": 1,
        "model": "resfed_cnn",
        "training": {"batch_size": 64, "optimiser": {"learning_rate": 0.01}},
        "data": data,
        "fleet": {"classes": classes},
        "server": {"statistics": "batch"},
        "evaluation": {"where": "none"},
        "memory": {"enforce": True, "admission": False, "probe": False},
    }
    whole, _ = events_of(config | {"preset": "fedavg", "stop": {"rounds": 1}})
    outcomes = {event.fleet_class: event.report.outcome.value for event in whole if isinstance(event, PlanEnded)}
    assert outcomes == {"large": "done", "little": "out_of_memory"}
    stages = {"name": "profl", "shrinking": False, "grow_rounds": 1}
    blocks, _ = events_of(config | {"policy": ["all", stages], "stop": {"rounds": 4}})
    reports = [event.report for event in blocks if isinstance(event, PlanEnded)]
    assert {(report.outcome.value, report.enforced) for report in reports} == {("done", True)}
    assert len(reports) == 8
    assert {name for report in reports for name in report.plan.part.trained} == set(whole[0].blocks)
