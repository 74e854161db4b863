"""Evaluation is an instrument: its place and frequency change no bit of the model and no byte of training."""

import fedbonsai
import pytest
from fedbonsai.runtime.events import Evaluated, VersionClosed

# Of five devices one is too slow for the deadline: its plan is late, and the third version, in which only this device would
# have a plan, may close without any training.
LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**8, "down_bytes_per_s": 10**8}
FLEET = {
    "classes": [
        {"name": "quick", "count": 4, "flop_per_s": 1e9} | LINK,
        {"name": "slow", "count": 1, "flop_per_s": 1e6} | LINK,
    ]
}
BASE = {
    "backend": "inline",
    "seed": 3,
    "fleet": FLEET,
    "data": {"partition": {"name": "dirichlet", "alpha": 1.0}, "test_share": 0.2, "public_share": 0.1},
    "training": {"batch_size": 16, "epochs": 1},
    "stop": {"rounds": 5},
}
LATE = {"policy": [{"name": "random", "cohort": 3}, {"name": "closing", "after_s": 2.0}, {"name": "residuals"}]}
OF_TRAINING = ("weights", "agreed", "control", "activations", "gradients", "resync")


def finished(**changes):
    run = fedbonsai.run(BASE | changes)
    events = list(run)
    return run.summary, events


def trained(summary):
    """The figures that evaluation must not change."""
    kinds = {way: {k: v for k, v in summary[f"{way}_by_kind"].items() if k in OF_TRAINING} for way in ("up", "down")}
    return summary["model_hash"], kinds, summary["virtual_s"], summary["outcomes"], summary["resyncs"]


@pytest.mark.parametrize(
    "method",
    [
        {},
        LATE,
        {"preset": "fedbuff"},
        {"preset": "splitfed", "stop": {"rounds": 2}},
        {"preset": "ecofed", "stop": {"rounds": 2}},
    ],
    ids=["fedavg", "resfed-late", "fedbuff", "splitfed", "ecofed"],
)
def test_on_the_server_on_devices_on_both_or_nowhere_the_run_is_the_same(method):
    without, _ = finished(**method, evaluation={"where": "none"})
    for evaluation in ({"where": "devices"}, {"where": "both", "every": 2}):
        summary, events = finished(**method, evaluation=evaluation)
        assert trained(summary) == trained(without), evaluation
        assert [event for event in events if isinstance(event, Evaluated)]
    if method is LATE:  # else this is not the case that the test is for
        assert without["outcomes"]["late"] > 0


def test_links_beyond_their_budget_are_spilled_in_the_same_way_with_evaluation():
    tight = {"preset": "resfed", "server": {"link_memory_bytes": 300_000, "link_disk_bytes": 700_000}}
    without, _ = finished(**tight, evaluation={"where": "none"})
    assert any("was dropped" in notice for notice in without["notices"])
    assert trained(finished(**tight, evaluation={"where": "devices"})[0]) == trained(without)


def test_behind_downlinks_with_memory_devices_evaluate_what_they_hold_without_a_byte_of_weights():
    summary, events = finished(preset="resfed", evaluation={"where": "devices"}, stop={"rounds": 2})
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    folded = [event.folded for event in events if isinstance(event, VersionClosed)]
    assert evaluated[0].num_devices == folded[0] > 0  # those that have taken part hold a model
    # A plan is some 100 bytes, a model 153 kB.
    assert summary["down_by_kind"]["evaluation"] < 300 * sum(event.num_devices for event in evaluated)
    plain, _ = finished(evaluation={"where": "devices"}, stop={"rounds": 2})
    assert plain["down_by_kind"]["evaluation"] > 153_000 * 5 * 2


COUNTING = """
import torch
from torch import nn

class Counting(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.out = nn.Linear(4, num_classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("drift", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        self.drift.add_(0.5)
        return self.out(x)
"""


def test_a_model_that_counts_its_calls_is_not_changed_by_evaluation(tmp_path, monkeypatch):
    (tmp_path / "counting_model.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(str(tmp_path))
    shape = {"shape": [4], "classes": 3, "samples_per_device": 12, "test_samples": 9}
    config = {
        "model": {"name": "counting_model:Counting"},
        "data": {"name": "synthetic", "kwargs": shape, "test_share": 0.25},
        "stop": {"rounds": 2},
    }
    without, _ = finished(**config, evaluation={"where": "none"})
    for where in ("server", "devices", "both"):
        assert trained(finished(**config, evaluation={"where": where})[0]) == trained(without), where
