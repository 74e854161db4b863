"""The clocks, with a scripted pool; sizes and speeds are simple enough to check by hand."""

import time
from dataclasses import dataclass, field

import fedbonsai
import msgspec
import pytest
from fedbonsai.actors.pool import Task
from fedbonsai.clusters.fleet import HostProfile, load_fleet
from fedbonsai.policies.compression.residuals import Residuals
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.local_loss import LocalLoss
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.report import Outcome
from fedbonsai.runtime.configuration.policy_checks import configured_policy
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.events import PlanEnded
from fedbonsai.runtime.simulation.network_links import uncontended_rate
from fedbonsai.runtime.simulation.virtual_clock import VirtualClock
from fedbonsai.runtime.simulation.wall_clock import WallClock


@pytest.fixture(name="bench")
def bench_fixture(make_plan, scripted_pool):
    """A clock with its pool: ``dispatch(plan id, device, flops=..., up=..., down=...)``, ``arrivals()``."""

    @dataclass
    class Bench:
        fleet: object
        pool: object = field(default_factory=lambda: scripted_pool({}))

        def __post_init__(self):
            self.clock = VirtualClock(self.fleet, self.pool)

        def dispatch(self, plan_id, device=0, *, flops=0, up=0, down=0):
            plan = make_plan(plan_id, device)
            self.pool.sizes[plan_id] = up
            self.pool.submit(Task(plan=plan, packets=()))
            self.clock.dispatch(plan, down_bytes=down, flops=flops, peak_memory_bytes=5)

        def arrivals(self, deadline_s=None):
            found = []
            while (arrival := self.clock.next(deadline_s)) is not None:
                found.append((arrival.finished.plan.id, arrival.time_s))
            return found

    return Bench


def test_one_plan_by_hand(bench, make_fleet):
    # down 1 + 100 / 100, compute 20 / 10, up 1 + 50 / 100
    one = bench(make_fleet(10, latency_s=1))
    one.dispatch(1, flops=20, up=50, down=100)
    arrival = one.clock.next(None)
    assert arrival.time_s == one.clock.time_s == 5.5
    assert arrival.virtual == Estimate(
        down_s=2.0, compute_s=2.0, up_s=1.5, seconds=5.5, down_bytes=100, up_bytes=50, flops=20, peak_memory_bytes=5
    )
    assert one.clock.next(None) is None


def test_arrivals_come_in_simulated_order_and_ties_by_plan_id(bench, make_fleet):
    # Plan 1 computes 4 s, plans 2 and 3 2 s each: 3 was dispatched first, but 2 has the smaller id.
    three = bench(make_fleet(1, 2, 2))
    three.dispatch(1, 0, flops=4, up=100)
    three.dispatch(3, 2, flops=4, up=100)
    three.dispatch(2, 1, flops=4, up=100)
    assert three.arrivals() == [(2, 3.0), (3, 3.0), (1, 5.0)]


def test_the_pool_is_asked_in_simulated_order_and_only_for_what_is_needed(bench, make_fleet):
    # Plan 1 computes until 4 s, plan 2 until 2 s and sends until 3 s: when 2 arrives, the result of 1 is not needed.
    two = bench(make_fleet(1, 2))
    two.dispatch(1, 0, flops=4, up=100)
    two.dispatch(2, 1, flops=4, up=100)
    assert two.clock.next(None).finished.plan.id == 2
    assert two.pool.asked == [2]
    two.clock.next(None)
    assert two.pool.asked == [2, 1]


def test_an_arrival_waits_for_a_plan_that_could_still_be_earlier(bench, make_fleet):
    # Plan 1 sends from 1 s to 11 s. Plan 2 ends its computation at 2 s: its update could be small and arrive first, and does.
    two = bench(make_fleet(1, 1))
    two.dispatch(1, 0, flops=1, up=1000)
    two.dispatch(2, 1, flops=2, up=100)
    assert two.arrivals() == [(2, 3.0), (1, 11.0)]
    assert two.pool.asked == [1, 2]


def test_two_uploads_of_one_megabyte_on_a_shared_link_of_one_megabyte_a_second_end_at_two_seconds(bench, make_fleet):
    fleet = make_fleet(
        1,
        1,
        up_bytes_per_s=10**7,
        shared_link="wifi",
        shared_links={"wifi": {"up_bytes_per_s": 10**6, "down_bytes_per_s": 10**6}},
    )
    two = bench(fleet)
    two.dispatch(1, 0, up=10**6)
    two.dispatch(2, 1, up=10**6)
    assert two.arrivals() == [(1, 2.0), (2, 2.0)]


def test_latency_is_spent_before_a_shared_link_is_used(bench, make_fleet):
    # Both uploads begin after 1 s down and 1 s up of latency: 2 + 2 MB at 1 MB/s.
    fleet = make_fleet(1, 1, latency_s=1, up_bytes_per_s=10**7, server={"up_bytes_per_s": 10**6})
    two = bench(fleet)
    two.dispatch(1, 0, up=10**6)
    two.dispatch(2, 1, up=10**6)
    assert two.arrivals() == [(1, 4.0), (2, 4.0)]


def test_uploads_share_the_link_only_while_both_are_active(bench, make_fleet):
    # Plan 1 uploads from 0 s. Plan 2 computes 0.5 s, then both have half: 1 ends at 1.5 s, and 2 at 2 s.
    fleet = make_fleet(1, 1, up_bytes_per_s=10**7, server={"up_bytes_per_s": 10**6})
    two = bench(fleet)
    two.dispatch(1, 0, up=10**6)
    two.dispatch(2, 1, flops=0.5, up=10**6)
    arrivals = [two.clock.next(None), two.clock.next(None)]
    assert [(a.finished.plan.id, a.time_s) for a in arrivals] == [(1, 1.5), (2, 2.0)]
    assert [a.virtual.up_s for a in arrivals] == [1.5, 1.5]


def test_a_deadline_stops_the_time_and_plans_in_flight_continue(bench, make_fleet):
    one = bench(make_fleet(1))
    one.dispatch(1, flops=4, up=100)
    assert one.clock.next(3.0) is None
    assert one.clock.time_s == 3.0
    assert one.pool.asked == []
    assert one.clock.next(None).time_s == 5.0


def test_an_arrival_at_the_very_deadline_counts(bench, make_fleet):
    one = bench(make_fleet(1))
    one.dispatch(1, flops=4, up=100)
    assert one.clock.next(5.0).time_s == 5.0


def test_a_deadline_that_has_passed_does_not_turn_the_time_back(bench, make_fleet):
    one = bench(make_fleet(1))
    one.dispatch(1, flops=4, up=100)
    one.clock.next(None)
    one.dispatch(2, flops=4, up=100)
    assert one.clock.next(1.0) is None
    assert one.clock.time_s == 5.0


def test_a_failed_plan_arrives_after_its_computation_without_an_upload(bench, make_fleet):
    one = bench(make_fleet(10, latency_s=1))
    one.dispatch(1, flops=20, up=None, down=100)
    arrival = one.clock.next(None)
    assert arrival.time_s == 4.0
    assert arrival.finished.report.outcome == Outcome.FAILED
    assert (arrival.virtual.up_s, arrival.virtual.up_bytes, arrival.virtual.seconds) == (0.0, 0, 4.0)


def test_a_plan_cancelled_while_it_uploads_frees_the_link(bench, make_fleet):
    # Both upload at half the rate. At 1 s each has sent half; the second is cancelled, and the first ends at 1.5 s.
    fleet = make_fleet(1, 1, up_bytes_per_s=10**7, server={"up_bytes_per_s": 10**6})
    two = bench(fleet)
    two.dispatch(1, 0, up=10**6)
    two.dispatch(2, 1, up=10**6)
    assert two.clock.next(1.0) is None
    two.clock.abandon(2)
    assert two.arrivals() == [(1, 1.5)]


@pytest.mark.parametrize("stop_s", [0.5, 1.5, 2.5])
def test_a_plan_cancelled_in_any_stage_never_arrives(bench, make_fleet, stop_s):
    # down until 1 s, compute until 2 s, up until 3 s
    two = bench(make_fleet(1, 1, server={"up_bytes_per_s": 10**6, "down_bytes_per_s": 10**6}))
    two.dispatch(1, 0, flops=1, up=100, down=100)
    two.dispatch(2, 1, flops=1, up=100, down=100)
    assert two.clock.next(stop_s) is None
    two.clock.abandon(1)
    assert two.arrivals() == [(2, 3.0)]


def test_a_plan_that_has_arrived_can_be_cancelled_too(bench, make_fleet):
    one = bench(make_fleet(1))
    one.dispatch(1, 0, up=100)
    assert one.clock.next(None) is not None
    one.clock.abandon(1)
    assert one.clock.next(1e9) is None


def test_an_uncontended_transfer_has_the_lowest_of_all_rates():
    assert uncontended_rate(5.0, None, 3.0, None) == 3.0
    assert uncontended_rate(5.0, None) == 5.0


@dataclass(frozen=True)
class OneByOne:
    """One device a round, in order; its plan carries what it was estimated to cost."""

    residual: bool = False
    split: SplitFed | LocalLoss | EcoFed | None = None

    def init(self):
        return Residuals().init()

    def decide(self, view, state, decision):
        if view.dispatched:
            return decision, state
        plan = view.new_plan(view.version)
        if self.residual:
            decided, state = Residuals().decide(view, state, Decision(plans=(plan,)))
            (plan,) = decided.plans
        if self.split is not None:
            (plan,) = self.split.decide(view, None, Decision(plans=(plan,)))[0].plans
        estimate = view.estimate(view.version, plan)
        return Decision(plans=(plan.with_(msgspec.json.encode(estimate).decode()),)), state


def estimated_and_charged(*, policy_links=False, split=None, policy=None, devices=None, **changes):
    """For every device of the laptop fleet, alone on its links, with real packets of digits."""
    config = {
        "backend": "inline",
        "fleet": "laptop",
        "data": {"partition": {"name": "dirichlet", "alpha": 1.0}},
        "evaluation": {"where": "none"},
        "stop": {"rounds": 8},
    }
    policy = policy or OneByOne(residual=policy_links, split=split)
    with fedbonsai.run(config | changes, policy=policy) as run:
        reports = [event.report for event in run if isinstance(event, PlanEnded)]
    assert [report.plan.device for report in reports] == (devices or list(range(8)))
    return [(msgspec.json.decode(r.plan.reasons[-1], type=Estimate), r.virtual) for r in reports]


def test_an_estimate_is_exactly_what_the_clock_charges():
    for estimate, charged in estimated_and_charged():
        assert charged == estimate
        assert min(charged.down_s, charged.compute_s, charged.up_s) > 0


UNLIMITED = {"count": 1, "flop_per_s": 1e9}
SLOW = {"count": 2, "flop_per_s": 1e8, "up_bytes_per_s": 1e5, "down_bytes_per_s": 1e5}


def with_hosts(hosts):
    return {"fleet": msgspec.to_builtins(msgspec.structs.replace(load_fleet("laptop"), hosts=HostProfile(**hosts)))}


@pytest.mark.parametrize("hosts", [UNLIMITED, SLOW], ids=["unlimited", "slow"])
@pytest.mark.parametrize(
    "split",
    [
        SplitFed(),
        SplitFed(window=3),
        SplitFed(head="shared"),
        LocalLoss(),
        EcoFed(period=1, bits=0),
        EcoFed(period=1, bits=0, window=1),
    ],
    ids=str,
)
def test_that_holds_when_the_model_is_cut(split, hosts):
    for estimate, charged in estimated_and_charged(split=split, **with_hosts(hosts)):
        assert charged == estimate
        assert charged.stream_s > 0
        assert charged.host_flops > 0


def test_that_holds_for_a_replay():
    @dataclass(frozen=True)
    class Twice(OneByOne):
        """The first device uploads; the second round is a replay of that."""

        def decide(self, view, state, decision):
            if view.version and not view.dispatched:
                policy = EcoFed(bits=0, period=2)
                (plan,) = policy.decide(view, None, Decision(plans=(view.new_plan(0),)))[0].plans
                assert plan.split.view is not None
                estimate = msgspec.json.encode(view.estimate(0, plan)).decode()
                return Decision(plans=(plan.with_(estimate),)), state
            return super().decide(view, state, decision)

    upload, replay = estimated_and_charged(policy=Twice(split=EcoFed(bits=0)), devices=[0, 0], stop={"rounds": 2})
    assert upload[1].host_flops == replay[1].host_flops > 0
    assert replay[0] == replay[1]
    assert replay[1] == Estimate(
        stream_s=replay[1].stream_s,
        seconds=replay[1].stream_s,
        host_flops=replay[1].host_flops,
        peak_memory_bytes=upload[1].peak_memory_bytes,
    )


def test_coded_activations_are_estimated_near_and_then_at_the_bytes_per_sample_of_the_last_stream():
    pairs = estimated_and_charged(split=EcoFed(period=1))
    first, charged = pairs[0]
    assert charged.up_bytes == pytest.approx(first.up_bytes, rel=0.5)
    for (estimate, charged), (_, before) in zip(pairs[1:], pairs, strict=False):
        assert charged.down_bytes == estimate.down_bytes == 0
        per_sample = before.up_bytes / before.host_flops  # every sample is as much work for the host
        assert estimate.up_bytes == pytest.approx(per_sample * estimate.host_flops, rel=0.01)
        assert charged.up_bytes == pytest.approx(estimate.up_bytes, rel=0.2)


def test_with_a_codec_of_varying_size_the_estimate_is_near_and_then_the_size_of_the_last_packet():
    pairs = estimated_and_charged(codecs={"down": ["lz4"], "up": ["lz4"]})
    first_estimate, before = pairs[0]
    assert first_estimate.up_bytes == pytest.approx(before.up_bytes, rel=0.1)
    assert first_estimate.down_bytes == pytest.approx(before.down_bytes, rel=0.1)
    for estimate, charged in pairs[1:]:
        assert (estimate.up_bytes, estimate.down_bytes) == (before.up_bytes, before.down_bytes)
        assert charged.compute_s == estimate.compute_s
        before = charged


def test_the_estimate_of_a_link_with_memory_counts_what_a_device_has_missed():
    pairs = estimated_and_charged(policy_links=True)
    # Device k first takes part in round k: it is sent the message that agrees on the seed's model, and the k residuals since.
    for estimate, charged in pairs:
        assert estimate.down_bytes == charged.down_bytes
    sizes = [charged.down_bytes for _, charged in pairs]
    assert sizes == sorted(set(sizes))
    assert [estimate.up_bytes for estimate, _ in pairs[1:]] == [charged.up_bytes for _, charged in pairs[:-1]]


@pytest.fixture(name="wall")
def wall_fixture(scripted_pool, make_plan):
    pool = scripted_pool({1: 10, 2: 20})
    for plan_id in (1, 2):
        pool.submit(Task(plan=make_plan(plan_id, plan_id), packets=()))
    started = time.perf_counter()
    return pool, WallClock(
        pool, now=lambda: time.perf_counter() - started, estimate=lambda device, plan: Estimate(seconds=float(device))
    )


def test_the_wall_clock_returns_arrivals_as_results_come_in(wall):
    pool, clock = wall
    clock.dispatch(pool.queue[0], down_bytes=1, flops=1, peak_memory_bytes=1)
    first, second = clock.next(None), clock.next(None)
    assert [first.finished.plan.id, second.finished.plan.id] == [1, 2]
    assert 0 <= first.time_s <= second.time_s <= clock.time_s
    assert [first.virtual.seconds, second.virtual.seconds] == [1.0, 2.0]
    assert clock.next(None) is None


def test_the_wall_clock_gives_the_pool_what_is_left_until_the_deadline(wall):
    pool, clock = wall
    given = []
    inner = pool.next
    pool.next = lambda timeout_s: given.append(timeout_s) or inner(timeout_s)
    clock.next(1000.0)
    clock.next(-5.0)
    clock.abandon(2)
    assert 990 < given[0] <= 1000
    assert given[1] == 0.0


def test_while_nothing_is_in_flight_a_busy_server_takes_time(bench, make_fleet):
    one = bench(make_fleet(10))
    one.clock.spend(3.0)
    assert one.clock.time_s == one.clock.sends_s == 3.0
    one.dispatch(1, flops=20, up=50, down=100)
    assert one.arrivals() == [(1, 3 + 1 + 2 + 0.5)]


def test_plans_in_flight_go_on_while_the_server_is_busy(bench, make_fleet):
    # Plan 1 arrives at 4.5 s whatever the server does; plan 2 is sent when the server is free, at 10 s.
    two = bench(make_fleet(10, 10))
    two.dispatch(1, 0, flops=30, up=50, down=100)
    assert two.clock.next(2.0) is None
    two.clock.spend(8.0)
    assert (two.clock.time_s, two.clock.sends_s) == (2.0, 10.0)
    two.dispatch(2, 1, flops=20, up=50, down=100)
    assert two.arrivals() == [(1, 4.5), (2, 13.5)]
    assert two.clock.sends_s == 13.5


def test_waiting_for_the_server_is_not_charged_to_the_plan(bench, make_fleet):
    two = bench(make_fleet(10, 10))
    two.dispatch(1, 0, flops=30, up=50, down=100)
    two.clock.spend(8.0)
    two.dispatch(2, 1, flops=20, up=50, down=100)
    two.clock.next(None)
    arrival = two.clock.next(None)
    assert arrival.time_s == 8 + 3.5
    assert arrival.virtual == Estimate(
        down_s=1.0, compute_s=2.0, up_s=0.5, seconds=3.5, down_bytes=100, up_bytes=50, flops=20, peak_memory_bytes=5
    )


@pytest.mark.parametrize("shared", [False, True])
def test_a_plan_that_is_abandoned_while_it_waits_for_the_server_costs_nothing(bench, make_fleet, shared):
    air = {"up_bytes_per_s": 1000, "down_bytes_per_s": 1000}
    links = {"shared_link": "air", "shared_links": {"air": air}} if shared else {}
    two = bench(make_fleet(10, 10, **links))
    two.dispatch(1, 0, flops=300, up=50, down=100)
    two.clock.spend(8.0)
    two.dispatch(2, 1, flops=20, up=50, down=100)
    assert two.clock.next(4.0) is None
    arrival = two.clock.abandon(2)
    assert (arrival.virtual.seconds, arrival.virtual.down_bytes, arrival.virtual.flops) == (0.0, 0, 0)
    assert [plan_id for plan_id, _ in two.arrivals()] == [1]
    # Later it has begun: from 8 s on.
    three = bench(make_fleet(10, 10, **links))
    three.dispatch(1, 0, flops=300, up=50, down=100)
    three.clock.spend(8.0)
    three.dispatch(2, 1, flops=20, up=50, down=100)
    assert three.clock.next(8.5) is None
    assert three.clock.abandon(2).virtual.down_bytes == 50


def test_a_later_task_of_the_server_replaces_an_earlier_one(bench, make_fleet):
    one = bench(make_fleet(10))
    one.clock.spend(3.0)
    one.clock.spend(2.0)
    assert one.clock.sends_s == 5.0


def test_the_estimate_of_a_plan_is_without_what_the_server_does(bench, make_fleet):
    """And a plan with a deadline is shortened to it, as if it were sent at once: the deadline counts from when it is sent."""
    fleet = make_fleet(10)
    config = fedbonsai.load_config({"fleet": msgspec.to_builtins(fleet), "backend": "inline", "stop": {"rounds": 1}})
    engine = Engine(config, configured_policy(config))
    loop = engine._loop
    plan = loop._view().new_plan(0)
    before = loop._costs.estimate(0, plan)
    half = msgspec.structs.replace(plan, deadline_s=before.seconds / 2)
    short = loop._clock.stop_early(half, loop._costs)
    loop._clock.spend(1000.0)
    assert loop._costs.estimate(0, plan) == before
    assert loop._clock.stop_early(half, loop._costs) == short
    assert 0 < short.training.steps < short.whole_steps
