"""Families of models in one cohort, which learn from each other by distillation."""

import fedbonsai
import pytest
import torch
from fedbonsai.runtime.events import Evaluated, PlanEnded, TaskEnded

from .resuming import started, told, uninterrupted

LINK = {"memory_bytes": 10**10, "up_bytes_per_s": 10**9, "down_bytes_per_s": 10**9, "flop_per_s": 1e10}
DATA = {"name": "synthetic", "kwargs": {"shape": [3, 32, 32], "samples_per_device": 8, "test_samples": 8}}
PUBLIC = {"name": "synthetic", "kwargs": {"shape": [3, 32, 32], "samples_per_device": 4, "test_samples": 0}}
CONFIG = {
    "backend": "inline",
    "seed": 2,
    "model": "small",
    "models": {
        "vgg": {"name": "vgg11_bn", "kwargs": {"hidden": 16}},
        "resnet": {"name": "torchvision/resnet18"},
    },
    "data": DATA,
    "server": {"public": PUBLIC},
    "fleet": {"classes": [{"name": name or "plain", "model": name} | LINK for name in ("", "vgg", "resnet")]},
    "training": {"steps": 1, "batch_size": 4},
    "policy": [
        {"name": "all"},
        {"name": "distillation", "steps": 1, "batch_size": 4, "check_every": 1, "held_out": 0.5},
    ],
    "checkpoint": {"share": None},
    "stop": {"rounds": 2},
}
# Of the same kind and small: for what does not depend on the architectures.
TINY = CONFIG | {
    "model": "digits_cnn",
    "models": {"same": "digits_cnn", "wide": {"name": "digits_cnn"}},
    "data": {"name": "digits", "public_share": 0.02},
    "server": {},
    "fleet": {"classes": [{"name": name or "plain", "model": name} | LINK for name in ("", "same", "wide")]},
}


@pytest.fixture(name="whole", scope="module")
def whole_fixture(tmp_path_factory):
    """A run of two rounds, with its events."""
    run = fedbonsai.run(CONFIG, out=tmp_path_factory.mktemp("families") / "whole")
    return run, list(run)


def test_each_family_is_trained_and_distilled(whole):
    _, events = whole
    ended = [event.report for event in events if isinstance(event, PlanEnded)]
    assert [report.outcome.value for report in ended] == ["done"] * 6
    assert {report.plan.device: report.plan.part.model for report in ended} == {0: "", 1: "vgg", 2: "resnet"}
    tasks = [event for event in events if isinstance(event, TaskEnded)]
    assert [(task.teachers, list(task.students)) for task in tasks] == [(3, ["", "vgg", "resnet"])] * 2
    last = [event for event in events if isinstance(event, Evaluated)][-1]
    assert (list(last.families), last.version) == (["vgg", "resnet"], 2)
    assert len({figures["loss"] for figures in (last.server, *last.families.values())}) == 3


def test_each_family_has_weights_of_its_own(whole):
    run, _ = whole
    weights = {family: run.weights(family=family) for family in ("", "vgg", "resnet")}
    assert [len(tensors) for tensors in weights.values()] == [
        len(run.model(family=family).state_dict()) for family in weights
    ]
    assert not any(":" in name for tensors in weights.values() for name in tensors)
    for family in weights:
        model = run.model(family=family)
        assert not model.training
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert all(torch.equal(tensor, weights[family][name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="family is 'alexnet'; the families in models: vgg, resnet"):
        run.weights(family="alexnet")


def test_a_run_without_families_has_none(whole):
    run = fedbonsai.run(TINY | {"models": {}, "fleet": "laptop", "stop": {"rounds": 0}, "policy": [{"name": "all"}]})
    list(run)
    assert run.weights().keys() == run.model().state_dict().keys()
    with pytest.raises(ValueError, match="family is 'vgg'; the families in models: none"):
        run.weights(family="vgg")


@pytest.mark.soak
def test_it_is_resumed_to_the_same_models(whole, tmp_path):
    run, _ = whole
    with fedbonsai.run(CONFIG, out=tmp_path / "cut") as cut:
        for event in cut:
            if isinstance(event, PlanEnded) and event.report.plan.version == 1:
                break
    resumed = fedbonsai.run(CONFIG, resume=tmp_path / "cut")
    list(resumed)
    assert resumed.summary["model_hash"] == run.summary["model_hash"]
    assert told(resumed.summary) == told(run.summary)
    for family in ("", "vgg", "resnet"):
        mine, other = run.weights(family=family), resumed.weights(family=family)
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


def test_families_with_maps_and_links_are_resumed_to_the_same_bits(tmp_path):
    """Narrow parts of several families, distilled, while other plans are in flight."""
    width = {"name": "width", "levels": [0.5], "unit": "width", "min_channels": 2, "warm_up": 0, "refresh": 2}
    config = TINY | {
        "policy": [{"name": "asynchronous", "buffer": 2, "concurrency": 1.0}, width, TINY["policy"][1]],
        "server": {"staleness": {"rule": "polynomial"}, "optimiser": {"name": "momentum"}},
        "evaluation": {"every": 5},
        "stop": {"rounds": 5},
    }
    expected = uninterrupted(config, tmp_path / "whole")
    started(config, tmp_path / "cut", stops=3)
    resumed = fedbonsai.run(config, resume=tmp_path / "cut")
    list(resumed)
    assert told(resumed.summary) == told(expected)


def test_a_family_can_be_cut_where_each_device_has_its_own_blocks():
    config = TINY | {"data": {"name": "digits"}, "stop": {"rounds": 1}}
    plain = fedbonsai.run(config | {"policy": [{"name": "all"}]})
    list(plain)
    split = fedbonsai.run(config | {"policy": [{"name": "all"}, {"name": "splitfed"}]})
    list(split)
    assert split.summary["model_hash"] == plain.summary["model_hash"]


def test_evaluation_on_devices_is_of_each_devices_family():
    config = TINY | {
        "policy": [{"name": "all"}],
        "data": {"name": "digits", "test_share": 0.2},
        "evaluation": {"where": "both"},
        "stop": {"rounds": 1},
    }
    events = list(fedbonsai.run(config))
    last = [event for event in events if isinstance(event, Evaluated)][-1]
    assert (last.num_devices, last.num_failed, list(last.families)) == (3, 0, ["same", "wide"])
