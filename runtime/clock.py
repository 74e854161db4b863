"""The clocks. The virtual one says when things would happen on the devices themselves; the wall clock takes them as they come.

Under the virtual clock each plan in flight goes through three stages: its packet travels down, the device computes, its
update travels up. The size of the update is known only when the work has really been done, so the clock stops at the
end of a plan's computation until a worker has delivered that plan's result, while others may still be at work. It never
releases an arrival that a plan still in flight could precede: the same seed gives the same order on any number of workers.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from ..actors.pool import Finished, Pool
from ..clusters.fleet import Fleet
from ..clusters.profile import DeviceProfile
from ..policies.estimate import NO_STREAM, StreamCharge, charge, compute_s, stream, transfer_s
from ..policies.plan import Plan
from ..policies.report import Estimate
from .links import Link, Links

SERVER_LINK = "server"


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A plan's end: when, what came back, and what the clock charged for it."""

    time_s: float
    finished: Finished
    virtual: Estimate


@dataclass
class _Journey:
    """One plan in flight."""

    plan: Plan
    profile: DeviceProfile
    down_bytes: int
    flops: int
    host_flops: int
    peak_memory_bytes: int
    stage: str = "down"  # then "compute", then "up"
    sharing: str = ""  # on a shared link: "latency", then "under way"
    num_bytes: int = 0
    transfer_s: float = 0.0
    down_s: float = 0.0
    crossing: StreamCharge = NO_STREAM
    finished: Finished | None = None


class VirtualClock:
    """Simulated seconds; arrivals in their simulated order."""

    def __init__(self, fleet: Fleet, pool: Pool) -> None:
        """At second 0, nothing in flight."""
        self.time_s = 0.0
        self._pool = pool
        self._down = Links(_capacities(fleet, "down"))
        self._up = Links(_capacities(fleet, "up"))
        self._fleet = fleet
        self._server = fleet.server
        self._profiles = fleet.profiles()
        self._journeys: dict[int, _Journey] = {}
        # (second, plan id): latencies and computations, whose ends are known when they begin
        self._timers: list[tuple[float, int]] = []

    def dispatch(self, plan: Plan, *, down_bytes: int, flops: int, peak_memory_bytes: int, host_flops: int = 0) -> None:
        """A plan leaves the server now."""
        profile = self._profiles[plan.device]
        journey = _Journey(plan, profile, down_bytes, flops, host_flops, peak_memory_bytes)
        self._journeys[plan.id] = journey
        self._send(journey, "down", down_bytes)

    def next(self, deadline_s: float | None) -> Arrival | None:
        """Advance to the next arrival; None when ``deadline_s`` comes first (the time is then ``deadline_s``)."""
        while self._journeys:
            time_s, plan_id = self._next_change()
            if deadline_s is not None and time_s > deadline_s:
                break
            self.time_s = max(self.time_s, time_s)
            arrival = self._change(plan_id)
            if arrival is not None:
                return arrival
        if deadline_s is not None:
            self.time_s = max(self.time_s, deadline_s)
        return None

    def cancel(self, plan_id: int) -> None:
        """Forget a plan: its transfer, if one is under way, frees its link."""
        journey = self._journeys.pop(plan_id)
        self._timers = [timer for timer in self._timers if timer[1] != plan_id]
        heapq.heapify(self._timers)
        if journey.sharing == "under way":
            (self._down if journey.stage == "down" else self._up).end(plan_id, now_s=self.time_s)

    def _next_change(self) -> tuple[float, int]:
        """When and for which plan the next stage ends; ties go to the plan with the smaller id."""
        changes = [(t, key) for links in (self._down, self._up) for key, t in links.ends().items()]
        if self._timers:
            changes.append(self._timers[0])
        return min(changes)

    def _change(self, plan_id: int) -> Arrival | None:
        """One stage of a plan is over; the arrival, if it was the last."""
        journey = self._journeys[plan_id]
        if journey.sharing != "under way":
            heapq.heappop(self._timers)
        if journey.stage == "compute":
            journey.finished = journey.finished or self._pool.result(plan_id)
            if journey.finished.update is None:  # it failed on the device: the server hears of it at once
                return self._arrive(journey, up_s=0.0)
            self._send(journey, "up", journey.finished.update.nbytes)
            return None
        links = self._down if journey.stage == "down" else self._up
        if journey.sharing == "latency":
            journey.sharing = "under way"
            size, rate, shared = self._way(journey)
            links.begin(plan_id, num_bytes=size, cap=rate, links=shared, now_s=self.time_s)
            return None
        if journey.sharing == "under way":
            journey.transfer_s = journey.profile.latency_s + links.end(plan_id, now_s=self.time_s)
            journey.sharing = ""
        if journey.stage == "up":
            return self._arrive(journey, up_s=journey.transfer_s)
        journey.down_s, journey.stage = journey.transfer_s, "compute"
        if journey.plan.split is not None:  # how long it takes depends on what it streams
            journey.finished = self._pool.result(plan_id)
            journey.crossing = self._stream(journey, journey.finished)
        seconds = compute_s(journey.flops, flop_per_s=journey.profile.flop_per_s) + journey.crossing.seconds
        self._timer(self.time_s + seconds, plan_id)
        return None

    def _stream(self, journey: _Journey, finished: Finished) -> StreamCharge:
        """What a stream to a host takes, alone on its links."""
        return stream(
            finished.stream.up,
            finished.stream.down,
            **stream_rates(self._fleet, journey.profile),
            host_flops=journey.host_flops,
            host_flop_per_s=self._fleet.hosts.flop_per_s,
        )

    def _send(self, journey: _Journey, stage: str, num_bytes: int) -> None:
        """A packet sets out: after the latency it joins the shared links, or has its own link to itself."""
        journey.stage, journey.num_bytes = stage, num_bytes
        _, rate, shared = self._way(journey)
        if shared:
            journey.sharing = "latency"
            self._timer(self.time_s + journey.profile.latency_s, journey.plan.id)
        else:
            seconds = transfer_s(num_bytes, bytes_per_s=rate, latency_s=journey.profile.latency_s)
            journey.transfer_s = seconds
            self._timer(self.time_s + seconds, journey.plan.id)

    def _arrive(self, journey: _Journey, *, up_s: float) -> Arrival:
        """The record of a journey that is over."""
        del self._journeys[journey.plan.id]
        assert journey.finished is not None
        update = journey.finished.update
        up_bytes = 0 if update is None else update.nbytes
        virtual = charge(
            journey.profile,
            down_bytes=journey.down_bytes,
            flops=journey.flops,
            up_bytes=up_bytes,
            peak_memory_bytes=journey.peak_memory_bytes,
            down_s=journey.down_s,
            up_s=up_s,
            crossing=journey.crossing,
        )
        return Arrival(time_s=self.time_s, finished=journey.finished, virtual=virtual)

    def _way(self, journey: _Journey) -> tuple[int, float, list[Link]]:
        """What a packet's way is like: its bytes, the device's own rate, and the shared links that it crosses."""
        profile, down = journey.profile, journey.stage == "down"
        rate = profile.down_bytes_per_s if down else profile.up_bytes_per_s
        limit = self._server.down_bytes_per_s if down else self._server.up_bytes_per_s
        links: list[Link] = [profile.shared_link] if profile.shared_link else []
        return journey.num_bytes, rate, [*links, SERVER_LINK] if limit is not None else links

    def _timer(self, time_s: float, plan_id: int) -> None:
        """Something of ``plan_id`` ends at ``time_s``."""
        heapq.heappush(self._timers, (time_s, plan_id))


class WallClock:
    """Real seconds; arrivals as they come. What the virtual clock would charge is recorded as an estimate only."""

    def __init__(self, pool: Pool, *, now: Callable[[], float], estimate: Callable[[int, Plan], Estimate]) -> None:
        """``now``: seconds since the start of the run."""
        self._pool = pool
        self._now = now
        self._estimate = estimate

    @property
    def time_s(self) -> float:
        """Seconds since the start of the run."""
        return self._now()

    def dispatch(self, plan: Plan, *, down_bytes: int, flops: int, peak_memory_bytes: int, host_flops: int = 0) -> None:
        """Nothing to simulate."""

    def next(self, deadline_s: float | None) -> Arrival | None:
        """The next plan that ends; None when ``deadline_s`` comes first."""
        timeout = None if deadline_s is None else max(0.0, deadline_s - self.time_s)
        found = self._pool.next(timeout)
        if found is None:
            return None
        return Arrival(time_s=self.time_s, finished=found, virtual=self._estimate(found.plan.device, found.plan))

    def cancel(self, plan_id: int) -> None:
        """Nothing to forget."""


Clock = VirtualClock | WallClock


def own_rate(own: float, *shared: float | None) -> float:
    """The rate of a transfer that is alone on its links."""
    return min([own, *(rate for rate in shared if rate is not None)])


def stream_rates(fleet: Fleet, profile: DeviceProfile) -> dict[str, float]:
    """Rates and latency of a device's stream to its host when it is alone on its links; an unlimited host has none to add."""
    shared = fleet.shared_links.get(profile.shared_link) if profile.shared_link else None
    rates = {"latency_s": profile.latency_s}
    for field in ("up_bytes_per_s", "down_bytes_per_s"):
        limits = [getattr(shared, field) if shared else None, getattr(fleet.hosts, field)]
        rates[field] = own_rate(getattr(profile, field), *limits)
    return rates


def _capacities(fleet: Fleet, direction: str) -> dict[Link, float]:
    """Bytes per second of each shared link, the server's own included where it is limited."""
    field = f"{direction}_bytes_per_s"
    capacities: dict[Link, float] = {name: getattr(link, field) for name, link in fleet.shared_links.items()}
    server = getattr(fleet.server, field)
    return capacities | ({SERVER_LINK: server} if server is not None else {})
