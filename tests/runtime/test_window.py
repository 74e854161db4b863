"""Windows of split training with gradients, whole runs: less time, more memory, and a notice that the model differs."""

import fedbonsai
import pytest
from fedbonsai.runtime.events import Notice, PlanEnded

from .processes import killed_in_mid_stream
from .test_split_run import BASE


def cut_with(window, **changes):
    return BASE | {"policy": ["all", {"name": "splitfed", "window": window}], "stop": {"rounds": 1}} | changes


def finished(config):
    """The summary, the reports, and the notices."""
    run = fedbonsai.run(config)
    events = list(run)
    reports = [event.report for event in events if isinstance(event, PlanEnded)]
    assert [report.error for report in reports if report.error] == []
    return run.summary, reports, [event.text for event in events if isinstance(event, Notice)]


@pytest.fixture(name="found", scope="module")
def found_fixture():
    return {window: finished(cut_with(window)) for window in (1, 2, 4)}


def test_a_larger_window_takes_less_time_and_more_memory_for_the_same_bytes(found):
    seconds = [[report.virtual.seconds for report in found[window][1]] for window in (1, 2, 4)]
    # Not faster than the device computes; 4 is not faster than 2 if the device never waits with 2.
    for first, second, third in zip(*seconds, strict=True):
        assert third <= second < first
    for report in found[4][1]:
        assert report.virtual.seconds >= report.virtual.compute_s
    memory = [found[window][1][0].virtual.peak_memory_bytes for window in (1, 2, 4)]
    assert memory[0] < memory[1] < memory[2]
    sizes = [{key: found[window][0][key] for key in ("up_by_kind", "down_by_kind")} for window in (1, 2, 4)]
    for kind, name in (("up_by_kind", "activations"), ("down_by_kind", "gradients")):
        assert len({size[kind][name] for size in sizes}) == 1


def test_the_model_differs_and_a_notice_says_so(found):
    fedavg = fedbonsai.run(BASE | {"stop": {"rounds": 1}})
    list(fedavg)
    hashes = [found[window][0]["model_hash"] for window in (1, 2, 4)]
    assert hashes[0] == fedavg.summary["model_hash"]
    assert len(set(hashes)) == 3
    assert not any("late" in text for text in found[1][2])
    told = "splitfed has window {}: gradients come up to {} late, and the model is not that of FedAvg"
    assert told.format(2, "1 micro-batch") in found[2][2]
    assert told.format(4, "3 micro-batches") in found[4][2]


def test_it_still_learns():
    config = cut_with(3, stop={"rounds": 4}, evaluation={"where": "server"}, training={"batch_size": 16})
    assert finished(config)[0]["accuracy"] > 0.9


@pytest.mark.soak
@pytest.mark.usefixtures("cluster")
def test_on_ray_the_run_is_the_same_also_when_a_host_is_killed():
    config = cut_with(3, training={"batch_size": 4, "epochs": 2}, stop={"rounds": 2})
    expected, _, _ = finished(config)
    summary = killed_in_mid_stream(config, "PartitionHostActor")
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes")
    assert {key: summary[key] for key in same} == {key: expected[key] for key in same}
