"""Plans that are lost under the virtual clock, by hand: time, stage, charges, and the links and hosts that become free."""

from dataclasses import dataclass, field

import pytest
from fedbonsai.actors.pool import StreamBytes, Task
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.plan import Split
from fedbonsai.policies.report import Outcome
from fedbonsai.runtime.simulation.disruptions import NO_DISRUPTION, Disruption
from fedbonsai.runtime.simulation.stream_load import Work
from fedbonsai.runtime.simulation.virtual_clock import VirtualClock

# In each direction 1 s of latency and 100 bytes at 100 B/s; between them 20 FLOP at 10 FLOP/s: down until 2, compute until 4,
# up until 6.
PLAN = {"flops": 20, "up": 100, "down": 100}
STREAM = Work(samples=(1, 1), forward_flops=10, flops=20, host_flops=50, answers=True)


@pytest.fixture(name="bench")
def bench_fixture(make_plan, make_fleet, scripted_pool):
    """A clock over devices of 10 FLOP/s with these disruptions by plan: ``dispatch(plan id, device, ...)``, ``lost()``."""

    class Pool(scripted_pool):
        streams: dict[int, StreamBytes]

        def result(self, plan_id):
            found = super().result(plan_id)
            object.__setattr__(found, "stream", self.streams.get(plan_id, StreamBytes()))
            return found

    @dataclass
    class Bench:
        disruptions: dict = field(default_factory=dict)
        extras: dict = field(default_factory=dict)
        devices: int = 1

        def __post_init__(self):
            self.pool = Pool({})
            self.pool.streams = {}
            fleet = make_fleet(*[10] * self.devices, **({"latency_s": 1} | self.extras))
            self.clock = VirtualClock(
                fleet, self.pool, disruption=lambda plan: self.disruptions.get(plan.id, NO_DISRUPTION)
            )

        def dispatch(self, plan_id, device=0, *, flops=0, up=0, down=0, work=None, stream=None):
            view = "7" if work is not None and work.replay else None
            split = None if work is None else Split(cut="all", mode="splitfed", view=view)
            plan = make_plan(plan_id, device, split=split)
            self.pool.sizes[plan_id] = up
            if stream:
                self.pool.streams[plan_id] = StreamBytes(*stream)
            wanted = self.clock.dispatch(plan, down_bytes=down, flops=flops, peak_memory_bytes=5, work=work)
            if wanted:
                self.pool.submit(Task(plan=plan, packets=()))
            return wanted

        def arrivals(self):
            found = {}
            while (arrival := self.clock.next(None)) is not None:
                found[arrival.finished.plan.id] = arrival
            return found

    return lambda disruptions=None, *, devices=1, **extras: Bench(disruptions or {}, extras, devices)


def end_of(arrival):
    report = arrival.finished.report
    return arrival.time_s, report.outcome.value, report.stage


@pytest.mark.parametrize(
    ("disruption", "end", "charged", "worked"),
    [
        (Disruption(lost_in="down", share=0.5), (1.5, "down"), {"down_s": 1.5, "down_bytes": 50}, []),
        (
            Disruption(lost_in="train", share=0.25),
            (2.5, "train"),
            {"down_s": 2.0, "down_bytes": 100, "compute_s": 0.5, "flops": 5},
            [],
        ),
        (
            Disruption(lost_in="up", share=0.75),
            (5.75, "up"),
            {"down_s": 2.0, "down_bytes": 100, "compute_s": 2.0, "flops": 20, "up_s": 1.75, "up_bytes": 75},
            [1],
        ),
    ],
    ids=["before", "during", "after"],
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_plan_that_drops_out_before_during_and_after_training(bench, disruption, end, charged, worked, shared):
    extras = {"server": {"up_bytes_per_s": 1000, "down_bytes_per_s": 1000}} if shared else {}
    one = bench({1: disruption}, **extras)
    assert one.dispatch(1, **PLAN) == bool(worked)
    arrival = one.arrivals()[1]
    assert end_of(arrival) == (end[0], "lost", end[1])
    assert arrival.virtual == Estimate(seconds=end[0], peak_memory_bytes=5, **charged)
    assert arrival.lost_up_bytes == charged.get("up_bytes", 0)
    assert (arrival.finished.update, arrival.finished.state) == (None, None)
    assert one.pool.asked == worked  # a plan whose result is not needed is not computed


@pytest.mark.parametrize(
    ("leaves_s", "stage", "charged"),
    [
        (0.5, "down", {"down_s": 0.5}),
        (1.25, "down", {"down_s": 1.25, "down_bytes": 25}),
        (3.0, "train", {"down_s": 2.0, "down_bytes": 100, "compute_s": 1.0, "flops": 10}),
        (
            5.5,
            "up",
            {"down_s": 2.0, "down_bytes": 100, "compute_s": 2.0, "flops": 20, "up_s": 1.5, "up_bytes": 50},
        ),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_device_that_leaves_in_any_stage(bench, leaves_s, stage, charged, shared):
    extras = {"server": {"up_bytes_per_s": 1000, "down_bytes_per_s": 1000}} if shared else {}
    one = bench(availability={"leaves_s": leaves_s}, **extras)
    one.dispatch(1, **PLAN)
    arrival = one.arrivals()[1]
    assert end_of(arrival) == (leaves_s, "lost", stage)
    assert arrival.virtual == Estimate(seconds=leaves_s, peak_memory_bytes=5, **charged)
    assert one.pool.asked + one.pool.cancelled == [1]
    assert "cannot be reached any more" in arrival.finished.report.error


def test_a_plan_that_ends_when_its_device_leaves_has_ended(bench):
    one = bench(availability={"leaves_s": 6})
    one.dispatch(1, **PLAN)
    assert end_of(one.arrivals()[1]) == (6.0, "done", "")


def test_the_server_declares_a_plan_lost_after_a_configured_time(bench):
    one = bench({1: Disruption(lost_in="train", share=0.25)}, server={"lost_after_s": 30})
    one.dispatch(1, **PLAN)
    assert one.clock.next(10.0) is None
    arrival = one.clock.next(None)
    assert end_of(arrival) == (32.5, "lost", "train")
    assert arrival.virtual.seconds == 2.5  # of the device


def test_a_plan_for_an_unreachable_device_is_lost_at_once(bench):
    one = bench(availability={"joins_s": 5}, server={"lost_after_s": 30})
    assert not one.dispatch(1, **PLAN)
    arrival = one.arrivals()[1]
    assert end_of(arrival) == (0.0, "lost", "down")
    assert arrival.virtual == Estimate(peak_memory_bytes=5)
    assert one.clock.unreachable() == {0}
    assert one.clock.next_reachable_s([0]) == 5.0
    one.clock.wait(5.0)
    assert one.clock.unreachable() == frozenset()
    assert one.dispatch(2, **PLAN)
    assert end_of(one.arrivals()[2]) == (11.0, "done", "")


def test_a_lost_upload_frees_the_shared_link(bench):
    # Both upload 100 bytes at 50 B/s each; the second is lost after a quarter of its bytes, at 0.5 s; the first has 75
    # bytes left, now at 100 B/s.
    two = bench({2: Disruption(lost_in="up", share=0.25)}, devices=2, latency_s=0, server={"up_bytes_per_s": 100})
    two.dispatch(1, 0, up=100)
    two.dispatch(2, 1, up=100)
    found = two.arrivals()
    assert end_of(found[2]) == (0.5, "lost", "up")
    assert end_of(found[1]) == (1.25, "done", "")


def test_a_device_that_leaves_frees_the_shared_link_too(bench):
    two = bench(devices=2, latency_s=0, server={"up_bytes_per_s": 100}, availability={"trace": [[0, 0, 99], [1, 0, 1]]})
    two.dispatch(1, 0, up=100)
    two.dispatch(2, 1, up=100)
    found = two.arrivals()
    assert (*end_of(found[2]), found[2].virtual.up_bytes) == (1.0, "lost", "up", 50)
    assert end_of(found[1]) == (1.5, "done", "")


# No latency, nothing down or up: forward 1 s, 100 bytes in 1 s, host 0.5 s, answer of 50 bytes 0.5 s, backward 1 s; twice.
SPLIT = {"work": STREAM, "stream": ((100, 100), (50, 50)), "up": 0}


def test_a_stream_that_is_lost_after_half_of_its_packets(bench):
    one = bench({1: Disruption(lost_in="train", share=0.5)}, latency_s=0, hosts={"flop_per_s": 100})
    assert one.dispatch(1, **SPLIT)  # the sizes of its packets come from the real work
    arrival = one.arrivals()[1]
    assert end_of(arrival) == (4.0, "lost", "stream")
    assert arrival.finished.stream == StreamBytes((100,), (50,))
    virtual = arrival.virtual
    assert (virtual.up_bytes, virtual.down_bytes, virtual.flops, virtual.host_flops) == (100, 50, 20, 50)
    assert (virtual.compute_s, virtual.stream_s, virtual.seconds) == (2.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("leaves_s", "stream", "flops", "host_flops"),
    [
        (1.5, ((), ()), 0, 0),
        (2.25, ((100,), ()), 10, 0),
        (2.75, ((100,), (50,)), 20, 50),
        (6.75, ((100, 100), (50, 50)), 40, 100),
    ],
)
def test_a_device_that_leaves_during_a_stream(bench, leaves_s, stream, flops, host_flops):
    one = bench(latency_s=0, hosts={"flop_per_s": 100}, availability={"leaves_s": leaves_s})
    one.dispatch(1, **SPLIT)
    arrival = one.arrivals()[1]
    assert end_of(arrival) == (leaves_s, "lost", "stream")
    assert arrival.finished.stream == StreamBytes(*stream)
    assert (arrival.virtual.flops, arrival.virtual.host_flops) == (flops, host_flops)
    assert arrival.virtual.seconds == leaves_s


def test_the_host_of_a_lost_stream_is_free_for_others(bench):
    # Both packets are at the host at 2, which needs 5 s for each: plan 1's until 7, but its device leaves at 3.
    slow = Work(samples=(1,), forward_flops=10, flops=10, host_flops=50, answers=False)
    two = bench(devices=2, latency_s=0, hosts={"flop_per_s": 10}, availability={"trace": [[0, 0, 3], [1, 0, 99]]})
    two.dispatch(1, 0, work=slow, stream=((100,), ()))
    two.dispatch(2, 1, work=slow, stream=((100,), ()))
    found = two.arrivals()
    assert end_of(found[1]) == (3.0, "lost", "stream")
    assert end_of(found[2]) == (8.0, "done", "")


def test_without_an_upload_the_report_is_lost(bench):
    one = bench({1: Disruption(lost_in="up", share=0.5)})
    one.dispatch(1, flops=20, up=None, down=100)
    arrival = one.arrivals()[1]
    assert end_of(arrival) == (4.0, "lost", "up")
    assert arrival.virtual.flops == 20


def test_a_replay_needs_no_device(bench):
    # Its device may be absent or disrupted: the host trains on the view that it has, 0.5 s for each packet.
    one = bench({1: Disruption(lost_in="down", share=0.5)}, hosts={"flop_per_s": 100}, availability={"joins_s": 99})
    replay = Work(samples=(1, 1), forward_flops=0, flops=0, host_flops=50, answers=False, replay=True)
    assert one.dispatch(1, up=0, work=replay)
    (time_s, outcome, _), found = end_of(arrival := one.arrivals()[1]), arrival.virtual
    assert outcome == "done"
    assert (found.down_bytes, found.host_flops, found.stream_s) == (0, 100, 1.0)
    assert time_s >= 1.0


def test_jitter_changes_device_and_links_for_one_plan(bench):
    # Half the rate down (2 s), twice the time to compute (4 s), twice the rate up (0.5 s).
    one = bench({1: Disruption(compute=2.0, down=0.5, up=2.0)}, latency_s=0)
    one.dispatch(1, **PLAN)
    one_s = one.arrivals()[1].virtual
    assert (one_s.down_s, one_s.compute_s, one_s.up_s, one_s.seconds) == (2.0, 4.0, 0.5, 6.5)
    assert (one_s.flops, one_s.up_bytes) == (20, 100)
    one.dispatch(2, **PLAN)
    assert one.arrivals()[2].virtual.seconds == 4.0


def test_a_link_that_changes_carries_each_packet_at_the_rate_when_it_is_sent(bench):
    # 100 B/s as declared: down until 1. From 2 on 50 B/s up: it is sent at 3, and takes 2 s; a change at 4 has no effect.
    one = bench(latency_s=0, rates=[[0, 2, 50, 10], [0, 4, 1, 200]])
    one.dispatch(1, **PLAN)
    found = one.arrivals()[1].virtual
    assert (found.down_s, found.compute_s, found.up_s) == (1.0, 2.0, 2.0)
    one.dispatch(2, **PLAN)
    found = one.arrivals()[2].virtual
    assert (found.down_s, found.up_s) == (0.5, 100.0)


@pytest.mark.parametrize("stop_s", [1.0, 2.6, 3.0])
def test_a_plan_that_is_lost_can_be_cancelled_before_and_after(bench, stop_s):
    two = bench({1: Disruption(lost_in="train", share=0.25)}, devices=2, server={"lost_after_s": 0.4})
    two.dispatch(1, 0, **PLAN)
    two.dispatch(2, 1, **PLAN)
    arrival = two.clock.next(stop_s)
    assert (arrival is not None) == (stop_s == 3.0)
    two.clock.abandon(1)
    assert {plan_id: end_of(found) for plan_id, found in two.arrivals().items()} == {2: (6.0, "done", "")}


def test_each_plan_has_one_outcome(bench):
    # It drops out at 2.5, and would have left at 3: it is lost once.
    one = bench({1: Disruption(lost_in="train", share=0.25)}, availability={"leaves_s": 3}, server={"lost_after_s": 5})
    one.dispatch(1, **PLAN)
    found = one.arrivals()
    assert [end_of(arrival) for arrival in found.values()] == [(7.5, Outcome.LOST.value, "train")]
