"""Cuts chosen for each device, whole runs: the cuts by the real cost model, and that they change no bit."""

from collections import Counter

import fedbonsai
import pytest
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.view import View
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.resolution import DefaultPlan, workload_settings
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import PlanEnded
from fedbonsai.runtime.simulation.costs import Costs

SLOW_LINK = {"up_bytes_per_s": "2 Mbit/s", "down_bytes_per_s": "2 Mbit/s"}
FAST_LINK = {"up_bytes_per_s": "900 Mbit/s", "down_bytes_per_s": "900 Mbit/s"}
UNLIKE = {
    "classes": [
        {"name": "fast", "flop_per_s": "16 GFLOP/s", "memory_bytes": "1 GB"} | SLOW_LINK,
        {"name": "slow", "flop_per_s": "20 MFLOP/s", "memory_bytes": "1 GB"} | FAST_LINK,
    ],
    "hosts": {"count": 2},
}
BASE = {"backend": "inline", "seed": 5, "evaluation": {"where": "none"}, "stop": {"rounds": 2}}


def finished(*, by=None, cohort=1.0, **changes):
    """The model, the bytes, and the number of plans of each class at each cut."""
    policy = [{"name": "random", "cohort": cohort}, *([by] if by else [])]
    run = fedbonsai.run(BASE | {"policy": policy} | changes)
    cuts, uploads = Counter(), 0
    for event in run:
        if isinstance(event, PlanEnded):
            report = event.report
            assert not report.error
            split = report.plan.split
            cuts[event.fleet_class, split.cut if split else "whole"] += 1
            uploads += split is not None and split.view is None
    return run.summary, cuts, uploads


def test_a_fast_device_on_a_slow_link_and_a_slow_one_on_a_fast_link_have_different_cuts():
    _, cuts, _ = finished(by={"name": "splitfed", "cut": "auto"}, fleet=UNLIKE)
    assert set(cuts) == {("fast", "classifier.0"), ("slow", "features.0")}
    _, cuts, _ = finished(by={"name": "splitfed", "cut": "auto", "first": "features.2"}, fleet=UNLIKE)
    assert set(cuts) == {("fast", "classifier.0"), ("slow", "features.2")}
    _, cuts, _ = finished(by={"name": "splitfed", "cut": "auto", "whole": True}, fleet=UNLIKE)
    assert set(cuts) == {("fast", "whole"), ("slow", "features.0")}


def test_over_the_laptops_fleet_the_model_is_that_of_fedavg_bit_for_bit():
    expected, _, _ = finished(fleet="laptop")
    found, cuts, _ = finished(by={"name": "splitfed", "cut": "auto"}, fleet="laptop")
    assert found["model_hash"] == expected["model_hash"]
    assert len({cut for _, cut in cuts}) > 1


@pytest.mark.parametrize("whole_models", [False, True])
def test_the_same_holds_where_cuts_differ_most(whole_models):
    # One device a round: updates that arrive in another order would be summed in another.
    changes = {"cohort": 1, "fleet": UNLIKE, "stop": {"rounds": 5}}
    expected, _, _ = finished(**changes)
    found, cuts, _ = finished(by={"name": "splitfed", "cut": "auto", "whole": whole_models}, **changes)
    assert found["model_hash"] == expected["model_hash"]
    assert set(cuts) == {("fast", "whole" if whole_models else "classifier.0"), ("slow", "features.0")}


@pytest.mark.parametrize("fixed", ["features.0", "features.2", "classifier.0"])
def test_the_cut_of_a_frozen_trunk_changes_no_bit(fixed):
    trunk = {"name": "ecofed", "depth": "classifier.0", "bits": 0, "period": 1}
    changes = {"cohort": 1, "fleet": UNLIKE, "stop": {"rounds": 5}}
    expected, _, _ = finished(by=trunk | {"cut": fixed}, **changes)
    found, cuts, _ = finished(by=trunk | {"cut": "auto"}, **changes)
    assert found["model_hash"] == expected["model_hash"]
    assert set(cuts) == {("fast", "classifier.0"), ("slow", "features.0")}


def test_local_losses_are_cut_where_each_device_is_fastest():
    _, cuts, _ = finished(by={"name": "local_loss", "cut": "auto"}, fleet=UNLIKE)
    assert cuts["slow", "features.0"] == 2
    assert len(cuts) == 2
    assert "fast" in {kind for kind, cut in cuts if cut != "features.0"}


def test_views_of_different_cuts_are_replayed():
    trunk = {"name": "ecofed", "depth": "classifier.0", "cut": "auto", "period": 3}
    summary, cuts, uploads = finished(by=trunk, fleet=UNLIKE, stop={"rounds": 6})
    assert cuts == {("fast", "classifier.0"): 6, ("slow", "features.0"): 6}
    assert uploads == 4
    assert summary["outcomes"]["done"] == 12


def test_a_device_without_the_memory_for_the_whole_model_is_not_left_out():
    small = {"classes": [kind | {"memory_bytes": "400 kB"} for kind in UNLIKE["classes"]]}
    with pytest.raises(RunError, match=r"memory \(device 0: needs 1\.\d+ MB"):
        finished(fleet=small)
    _, cuts, _ = finished(by={"name": "splitfed", "cut": "auto"}, fleet=small)
    assert {cut for _, cut in cuts} == {"features.0"}
    tiny = {"classes": [kind | {"memory_bytes": "2 kB"} for kind in UNLIKE["classes"]]}
    with pytest.raises(RunError, match=r"memory \(device 0: needs at least 0\.\d+ MB, has 0\.002 MB"):
        finished(by={"name": "splitfed", "cut": "auto"}, fleet=tiny)


def test_uploads_by_views_send_as_many_bytes_as_by_period():
    changes = {"fleet": "laptop", "stop": {"rounds": 4}}
    by_period, _, uploads = finished(by={"name": "ecofed"}, **changes)
    by_views, _, others = finished(by={"name": "ecofed", "uploads": "views", "refresh": 2}, **changes)
    assert (uploads, others) == (16, 16)
    assert by_views["up_by_kind"]["activations"] == pytest.approx(by_period["up_by_kind"]["activations"], rel=0.05)
    once, _, uploads = finished(by={"name": "ecofed", "uploads": "views"}, **changes)
    assert uploads == 8
    assert once["outcomes"]["done"] == 32


def test_a_view_that_was_evicted_is_uploaded_again():
    by = {"name": "ecofed", "uploads": "views"}
    summary, _, uploads = finished(
        by=by, fleet="laptop", stop={"rounds": 3}, replay={"memory_bytes": 300_000, "disk_bytes": 0}
    )
    assert uploads > 8
    assert summary["outcomes"]["done"] == 24


@pytest.mark.parametrize(
    ("by", "sentence"),
    [
        ({"name": "splitfed", "cut": "auto", "first": "x"}, r"policy\[1\] \(splitfed\) cuts behind 'x'; the clean cuts are"),
        ({"name": "ecofed", "cut": "auto", "depth": "x"}, r"policy\[1\] \(ecofed\) cuts behind 'x'; the clean cuts are"),
        ({"name": "splitfed", "cut": "features.0", "first": "features.2"},
         r"cuts behind 'features\.0', which must be 'features\.2' or a block behind it"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_one_sentence(by, sentence):
    with pytest.raises(ConfigError, match=sentence):
        finished(by=by)


def test_on_vgg_the_cost_model_cuts_different_devices_at_different_blocks():
    config = load_config(
        {
            "model": "vgg11_bn",
            "data": {"name": "synthetic", "kwargs": {"shape": [3, 32, 32], "classes": 10, "samples_per_device": 20}},
            "fleet": UNLIKE,
            "training": {"batch_size": 10},
        }
    )
    fleet = config.load_fleet()
    workload = Workload(workload_settings(config, num_devices=2))
    new_plan = DefaultPlan.of(config, workload, config.load_fleet().profiles())
    view = View(
        time_s=0.0,
        version=0,
        seed=0,
        profiles=fleet.profiles(),
        samples=[20, 20],
        hosts=2,
        plan_maker=lambda device: new_plan(device, 0, 0),
        estimator=Costs(workload, fleet).estimate,
    )
    start = Decision(plans=tuple(view.new_plan(device) for device in (0, 1)))
    names = workload.spec.block_names
    for policy in (SplitFed(cut="auto"), EcoFed(cut="auto", depth="features.11", bits=8)):
        fast, slow = policy.decide(view, None, start)[0].plans
        assert names.index(fast.split.cut) > names.index(slow.split.cut)
        assert slow.split.cut == "features.0"
