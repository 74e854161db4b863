"""Split training, whole runs: any clean cut gives the bits of FedAvg, in process, on Ray, and when actors die in a stream."""

import fedbonsai
import pytest
import torch
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import PlanEnded

from .processes import killed_in_mid_stream

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**9, "down_bytes_per_s": 10**9}
BASE = {
    "backend": "inline",
    "seed": 5,
    # Each device is far slower than the one before, so that the order of arrival is fixed: float32 sums depend on it.
    "fleet": {"classes": [{"name": f"c{i}", "flop_per_s": 1e9 / 4**i} | LINK for i in range(4)], "hosts": {"count": 2}},
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}},
    "evaluation": {"where": "none"},
    "stop": {"rounds": 2},
}


def cut_at(block):
    return {"policy": [{"name": "random", "cohort": 1.0}, {"name": "splitfed", "cut": block}]}


def finished(**changes):
    run = fedbonsai.run(BASE | changes)
    ended = [event.report for event in run if isinstance(event, PlanEnded)]
    assert [report.error for report in ended if report.error] == []
    return run.summary, ended


@pytest.fixture(name="fedavg", scope="module")
def fedavg_fixture():
    return finished()[0]


@pytest.mark.parametrize("block", ["features.0", "features.2", "classifier.0"])
def test_any_clean_cut_gives_the_bits_of_fedavg(fedavg, block):
    summary, _ = finished(**cut_at(block))
    assert summary["model_hash"] == fedavg["model_hash"]


@pytest.mark.parametrize(
    "training",
    [{"precision": "bf16", "layout": "channels_last"}, {"accumulation": 3, "epochs": 2}, {"steps": 3}],
    ids=str,
)
def test_the_same_holds_with_other_training_settings(training):
    changes = {"training": training, "stop": {"rounds": 1}}
    assert finished(**changes, **cut_at("features.0"))[0]["model_hash"] == finished(**changes)[0]["model_hash"]


def family_run(policy):
    """Devices 1 and 3 train a family of their own; its final weights, and the outcomes."""
    classes = [{"name": f"c{i}", "flop_per_s": 1e9 / 4**i, "model": "big" if i % 2 else ""} | LINK for i in range(4)]
    models = {"big": {"name": "small", "kwargs": {"in_channels": 1, "image_size": 8}}}
    changes = {"fleet": BASE["fleet"] | {"classes": classes}, "models": models, "policy": policy}
    run = fedbonsai.run(BASE | changes)
    for _ in run:
        pass
    return run.weights(family="big"), run.summary["model_hash"]


def test_a_cut_model_of_a_family_is_that_of_the_family():
    whole, whole_hash = family_run([{"name": "random", "cohort": 1.0}])
    cut, cut_hash = family_run(cut_at("features.0")["policy"])
    assert cut_hash == whole_hash
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


def test_every_byte_that_crosses_the_cut_is_counted():
    summary, ended = finished(preset="splitfed", stop={"rounds": 1})
    samples = sum(report.samples for report in ended)
    batches = sum(report.steps for report in ended)
    # 16 x 8 x 8 float32 in each direction and a label of one byte up for each sample; for each packet at most 48 + 8 bytes of
    # header and 8 of checksum
    for kind, payload in (("up_by_kind", samples * (4096 + 1)), ("down_by_kind", samples * 4096)):
        name = "activations" if kind == "up_by_kind" else "gradients"
        assert payload + 64 * batches >= summary[kind][name] >= payload + 56 * batches
    assert sum(report.virtual.up_bytes for report in ended) == summary["up_bytes"] - summary["up_by_kind"]["control"]
    for report in ended:
        virtual = report.virtual
        assert virtual.seconds == virtual.down_s + virtual.compute_s + virtual.stream_s + virtual.up_s
        assert virtual.host_flops > virtual.flops > 0


def test_mistakes_are_refused_with_the_allowed_values():
    clean = r"the clean cuts are: features\.0 \(16x8x8\), features\.2 \(512\), classifier\.0 \(64\)"
    with pytest.raises(ConfigError, match=r"policy\[1\] \(splitfed\) cuts behind 'classifier\.2'; " + clean):
        finished(**cut_at("classifier.2"))
    fleet = {"classes": [{"name": "shy", "flop_per_s": 1e9, "may_send": ["weights", "statistics"]} | LINK]}
    with pytest.raises(ConfigError, match=r"fleet class 'shy' may send only statistics, weights; policy.* activations"):
        finished(preset="splitfed", fleet=fleet)
    with pytest.raises(ConfigError, match=r"clip_norm is 1.0; .* neither side of a cut sees the whole gradient"):
        finished(preset="splitfed", training={"optimiser": {"clip_norm": 1.0}})


@pytest.mark.soak
@pytest.mark.usefixtures("cluster")
def test_on_ray_the_run_is_the_same_also_when_actors_are_killed_during_a_stream():
    changes = {"preset": "splitfed", "training": {"batch_size": 4}, "stop": {"rounds": 3}}
    expected, _ = finished(**changes)
    summary = killed_in_mid_stream(BASE | changes, "PartitionHostActor", "WorkerActor")
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes")
    assert {key: summary[key] for key in same} == {key: expected[key] for key in same}
