"""Runs with parts of different widths on the bundled digits: what they are charged, and what they may not change."""

import statistics

import fedbonsai
import pytest
from fedbonsai.actors.messages.messages import array_specs
from fedbonsai.comms.codec import IdentityCodec
from fedbonsai.comms.packet import sealed_bytes
from fedbonsai.learning.workload import Workload
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.policy_checks import configured_policy
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.events import Evaluated, PlanEnded, RoundStarted, VersionClosed

from .resuming import started, told, uninterrupted

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**8, "down_bytes_per_s": 10**8}
BASE = {
    "backend": "inline",
    "seed": 5,
    "fleet": {"classes": [{"name": f"c{i}", "flop_per_s": 1e9 / 2**i} | LINK for i in range(5)]},
    "training": {"steps": 2, "batch_size": 16},
    "evaluation": {"every": 3},
    "checkpoint": {"share": None},
    "stop": {"rounds": 3},
}
WIDTH = {"name": "width", "levels": [1.0, 0.5, 0.25], "unit": "width", "min_channels": 2, "warm_up": 1, "refresh": 1}
RANKED = BASE | {"policy": [{"name": "all"}, WIDTH]}


def finished(config, **more):
    run = fedbonsai.run(config, **more)
    return run, list(run)


def reports_of(events):
    return [event.report for event in events if isinstance(event, PlanEnded)]


def test_a_device_that_is_sixteen_times_slower_finishes_with_the_others():
    """By the rule of the preset ``reft``, but for distillation: the seconds of the fleet's median device."""
    slow = [{"name": "slow", "flop_per_s": 1e9 / 16} | LINK]
    fleet = {"classes": [{"name": "fast", "count": 4, "flop_per_s": 1e9} | LINK, *slow]}
    select, width = fedbonsai.load_config(preset="reft").policy[:2]
    policy = [select, width]
    config = BASE | {"fleet": fleet, "training": {"epochs": 1}, "policy": policy, "stop": {"rounds": 2}}
    _, events = finished(config)
    seconds = {}
    for report in reports_of(events):
        assert report.outcome.value == "done"
        seconds.setdefault(report.plan.device, []).append(report.virtual.seconds)
    median = statistics.median(max(times) for times in seconds.values())
    assert max(seconds[4]) <= 1.3 * median
    assert max(seconds[4]) > 0.3 * median
    assert {report.plan.part.width for report in reports_of(events) if report.plan.device < 4} == {1.0}
    whole = [
        report for report in reports_of(finished(config | {"policy": [{"name": "all"}]})[1]) if report.plan.device == 4
    ]
    assert min(report.virtual.seconds for report in whole) > 8 * median


def test_a_device_that_no_level_fits_in_time_makes_the_steps_that_there_is_time_for():
    """Of equal speed but for one, which has the time for some steps at the narrowest level, and one without that for any."""
    speeds = {"fast": 1e9, "slow": 2e7, "still": 2e5}
    fleet = {"classes": [{"name": name, "count": 3 if name == "fast" else 1, "flop_per_s": speed} | LINK
                         for name, speed in speeds.items()]}  # fmt: skip
    config = BASE | {"fleet": fleet, "training": {"epochs": 1, "batch_size": 16}, "stop": {"rounds": 2}}
    width = {"name": "width", "levels": [1.0, 0.5], "unit": "width"}
    _, events = finished(config | {"policy": [{"name": "all"}, width | {"too_slow": "fewer_steps"}]})
    reports = reports_of(events)
    assert {(report.plan.device, report.outcome.value) for report in reports} == {
        (device, "done") for device in range(4)
    }
    deadline = statistics.median(report.virtual.seconds for report in reports if report.plan.device < 3)
    for report in reports:
        stops = report.plan.device == 3
        assert report.plan.part.width == (0.5 if stops else 1.0)
        assert report.virtual.seconds <= 1.001 * deadline
        assert (0 < report.steps < report.plan.whole_steps) if stops else not report.plan.whole_steps
    assert [dict(event.left_out) for event in events if isinstance(event, RoundStarted)] == [{"deadline": 1}] * 2
    _, without = finished(config | {"policy": [{"name": "all"}, width]})
    assert {report.plan.device for report in reports_of(without)} == {0, 1, 2}


def test_each_device_is_sent_its_own_part_and_each_map_once():
    run, events = finished(RANKED | {"stop": {"rounds": 4}})
    config = load_config(RANKED)
    workload = Workload(workload_settings(config, num_devices=5))
    reports, maps = reports_of(events), set()
    map_bytes = 0
    for report in sorted(reports, key=lambda report: report.plan.version):
        plan = report.plan
        submodel = workload.submodel(plan.part.shape)
        expected = sealed_bytes(IdentityCodec(), array_specs(submodel.down))[0]
        floats = sum(spec.items for spec in submodel.down)
        assert 4 * floats < expected < 4 * floats + 200
        index_map = plan.device, plan.part.index_map
        if index_map[1] and index_map not in maps:
            maps.add(index_map)
            extra = report.virtual.down_bytes - expected
            assert 0 < extra < 200
            map_bytes += extra
        else:
            assert report.virtual.down_bytes == expected
        up = sum(spec.items for spec in submodel.up(statistics=True))
        assert 4 * up < report.virtual.up_bytes < 4 * up + 200
    assert {report.plan.part.width for report in reports} == {1.0, 0.5, 0.25}
    assert {device for device, _ in maps} == {3, 4}
    assert len(maps) > 2  # the ranking changes
    kinds = run.summary["down_by_kind"]
    assert kinds["map"] == map_bytes
    assert kinds["map"] + kinds["weights"] == sum(report.virtual.down_bytes for report in reports)
    assert run.summary["up_by_kind"]["weights"] == sum(report.virtual.up_bytes for report in reports)


def test_the_estimate_of_a_narrow_plan_is_what_is_charged():
    """To the bit, its map included: the first plan of a turn needs it, the second does not."""
    estimates = {}

    class Estimated:
        """The chain, and what its plans are estimated at."""

        def __init__(self, inner):
            self.inner = inner
            self.writes, self.needs = ("plans", "part"), {}

        def init(self):
            return self.inner.init()

        def decide(self, view, state, decision):
            decided, state = self.inner.decide(view, state, decision)
            for plan in decided.plans:
                estimates[plan.version, plan.device] = view.estimate(plan.device, plan)
            return decided, state

    config = load_config(RANKED | {"policy": [{"name": "all"}, WIDTH | {"refresh": 2}], "stop": {"rounds": 5}})
    engine = Engine(config, Estimated(configured_policy(config)))
    reports = reports_of(list(engine.events()))
    assert len(reports) == len(estimates) == 25
    for report in reports:
        assert report.virtual == estimates[report.plan.version, report.plan.device]


def test_the_whole_width_for_everyone_is_fedavg():
    plain = finished(BASE | {"policy": [{"name": "all"}]})[0].summary["model_hash"]
    for width in (
        {"rule": "deadline", "deadline_s": 1e9},
        {"rule": "fixed", "widths": {f"c{i}": 1.0 for i in range(5)}, "scaled": True},
        {"rule": "linear", "most_pruned": 0.0, "levels": [1.0], "unit": "width", "channels": "rolling", "refresh": 1},
    ):
        run, events = finished(BASE | {"policy": [{"name": "all"}, {"name": "width"} | width]})
        assert {report.plan.part.width for report in reports_of(events)} == {1.0}
        assert run.summary["model_hash"] == plain
    assert finished(RANKED)[0].summary["model_hash"] != plain


@pytest.mark.parametrize("channels", ["l1", "batchnorm", "rolling", "prefix"])
def test_the_same_seed_gives_the_same_model(channels):
    config = BASE | {"policy": [{"name": "all"}, WIDTH | {"channels": channels}]}
    assert len({finished(config)[0].summary["model_hash"] for _ in range(2)}) == 1


def test_a_run_with_maps_in_flight_is_resumed_to_the_same_bits(tmp_path):
    """Devices are busy over the close of versions, so that maps are held, and in flight, when a checkpoint is taken."""
    config = RANKED | {
        "policy": [{"name": "asynchronous", "buffer": 2, "concurrency": 1.0}, WIDTH | {"refresh": 2}],
        "server": {"staleness": {"rule": "polynomial"}},
        "stop": {"rounds": 8},
    }
    expected = uninterrupted(config, tmp_path / "whole")
    assert expected["down_by_kind"]["map"] > 0
    run = started(config, tmp_path / "cut", stops=4)
    assert run.summary["status"] == "interrupted"
    resumed = fedbonsai.run(config, resume=tmp_path / "cut")
    list(resumed)
    assert told(resumed.summary) == told(expected)


def test_devices_that_evaluate_the_model_of_their_link_get_their_map():
    """A worker that keeps nothing, as on another node: it is given the map that its device holds."""
    config = load_config(
        RANKED
        | {
            "policy": [{"name": "all"}, WIDTH, {"name": "residuals", "up": "none"}],
            "data": {"test_share": 0.2},
            "evaluation": {"where": "devices", "every": 1},
            "stop": {"rounds": 3},
        }
    )
    engine = Engine(config, configured_policy(config))
    events = []
    for event in engine.events():
        events.append(event)
        if isinstance(event, VersionClosed):
            held = engine.pool._device._maps  # its worker forgets
            for name in list(held._names):
                del held._names[name]
                held._workload.drop_map(name)
    evaluations = [event for event in events if isinstance(event, Evaluated) and event.version]
    assert [(each.num_devices, each.num_failed) for each in evaluations] == [(5, 0)] * 3
