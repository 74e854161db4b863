"""Progressive training, whole runs: it learns; one group is FedAvg; frozen blocks keep their bits; what is refused."""

import json
import sys

import fedbonsai
import pytest
import torch
from fedbonsai.runtime.cli import main as cli
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.policy_checks import configured_policy
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import BlocksMoved, Evaluated, PlanEnded, VersionClosed

MODULE = """
from torch import nn

class Normalised(nn.Module):
    '''Blocks a, b, c and out, with running statistics and dropout.'''

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.nc = nn.Conv2d(8, 12, 2, stride=2, bias=False), nn.BatchNorm2d(12)
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(12 * 16, num_classes)

    def forward(self, x):
        x = self.drop(self.na(self.a(x)).relu())
        x = self.nc(self.c(self.nb(self.b(x)).relu())).relu()
        return self.out(x.flatten(1))

class Looping(nn.Module):
    '''One block: its layer is used twice, around all others.'''

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, num_classes)

    def forward(self, x):
        x = x.flatten(1)
        if x.sum() > 1e9:
            x = x + 1
        return self.out(self.a(self.b(self.a(x).relu()).relu()))
"""
LINK = {"up_bytes_per_s": 10**7, "down_bytes_per_s": 10**7}
PROFL = {
    "name": "profl",
    "blocks": ["features.0", "features.2"],
    "shrink_rounds": 2,
    "imitate_rounds": 1,
    "grow_rounds": 2,
    "min_rounds": 1,
}
BASE = {
    "backend": "inline",
    "seed": 3,
    "data": {"name": "digits"},
    "fleet": {"classes": [{"name": "board", "count": 3, "flop_per_s": 1e9, "memory_bytes": 10**9} | LINK]},
    "training": {"batch_size": 32, "optimiser": {"learning_rate": 0.05}},
    "stop": {"rounds": 12},
}
NORMALISED = {"model": {"name": "progressive_models:Normalised"}}


def profl(**changes):
    """A configuration with the policy; ``changes``: of the policy's fields."""
    return BASE | {"policy": [{"name": "all"}, PROFL | changes, {"name": "random", "cohort": 1.0}]}


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "progressive_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def phases(events):
    """Phase and stage of each version, in order, from the reasons of its plans."""
    found = {}
    for event in events:
        if isinstance(event, PlanEnded):
            own = [reason for reason in event.report.plan.reasons if reason.startswith("profl: ")]
            found[event.report.plan.version] = own[0].removeprefix("profl: ").partition(" of ")[0]
    return list(found.values())


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_a_whole_schedule_learns():
    run = fedbonsai.run(profl())
    events = list(run)
    assert phases(events) == [
        "shrink 3", "shrink 3", "imitate 3", "shrink 2", "shrink 2", "imitate 2",
        "grow 1", "grow 1", "grow 2", "grow 2", "grow 3", "grow 3",
    ]  # fmt: skip
    evaluated = of(events, Evaluated)
    assert evaluated[-1].server["accuracy"] > 0.85
    proxies = ["proxy@features.2..features.2", "proxy@classifier.0..classifier.0"]
    assert [event.stages for event in evaluated] == [
        *[()] * 2,
        *[("features.0", "features.2", proxies[1], "classifier.2")] * 3,
        *[("features.0", *proxies, "classifier.2")] * 3,
        *[("features.0", "features.2", proxies[1], "classifier.2")] * 2,
        *[()] * 2,
    ]
    moved = of(events, BlocksMoved)
    assert [event.label for event in moved] == [name for name in phases(events) if not name.startswith("imitate")]
    assert all(0 < event.movement <= 1 for event in moved)
    assert {event.report.outcome.value for event in of(events, PlanEnded)} == {"done"}
    assert set(run.summary["down_by_kind"]) >= {"weights", "block"}


@pytest.mark.parametrize("one", [{"most_groups": 1, "blocks": "auto"}, {"blocks": []}])
def test_one_group_is_fedavg_bit_for_bit(one):
    hashes = []
    short = {"stop": {"rounds": 3}}
    for config in (BASE | {"policy": [{"name": "all"}, {"name": "random", "cohort": 1.0}]}, profl(**one)):
        run = fedbonsai.run(config | short)
        list(run)
        hashes.append((run.summary["model_hash"], run.summary["up_bytes"], run.summary["down_bytes"]))
    assert hashes[0] == hashes[1]


TRAINED = {
    "shrink 3": {"c", "out"}, "shrink 2": {"b", "out"}, "grow 1": {"a", "out"}, "grow 2": {"b", "out"}, "grow 3": {"c", "out"}
}  # fmt: skip


def versions(config):
    """The weights of each version, from 0 on, and the events of the run."""
    config = load_config(config)
    engine = Engine(config, configured_policy(config))
    weights, events = [engine.weights()], []
    for event in engine.events():
        events.append(event)
        if isinstance(event, VersionClosed):
            weights.append(engine.weights())
    engine.close()
    return weights, events


def block_of(name):
    return name.split(".")[0].removeprefix("n")


def test_what_is_frozen_keeps_all_bits_and_what_grows_is_carried_over():
    config = profl(blocks=["a", "b"]) | NORMALISED | {"stop": {"rounds": 13}}
    weights, events = versions(config)
    stages = phases(events)
    assert stages[:2] == ["collect 3", "shrink 3"]
    for stage, before, after in zip(stages, weights[:-1], weights[1:], strict=True):
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        if stage.startswith("imitate"):
            assert changed == set()
        elif stage.startswith("collect"):
            assert {name.rpartition(".")[2] for name in changed} <= {
                "running_mean",
                "running_var",
                "num_batches_tracked",
            }
            assert {block_of(name) for name in changed} == {"a", "b"}
        else:
            assert {block_of(name) for name in changed} == TRAINED[stage], stage
    assert of(events, Evaluated)[-1].server["accuracy"] > 0.6


def test_a_stage_that_no_device_can_afford_ends_the_run_with_one_sentence():
    config = profl(shrinking=False) | {
        "fleet": {"classes": [{"name": "board", "count": 2, "flop_per_s": 1e9, "memory_bytes": 1000} | LINK]}
    }
    with pytest.raises(RunError) as caught:
        list(fedbonsai.run(config))
    sentence = str(caught.value)
    assert "the policy chose no device" in sentence
    assert "memory" in sentence
    assert "\n" not in sentence


def peaks():
    """Peak memory in each stage while growing, in bytes."""
    found = {}
    for event in fedbonsai.run(profl(shrinking=False, grow_rounds=1) | {"stop": {"rounds": 3}}):
        if isinstance(event, PlanEnded):
            found[event.report.plan.reasons[1]] = event.report.virtual.peak_memory_bytes
    return list(found.values())


def test_or_the_run_goes_on_with_the_next_stage():
    needed = peaks()
    assert len(needed) == 3
    order = sorted(range(3), key=needed.__getitem__)
    hungry = order[-1]
    if hungry == 2:
        pytest.skip("the last stage needs the most memory here")
    room = needed[hungry] - 1
    config = profl(shrinking=False, grow_rounds=1, none_fits="next") | {
        "fleet": {"classes": [{"name": "board", "count": 2, "flop_per_s": 1e9, "memory_bytes": room} | LINK]},
        "stop": {"rounds": 2},
    }
    assert f"grow {hungry + 1}" not in phases(list(fedbonsai.run(config)))


def test_a_budget_below_the_peak_is_never_given_the_stage():
    needed = peaks()
    low = min(needed)
    classes = [
        {"name": "large", "flop_per_s": 1e9, "memory_bytes": 10**9} | LINK,
        {"name": "small", "flop_per_s": 1e9, "memory_bytes": low} | LINK,
    ]
    config = profl(shrinking=False, grow_rounds=1) | {"fleet": {"classes": classes}, "stop": {"rounds": 3}}
    devices = {}
    for event in fedbonsai.run(config):
        if isinstance(event, PlanEnded):
            devices.setdefault(event.report.plan.version, set()).add(event.report.plan.device)
            assert event.report.virtual.peak_memory_bytes <= (10**9, low)[event.report.plan.device]
    assert [1 in devices[version] for version in range(3)] == [need <= low for need in needed]


@pytest.mark.parametrize("unaffordable", ["head_only", "smaller_batch"])
def test_a_device_that_cannot_afford_a_stage_takes_part_otherwise(unaffordable):
    room = peaks()[0] - 1
    classes = [
        {"name": "large", "flop_per_s": 1e9, "memory_bytes": 10**9} | LINK,
        {"name": "small", "flop_per_s": 1e9, "memory_bytes": room} | LINK,
    ]
    config = profl(shrinking=False, unaffordable=unaffordable) | {"fleet": {"classes": classes}, "stop": {"rounds": 1}}
    ended = of(list(fedbonsai.run(config)), PlanEnded)
    assert {(event.report.plan.device, event.report.outcome.value) for event in ended} == {(0, "done"), (1, "done")}
    (small,) = [event.report for event in ended if event.report.plan.device == 1]
    assert small.virtual.peak_memory_bytes <= room
    if unaffordable == "head_only":
        assert small.plan.part.trained == ("classifier.2",)
    else:
        assert small.plan.training.accumulation > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks": ["features.7"]}, "cuts behind 'features.7'; the clean cuts are: features.0"),
        ({"blocks": ["classifier.2"]}, "cuts behind 'classifier.2'; the clean cuts are: features.0"),
        (
            {"blocks": ["features.2", "features.0"]},
            "cuts behind 'features.0', which must be 'features.2' or a block behind it",
        ),
    ],
)
def test_blocks_that_the_model_does_not_have_are_refused(changes, words):
    with pytest.raises(ConfigError) as caught:
        next(fedbonsai.run(profl(**changes)))
    assert words in str(caught.value)


def test_a_model_without_clean_cuts_is_refused():
    config = profl(blocks="auto") | {"model": {"name": "progressive_models:Looping"}}
    with pytest.raises(ConfigError, match="which cannot be cut: "):
        next(fedbonsai.run(config))


def test_these_are_users_mistakes_for_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, config in enumerate(
        (profl(blocks=["features.7"]), profl(blocks="auto") | {"model": {"name": "progressive_models:Looping"}})
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(json.dumps(config))
        monkeypatch.setattr(sys, "argv", ["fedbonsai", "run", str(path)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "profl" in line.lower()


def test_late_updates_of_a_frozen_block_are_late():
    """Of three devices the last is slow: an update of its arrives when the block is frozen."""
    classes = [{"name": f"c{i}", "flop_per_s": 1e9 / 2.5**i, "memory_bytes": 10**9} | LINK for i in range(3)]
    config = BASE | {
        "policy": [
            {"name": "asynchronous", "buffer": 1, "concurrency": 1.0},
            PROFL | {"shrinking": False, "grow_rounds": 4},
        ],
        "server": {"staleness": {"rule": "polynomial"}},
        "fleet": {"classes": classes},
        "evaluation": {"where": "none"},
        "stop": {"rounds": 14},
    }
    ended = of(list(fedbonsai.run(config)), PlanEnded)
    late = [event.report for event in ended if event.report.outcome.value == "late" and "frozen" in event.report.error]
    assert late
    for report in late:
        part = report.plan.part
        assert report.error in [f"{name!r} was frozen meanwhile" for name in (*part.trained, *part.auxiliaries)]
    folded = [event for event in ended if event.report.outcome.value == "done"]
    assert any(event.staleness for event in folded)


def test_a_stage_that_ends_worse_goes_back_to_its_best_weights():
    """With a rate that is too high, accuracy jumps; the version after the roll-back has the weights of the best one."""
    config = profl(shrinking=False, grow_rounds=4, tolerance=0.0) | {"stop": {"rounds": 12}}
    config = config | {"training": {"batch_size": 32, "optimiser": {"learning_rate": 0.35, "momentum": 0.9}}}
    weights, events = versions(config)
    restored = [event.version for event in of(events, VersionClosed) if event.folded == 0]
    assert restored, "the rate is high enough for one roll-back"
    accuracy = {event.version: event.server["accuracy"] for event in of(events, Evaluated)}
    version = restored[0]
    stage = phases(events)[version - 2]
    of_stage = [number + 1 for number, name in enumerate(phases(events)[: version - 1]) if name == stage]
    best = max(of_stage, key=lambda each: (accuracy[each], -each))
    assert accuracy[version] == accuracy[best] > accuracy[version - 1]
    assert all(torch.equal(weights[version][name], weights[best][name]) for name in weights[best])


def test_checkpointing_changes_no_bit_of_any_stage():
    blocks = {"blocks": ["a", "b"]}
    hashes = []
    for checkpointing in (False, True):
        training = BASE["training"] | {"batch_size": 64, "checkpointing": checkpointing}
        run = fedbonsai.run(profl(**blocks) | NORMALISED | {"training": training})
        list(run)
        hashes.append(run.summary["model_hash"])
    assert hashes[0] == hashes[1]
