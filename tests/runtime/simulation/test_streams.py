"""Streams between devices and hosts in simulated time: by hand, by what pipelines and queues must do, and through the clock."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from fedbonsai.actors.pool import StreamBytes, Task
from fedbonsai.policies.plan import Split
from fedbonsai.policies.report import Outcome
from fedbonsai.runtime.simulation.network_links import NetworkLinks
from fedbonsai.runtime.simulation.stream_load import Load, StreamPath, Work, charged
from fedbonsai.runtime.simulation.streams import Streams
from fedbonsai.runtime.simulation.virtual_clock import VirtualClock
from hypothesis import given
from hypothesis import strategies as st


def load(forward=(1.0,), host=(1.0,), *, rest=None, up=None, down=(), window=1):
    """A stream of as many micro-batches as ``forward`` has; with answers where ``down`` has sizes."""
    num = len(forward)
    return Load(
        up=up or (0,) * num,
        down=down,
        forward_s=forward,
        rest_s=rest or (0.0,) * num,
        host_s=host,
        flops=0,
        host_flops=0,
        window=window,
        answers=bool(down),
    )


def drive(streams_at, *, capacities=None, cancel=None):
    """When each of ``{plan: (load, route, when it begins)}`` ends, on shared links of these ``capacities`` each way.

    ``cancel``: (plan, second).
    """
    up, down = NetworkLinks(capacities or {}), NetworkLinks(capacities or {})
    streams, ended = Streams(up=up, down=down), {}
    starts = sorted((at_s, plan_id) for plan_id, (_, _, at_s) in streams_at.items())
    while True:
        firsts = (down.first(), up.first(), streams.first())
        changes = [(*first, source) for source, first in enumerate(firsts) if first is not None]
        changes += [(at_s, plan_id, 3) for at_s, plan_id in starts[:1]]
        changes += [(cancel[1], cancel[0], 4)] if cancel else []
        if not changes:
            return ended
        now_s, plan_id, source = min(changes)
        if source == 4:
            streams.cancel(plan_id, now_s=now_s)
            cancel = None
        elif source == 3:
            starts.pop(0)
            stream, path, at_s = streams_at[plan_id]
            streams.begin(plan_id, stream, path, now_s=at_s)
        elif source == 2:
            seconds = streams.change()
            if seconds is not None:
                ended[plan_id] = streams_at[plan_id][2] + seconds
        else:
            streams.landed(plan_id, ("down", "up")[source], now_s=now_s)


def alone(stream, path=None, *, at_s=0.0, capacities=None):
    return drive({1: (stream, path or StreamPath(), at_s)}, capacities=capacities)[1]


OWN = StreamPath(latency_s=0.5, up_rate=100.0, down_rate=100.0)


def test_with_gradients_and_window_one_nothing_overlaps():
    # forward 2 + 1, up (0.5 + 1) + (0.5 + 0.5), host 1 + 0.5, down (0.5 + 0.2) + (0.5 + 0.1), backward 4 + 2
    found = alone(load((2.0, 1.0), (1.0, 0.5), rest=(4.0, 2.0), up=(100, 50), down=(20, 10)), OWN)
    assert found == pytest.approx(3 + 2.5 + 1.5 + 1.3 + 6)


def test_a_window_without_answers_overlaps_all_three():
    # Forward 1 s, transfer 2 s, host 3 s, three packets. With window 2:
    #   device    0-1, 1-2, 2-3; it sends at 1 and 2, and the third when the host is done with the first, at 6
    #   uplink    1-3, 3-5, 6-8
    #   host      3-6, 6-9, 9-12
    three = {"forward": (1.0,) * 3, "host": (3.0,) * 3, "up": (200,) * 3}
    path = StreamPath(up_rate=100.0)
    assert alone(load(**three, window=2), path) == 12
    # Window 1: sent at 1, 6 and 11, since only the forward pass runs ahead; the host is done at 6, 11 and 16.
    assert alone(load(**three, window=1), path) == 16
    # 1 s of latency, window 2: sent at 1 and 2; there at 4 and 6; the host is done at 7 and 10, the device learns of it at 8
    # and sends the third, which arrives at 11; the host is done at 14, and the device learns of it at 15.
    assert alone(load(**three, window=2), replace(path, latency_s=1.0)) == 15


def test_packets_in_a_row_pay_for_latency_side_by_side():
    # Sent at 1 and 2 with 5 s of latency: there at 6 + 2 and 8 + 2; the host takes no time, its acknowledgement 5 s.
    two = load((1.0, 1.0), (0.0, 0.0), up=(200, 200), window=2)
    assert alone(two, StreamPath(latency_s=5.0, up_rate=100.0)) == 15


def test_a_device_that_trains_its_own_blocks_does_so_while_packets_are_transferred():
    # Device 0-1 and 1-5, 5-6 and 6-10; packets 1-3 and 6-8; host 3-6 and 8-11. With a fast host the device would decide.
    own = {"forward": (1.0, 1.0), "rest": (4.0, 4.0), "up": (200, 200), "window": 2}
    assert alone(load(host=(3.0, 3.0), **own), StreamPath(up_rate=100.0)) == 11
    assert alone(load(host=(0.1, 0.1), **own), StreamPath(up_rate=100.0)) == 10


def test_with_gradients_a_larger_window_alternates_forward_and_backward():
    # Window 2, forward 1, host 2, backward 1, no transfers: device F 0-1, F 1-2, B 3-4, F 4-5, B 5-6, B 7-8;
    # host 1-3, 3-5, 5-7.
    found = alone(load((1.0,) * 3, (2.0,) * 3, rest=(1.0,) * 3, down=(0, 0, 0), window=2))
    assert found == 8


def test_a_stream_of_no_packets_is_over_at_once():
    assert alone(load((), ()), at_s=3.0) == 3.0


def test_two_devices_on_one_host_are_served_first_come_first_served():
    # One micro-batch of 4 s each: the first comes at 1, the second at 2 and waits until 5. On two hosts none waits.
    first, second = load((1.0,), (4.0,)), load((2.0,), (4.0,))
    assert drive({1: (first, StreamPath(), 0.0), 2: (second, StreamPath(), 0.0)}) == {1: 5.0, 2: 9.0}
    assert drive({1: (first, StreamPath(), 0.0), 2: (second, StreamPath(host=1), 0.0)}) == {1: 5.0, 2: 6.0}


def test_packets_that_arrive_at_a_host_at_the_same_time_are_served_by_plan():
    one = load((1.0,), (4.0,))
    assert drive({7: (one, StreamPath(), 0.0), 3: (one, StreamPath(), 0.0)}) == {3: 5.0, 7: 9.0}


def test_micro_batches_of_two_devices_take_turns_at_a_host():
    # Both send at 1; the host takes plan 1's until 2, plan 2's until 3; each sends its next at once (forward runs ahead).
    one = load((1.0, 1.0), (1.0, 1.0))
    assert drive({1: (one, StreamPath(), 0.0), 2: (one, StreamPath(), 0.0)}) == {1: 4.0, 2: 5.0}


WIFI = StreamPath(up_rate=1000.0, down_rate=1000.0, up_links=("wifi",), down_links=("wifi",))


def test_two_devices_on_one_shared_link_have_half_of_it_each():
    # Both send 100 bytes at 1 s on 100 B/s: there at 3. On hosts of their own they end at 4, where alone they would at 3.
    one = load((1.0,), (1.0,), up=(100,))
    both = {1: (one, WIFI, 0.0), 2: (one, replace(WIFI, host=1), 0.0)}
    assert drive(both, capacities={"wifi": 100.0}) == {1: 4.0, 2: 4.0}
    assert alone(one, WIFI, capacities={"wifi": 100.0}) == 3.0


def test_answers_share_the_downlink():
    # Hosts are done at 1; 100 bytes each come down at 50 B/s.
    one = load((0.0,), (1.0,), down=(100,))
    both = {1: (one, WIFI, 0.0), 2: (one, replace(WIFI, host=1), 0.0)}
    assert drive(both, capacities={"wifi": 100.0}) == {1: 3.0, 2: 3.0}


def test_packets_of_one_stream_follow_one_another_on_a_shared_link():
    # Ready at 1 and 2; on the link 1-3 and 3-5 (never both at once); the host takes no time.
    two = load((1.0, 1.0), (0.0, 0.0), up=(200, 200), window=2)
    assert alone(two, WIFI, capacities={"wifi": 100.0}) == 5.0


def test_a_cancelled_stream_frees_link_and_host():
    # The host would compute plan 1 until 11, the others wait; at 3 plan 1 is cancelled, and 2 goes on.
    long, short = load((1.0,), (10.0,)), load((2.0,), (1.0,))
    assert drive({1: (long, StreamPath(), 0.0), 2: (short, StreamPath(), 0.0)}, cancel=(1, 3.0)) == {2: 4.0}
    assert drive({1: (long, StreamPath(), 0.0), 2: (short, StreamPath(), 0.0)}, cancel=(2, 3.0)) == {1: 11.0}
    # Two packets of 200 bytes at 50 B/s each; at 2 s plan 1 is cancelled, and the 100 bytes left of plan 2 take 1 s.
    sending = load((0.0,), (0.0,), up=(200,))
    both = {1: (sending, WIFI, 0.0), 2: (sending, replace(WIFI, host=1), 0.0)}
    assert drive(both, capacities={"wifi": 100.0}, cancel=(1, 2.0)) == {2: 3.0}


SECONDS = st.floats(0, 10)
SIZES = st.integers(0, 10**6)


@st.composite
def loads(draw, *, answers=None):
    num = draw(st.integers(1, 8))
    times = st.lists(SECONDS, min_size=num, max_size=num)
    sizes = st.lists(SIZES, min_size=num, max_size=num)
    back = draw(st.booleans()) if answers is None else answers
    forward, rest, host = draw(times), draw(times), draw(times)
    return load(
        forward, host, rest=rest, up=draw(sizes), down=draw(sizes) if back else (), window=draw(st.integers(1, 4))
    )


@st.composite
def routes(draw, *, shared=None):
    links = ("wifi",) if (draw(st.booleans()) if shared is None else shared) else ()
    rates = st.floats(1e4, 1e7)
    return StreamPath(
        latency_s=draw(SECONDS), up_rate=draw(rates), down_rate=draw(rates), up_links=links, down_links=links
    )


CAPACITIES = {"wifi": 1e6}


@given(loads(answers=True), routes())
def test_window_one_with_gradients_is_the_sum_of_all_its_parts(stream, path):
    stream = replace(stream, window=1)
    up_rate, down_rate = (min(rate, 1e6) if path.up_links else rate for rate in (path.up_rate, path.down_rate))
    expected = sum(stream.forward_s) + sum(stream.rest_s) + sum(stream.host_s) + 2 * len(stream.up) * path.latency_s
    expected += sum(stream.up) / up_rate + sum(stream.down) / down_rate
    assert alone(stream, path, capacities=CAPACITIES) == pytest.approx(expected, rel=1e-9)


@given(loads(), routes(), st.floats(0, 1e6))
def test_alone_it_takes_the_same_to_the_last_bit_whenever_it_begins(stream, path, at_s):
    found = []
    for begins_s in (0.0, at_s):
        links = {name: NetworkLinks(CAPACITIES) for name in ("up", "down")}
        streams = Streams(**links)
        streams.begin(1, stream, path, now_s=begins_s)
        seconds = None
        while seconds is None:
            firsts = (links["down"].first(), links["up"].first(), streams.first())
            now_s, _, source = min((*first, source) for source, first in enumerate(firsts) if first is not None)
            if source == 2:
                seconds = streams.change()
            else:
                streams.landed(1, ("down", "up")[source], now_s=now_s)
        found.append(seconds)
    assert found[0] == found[1]


@given(loads(answers=False), routes())
def test_a_larger_window_never_takes_longer_and_no_part_becomes_faster(stream, path):
    taken = [alone(replace(stream, window=window), path, capacities=CAPACITIES) for window in (1, 2, 3, 8)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(taken))
    rate = min(path.up_rate, 1e6) if path.up_links else path.up_rate
    device = sum(stream.forward_s) + sum(stream.rest_s)
    assert taken[-1] >= max(device, sum(stream.up) / rate, sum(stream.host_s)) * (1 - 1e-9)


@given(st.lists(st.tuples(loads(), routes(shared=False), SECONDS), min_size=2, max_size=5))
def test_a_host_that_is_shared_works_no_faster_and_no_stream_gains(several):
    streams = dict(enumerate(several))
    ended = drive(streams)
    assert set(ended) == set(streams)
    for number, (stream, path, at_s) in streams.items():
        assert ended[number] >= alone(stream, path, at_s=at_s) * (1 - 1e-9)
    begin = min(at_s for _, _, at_s in several)
    assert max(ended.values()) - begin >= sum(sum(stream.host_s) for stream, _, _ in several) * (1 - 1e-9)


def test_with_many_devices_the_host_is_the_bottleneck():
    # Ten devices of 10 micro-batches of 0.5 s each: the host has 50 s of work, beginning at 0.1; alone each takes 5.1.
    one = load((0.1,) * 10, (0.5,) * 10, window=4)
    assert alone(one) == pytest.approx(5.1)
    ended = drive({number: (one, StreamPath(), 0.0) for number in range(10)})
    assert max(ended.values()) == pytest.approx(50.1)


@pytest.fixture(name="bench")
def bench_fixture(make_plan, make_fleet, scripted_pool):
    """A clock over equal devices of 10 FLOP/s and 100 B/s each way: ``dispatch(plan id, device, work, up, down, ...)``."""

    class Pool(scripted_pool):
        streams: dict[int, StreamBytes]

        def result(self, plan_id):
            found = replace(super().result(plan_id), stream=self.streams[plan_id])
            return found if self.sizes[plan_id] else replace(found, update=None)  # a device that trains nothing

    @dataclass
    class Bench:
        extras: dict = field(default_factory=dict)
        devices: int = 2

        def __post_init__(self):
            self.pool = Pool({})
            self.pool.streams = {}
            self.clock = VirtualClock(make_fleet(*[10] * self.devices, **self.extras), self.pool)

        def dispatch(self, plan_id, device, work, up=(), down=(), *, update=0, mode="ecofed", view=None, host=0):
            plan = make_plan(
                plan_id, device, split=Split(cut="all", mode=mode, window=work.window, view=view, host=host)
            )
            self.pool.sizes[plan_id], self.pool.streams[plan_id] = update, StreamBytes(tuple(up), tuple(down))
            self.pool.submit(Task(plan=plan, packets=()))
            self.clock.dispatch(plan, down_bytes=0, flops=-1, peak_memory_bytes=5, work=work)

        def arrivals(self):
            found = {}
            while (arrival := self.clock.next(None)) is not None:
                assert arrival.time_s == self.clock.time_s
                found[arrival.finished.plan.id] = arrival
            return found

    return lambda devices=2, **extras: Bench(extras, devices)


HOSTS = {"flop_per_s": 100.0}
# Two micro-batches, of 2 samples and of 1; a sample takes the device 1 s forward and 2 s backward, and the host 0.5 s.
WORK = Work(samples=(2, 1), forward_flops=10, flops=30, host_flops=50)


def test_a_split_plan_by_hand(bench):
    # As the first test, with an update of 100 bytes: down 0.5, device 9, stream 2.5 + 1.5 + 1.3, up 0.5 + 1.
    one = bench(latency_s=0.5, hosts=HOSTS)
    one.dispatch(1, 0, WORK, (100, 50), (20, 10), update=100, mode="splitfed")
    virtual = one.arrivals()[1].virtual
    assert (virtual.down_s, virtual.compute_s, virtual.up_s) == (0.5, 9.0, 1.5)
    assert virtual.stream_s == pytest.approx(5.3)
    assert virtual.seconds == pytest.approx(16.3) == one.clock.time_s
    assert (virtual.up_bytes, virtual.down_bytes, virtual.flops, virtual.host_flops) == (250, 30, 90, 150)


def test_two_plans_on_one_host_through_the_clock(bench):
    # Forward only, one sample of 1 s; the host takes 0.5 s of each. On two hosts both end at 1.5.
    work = Work(samples=(1,), forward_flops=10, flops=10, host_flops=50, answers=False)
    for hosts, expected in ({"count": 1}, {1: 1.5, 2: 2.0}), ({"count": 2}, {1: 1.5, 2: 1.5}):
        two = bench(hosts=HOSTS | hosts)
        two.dispatch(1, 0, work, (0,))
        two.dispatch(2, 1, work, (0,), host=hosts["count"] - 1)
        found = two.arrivals()
        assert {plan_id: arrival.time_s for plan_id, arrival in found.items()} == expected
        assert found[2].virtual.stream_s == expected[2] - 1.0


def test_a_hosts_link_is_shared_by_its_devices_and_by_no_others(bench):
    # 100 bytes each at 1 s, at 100 B/s of its own: two devices have 50 B/s each of a host's 100, the third all of another's.
    work = Work(samples=(1,), forward_flops=10, flops=10, host_flops=0, answers=False)
    three = bench(3, hosts=HOSTS | {"count": 2, "up_bytes_per_s": 100.0})
    for device in range(3):
        three.dispatch(device + 1, device, work, (100,), host=device // 2)
    assert {plan_id: arrival.time_s for plan_id, arrival in three.arrivals().items()} == {1: 3.0, 2: 3.0, 3: 2.0}


def test_a_stream_and_an_update_share_a_link(bench, make_plan):
    # Plan 1 sends an update of 100 bytes from 1 s, plan 2 streams 100 bytes from 1 s, on 100 B/s together: both until 3.
    work = Work(samples=(1,), forward_flops=10, flops=10, host_flops=0, answers=False)
    wifi = {"wifi": {"up_bytes_per_s": 100.0, "down_bytes_per_s": 100.0}}
    two = bench(hosts=HOSTS, shared_link="wifi", shared_links=wifi)
    two.pool.sizes[1], two.pool.streams[1] = 100, StreamBytes()
    two.pool.submit(Task(plan=make_plan(1, 0), packets=()))
    two.clock.dispatch(make_plan(1, 0), down_bytes=0, flops=10, peak_memory_bytes=5)
    two.dispatch(2, 1, work, (100,))
    assert {plan_id: arrival.time_s for plan_id, arrival in two.arrivals().items()} == {1: 3.0, 2: 3.0}


def test_a_stream_that_broke_off_is_charged_for_what_was_completed(bench):
    # One of two packets, of 2 samples: forward 2, up 1, host 1, down 0.2, backward 4.
    one = bench(hosts=HOSTS)
    one.dispatch(1, 0, WORK, (100,), (20,), update=None, mode="splitfed")
    arrival = one.arrivals()[1]
    virtual = arrival.virtual
    assert arrival.finished.report.outcome == Outcome.FAILED
    assert (virtual.compute_s, virtual.flops, virtual.host_flops, virtual.up_bytes) == (6.0, 60, 100, 100)
    assert virtual.seconds == pytest.approx(8.2) == arrival.time_s


def test_a_replay_runs_on_its_host_alone_and_takes_turns_with_streams(bench):
    # Latency 1 s does not apply to the replay. It has the host 0-1, 1-1.5; of two micro-batches of 1 s and 0.5 s.
    replay = replace(WORK, forward_flops=0, flops=0, window=1, answers=False, replay=True)
    one = bench(latency_s=1.0, hosts=HOSTS)
    one.dispatch(1, 0, replay, view="v")
    assert one.arrivals()[1].virtual.seconds == one.clock.time_s == 1.5
    # A stream's one micro-batch of 0.5 s comes at 0.8, and is served between the replay's two.
    short = Work(samples=(1,), forward_flops=8, flops=8, host_flops=50, answers=False)
    two = bench(hosts=HOSTS)
    two.dispatch(1, 0, replay, view="v")
    two.dispatch(2, 1, short, (0,))
    assert {plan_id: arrival.time_s for plan_id, arrival in two.arrivals().items()} == {2: 1.5, 1: 2.0}


def test_a_replay_whose_view_is_gone_costs_nothing(bench):
    one = bench(hosts=HOSTS)
    one.dispatch(1, 0, replace(WORK, answers=False, replay=True), update=None, view="v")
    virtual = one.arrivals()[1].virtual
    assert (virtual.seconds, virtual.flops, virtual.host_flops) == (0.0, 0, 0)


def test_the_pool_is_asked_when_a_stream_begins_and_not_before(bench):
    two = bench(latency_s=1.0, hosts=HOSTS)
    two.dispatch(1, 0, WORK, (0, 0), (0, 0), mode="splitfed")
    assert two.clock.next(0.5) is None
    assert two.pool.asked == []
    assert two.clock.next(1.5) is None
    assert two.pool.asked == [1]


@pytest.mark.parametrize("stop_s", [0.5, 1.5, 2.5, 3.5, 6.5])
def test_a_split_plan_cancelled_at_any_time_never_arrives(bench, stop_s):
    wifi = {"wifi": {"up_bytes_per_s": 100.0, "down_bytes_per_s": 100.0}}
    alone_, both = (bench(latency_s=0.7, hosts=HOSTS, shared_link="wifi", shared_links=wifi) for _ in range(2))
    both.dispatch(1, 0, WORK, (100, 50), (20, 10), mode="splitfed")
    for one in (alone_, both):
        one.dispatch(2, 1, WORK, (100, 50), (20, 10), mode="splitfed")
    assert both.clock.next(stop_s) is None
    both.clock.abandon(1)
    found, expected = both.arrivals(), alone_.arrivals()
    assert set(found) == {2}
    assert found[2].time_s >= expected[2].time_s


def test_what_is_charged_beyond_computing_is_never_negative():
    found = charged(replace(load((0.1,) * 3, (0.0,) * 3), flops=3), 0.3 - 1e-12, flop_per_s=10.0)
    assert found.seconds == 0.0
