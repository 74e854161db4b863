"""Transfers on shared links: by hand, and by the properties that max-min fairness has."""

from itertools import pairwise

import pytest
from fedbonsai.runtime.simulation.network_links import NetworkLinks, Transfer, fair_rates
from hypothesis import given
from hypothesis import strategies as st

MB = 1_000_000


def run_out(links: NetworkLinks) -> dict[int, float]:
    """Let every transfer end, in order; when each did."""
    ended = {}
    while ends := links.ends():
        key = min(ends, key=lambda k: (ends[k], k))
        ended[key] = ends[key]
        links.end(key, now_s=ends[key])
    return ended


def test_two_megabyte_transfers_on_a_shared_megabyte_link_end_at_two_seconds():
    links = NetworkLinks({"wifi": MB})
    links.begin(1, num_bytes=MB, cap=10 * MB, links=["wifi"], now_s=0.0)
    links.begin(2, num_bytes=MB, cap=10 * MB, links=["wifi"], now_s=0.0)
    assert run_out(links) == {1: 2.0, 2: 2.0}


def test_a_transfer_that_starts_later_by_hand():
    # Alone for 0.5 s, the first sends half. Both then have half the link: the first ends at 0.5 + 0.5 / 0.5 = 1.5 s, when
    # the second has sent half; alone, it needs another 0.5 s.
    links = NetworkLinks({"wifi": MB})
    links.begin(1, num_bytes=MB, cap=10 * MB, links=["wifi"], now_s=0.0)
    links.begin(2, num_bytes=MB, cap=10 * MB, links=["wifi"], now_s=0.5)
    assert run_out(links) == {1: 1.5, 2: 2.0}


def test_the_seconds_that_a_transfer_took_are_told_at_its_end():
    links = NetworkLinks({"wifi": MB})
    links.begin(1, num_bytes=MB, cap=10 * MB, links=["wifi"], now_s=3.0)
    links.begin(2, num_bytes=MB, cap=10 * MB, links=["wifi"], now_s=3.5)
    assert links.end(1, now_s=4.5) == 1.5


def test_a_cap_below_the_share_leaves_the_rest_to_the_others():
    transfers = [Transfer(1, cap, ("wifi",), 0.0) for cap in (1.0, 10.0, 10.0)]
    assert fair_rates(transfers, {"wifi": 9.0}) == [1.0, 4.0, 4.0]


def test_two_links_crossed_the_tighter_one_decides():
    # The server has 6 for three, but the Wi-Fi only 3 for the first two: they get 1.5 each, and the third the rest.
    transfers = [Transfer(1, 100.0, links, 0.0) for links in (("wifi", "server"), ("wifi", "server"), ("server",))]
    assert fair_rates(transfers, {"wifi": 3.0, "server": 6.0}) == [1.5, 1.5, 3.0]


def test_a_transfer_without_shared_links_has_its_own_rate():
    links = NetworkLinks({"wifi": 1.0})
    links.begin(1, num_bytes=30, cap=10.0, links=[], now_s=0.0)
    links.begin(2, num_bytes=3, cap=10.0, links=["wifi"], now_s=0.0)
    assert links.ends() == {1: 3.0, 2: 3.0}


@given(start=st.floats(0, 1e6), num_bytes=st.integers(0, 10**12), rate=st.floats(1.0, 1e10))
def test_a_transfer_whose_rate_never_changed_ends_exactly_when_estimated(start, num_bytes, rate):
    links = NetworkLinks({"wifi": rate})
    links.begin(1, num_bytes=num_bytes, cap=2 * rate, links=["wifi"], now_s=start)
    assert links.ends()[1] == start + num_bytes / rate
    assert links.end(1, now_s=links.ends()[1]) == num_bytes / rate


def test_a_transfer_that_came_and_went_at_the_same_instant_changes_nothing():
    links = NetworkLinks({"wifi": MB})
    links.begin(1, num_bytes=MB, cap=MB, links=["wifi"], now_s=0.0)
    links.begin(2, num_bytes=MB, cap=MB, links=["wifi"], now_s=0.25)
    links.end(2, now_s=0.25)
    assert links.ends()[1] == pytest.approx(1.0, abs=1e-12)


CAPACITIES = {"wifi": 7.0, "lte": 3.0, "server": 11.0}
ROUTES = st.sets(st.sampled_from(sorted(CAPACITIES)), min_size=1).map(lambda names: tuple(sorted(names)))
CAPS = st.floats(0.1, 20.0)


@given(st.lists(st.tuples(CAPS, ROUTES), min_size=1, max_size=12))
def test_rates_are_max_min_fair_and_no_link_is_over_its_capacity(flows):
    transfers = [Transfer(1, cap, links, 0.0) for cap, links in flows]
    rates = fair_rates(transfers, CAPACITIES)
    used = {name: sum(r for r, t in zip(rates, transfers, strict=True) if name in t.links) for name in CAPACITIES}
    full = {name for name in CAPACITIES if used[name] >= CAPACITIES[name] * (1 - 1e-9)}
    assert all(used[name] <= CAPACITIES[name] * (1 + 1e-9) for name in CAPACITIES)
    for rate, transfer in zip(rates, transfers, strict=True):
        # Max-min: a flow below its cap crosses a full link, on which no flow has more (Bertsekas and Gallager).
        assert 0 < rate <= transfer.cap
        if rate < transfer.cap * (1 - 1e-9):
            rivals = [
                max(r for r, t in zip(rates, transfers, strict=True) if name in t.links)
                for name in full & set(transfer.links)
            ]
            assert any(most <= rate * (1 + 1e-9) for most in rivals)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 100), CAPS, ROUTES), min_size=1, max_size=8))
def test_bytes_are_conserved(flows):
    """Between two changes rates are constant, so what was sent is their sum; it must be what was to be sent."""
    arrivals = sorted((start, key) for key, (start, *_) in enumerate(flows))
    links, sent, now, under_way = NetworkLinks(CAPACITIES), dict.fromkeys(range(len(flows)), 0.0), 0.0, {}
    while arrivals or under_way:
        ends = links.ends()
        change = min([(t, 1, key) for key, t in ends.items()] + [(t, 0, key) for t, key in arrivals])
        time_s, is_end, key = change
        routes = [Transfer(1, flows[k][2], flows[k][3], 0.0) for k in under_way]
        for k, rate in zip(under_way, fair_rates(routes, CAPACITIES), strict=True):
            sent[k] += rate * (time_s - now)
        now = time_s
        if is_end:
            links.end(key, now_s=now)
            del under_way[key]
        else:
            arrivals.remove((time_s, key))
            _, num_bytes, cap, route = flows[key]
            links.begin(key, num_bytes=num_bytes, cap=cap, links=route, now_s=now)
            under_way[key] = True
    assert sent == pytest.approx({key: flow[1] for key, flow in enumerate(flows)}, rel=1e-6, abs=1e-6)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6))
def test_on_one_link_transfers_end_in_order_of_size(sizes):
    links = NetworkLinks({"wifi": 1.0})
    for key, size in enumerate(sizes):
        links.begin(key, num_bytes=size, cap=5.0, links=["wifi"], now_s=0.0)
    ended = run_out(links)
    by_size = sorted(range(len(sizes)), key=lambda key: sizes[key])
    assert all(ended[a] <= ended[b] + 1e-9 for a, b in pairwise(by_size))
    assert max(ended.values()) == pytest.approx(sum(sizes))
