"""Split training by local losses, whole runs: no device waits, no gradient is sent, heads are averaged and sent again."""

import fedbonsai
import pytest
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import PlanEnded

from .processes import killed_in_mid_stream
from .test_ecofed import BASE, LINK

HEAD = 4 * (10 * 512 + 10)  # bytes of the head behind features.2
FRONT = 4 * (16 * 9 + 16 + 32 * 16 * 9 + 32)  # and of the blocks up to that cut


def local_loss(**fields):
    return {"policy": [{"name": "random", "cohort": 1.0}, {"name": "local_loss", "cut": "features.2"} | fields]}


def finished(**changes):
    run = fedbonsai.run(BASE | changes)
    ended = [event.report for event in run if isinstance(event, PlanEnded)]
    assert [report.error for report in ended if report.error] == []
    return run.summary, ended


def test_its_bytes_are_those_of_the_formula():
    """2 (|Wd| + |Waux|) weights and E n A activations, 4 bytes each; also labels, plans and reports (EcoFed's cost model)."""
    summary, ended = finished(stop={"rounds": 1}, **local_loss())
    samples, batches = sum(report.samples for report in ended), sum(report.steps for report in ended)
    assert set(summary["up_by_kind"]) == {"activations", "control", "host", "weights"}
    assert set(summary["down_by_kind"]) == {"control", "host", "weights"}
    payload = samples * (4 * 512 + 1)
    assert payload + 64 * batches >= summary["up_by_kind"]["activations"] >= payload + 56 * batches
    for travelled in (summary["up_by_kind"]["weights"], summary["down_by_kind"]["weights"]):
        assert 4 * (HEAD + FRONT) < travelled < 4 * (HEAD + FRONT + 100)
    assert sum(report.virtual.up_bytes for report in ended) == summary["up_bytes"] - summary["up_by_kind"]["control"]


def test_it_learns_also_with_coded_activations():
    common = {"evaluation": {"where": "server"}, "stop": {"rounds": 3}, "training": {"batch_size": 16, "epochs": 2}}
    plain, _ = finished(**common, **local_loss())
    coded, _ = finished(**common, **local_loss(bits=8))
    assert plain["accuracy"] > 0.85
    assert coded["accuracy"] > 0.85
    # at most 8 bits in place of 32
    assert coded["up_by_kind"]["activations"] < plain["up_by_kind"]["activations"] / 3


def test_mistakes_are_refused_with_the_allowed_values():
    with pytest.raises(
        ConfigError, match=r"policy\[1\] \(local_loss\) cuts behind 'nowhere'; the clean cuts are: features.0"
    ):
        finished(**local_loss(cut="nowhere"))
    with pytest.raises(ConfigError, match="bits is 1; it must be 0 or between 2 and 8"):
        finished(**local_loss(bits=1))
    fleet = {"classes": [{"name": "shy", "flop_per_s": 1e9, "may_send": ["weights", "statistics"]} | LINK]}
    with pytest.raises(ConfigError, match=r"fleet class 'shy' may send only statistics, weights; policy.* activations"):
        finished(preset="local_loss", fleet=fleet)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("window", "victims", "epochs"), [(8, [], 1), pytest.param(3, ["PartitionHostActor"], 2, marks=pytest.mark.soak)]
)
def test_on_ray_the_run_is_the_same_at_any_window_also_when_a_host_is_killed_during_a_stream(window, victims, epochs):
    """In process every packet is processed when it is sent, for any window: only on Ray are several in flight."""
    changes = {"training": {"batch_size": 4, "epochs": epochs}, "stop": {"rounds": 1 + len(victims)}}
    changes |= local_loss(window=window)
    expected, _ = finished(**changes)
    summary = killed_in_mid_stream(BASE | changes, *victims)
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes")
    assert {key: summary[key] for key in same} == {key: expected[key] for key in same}
