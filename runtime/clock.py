"""The clocks. The virtual one says when things would happen on the devices themselves; the wall clock takes them as they come.

Under the virtual clock each plan in flight goes through three stages: its packet travels down, the device computes, its
update travels up. The size of the update is known only when the work has really been done, so the clock stops at the
end of a plan's computation until a worker has delivered that plan's result, while others may still be at work. A
split plan streams while it computes, so its result is needed when that begins. The clock never releases an arrival that a
plan still in flight could precede: the same seed gives the same order on any number of workers.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from ..actors.pool import Finished, Pool
from ..clusters.fleet import Fleet
from ..clusters.profile import DeviceProfile
from ..policies.estimate import NO_STREAM, StreamCharge, charge, compute_s, transfer_s
from ..policies.plan import Plan
from ..policies.report import Estimate, Outcome
from .links import SERVER_LINK, Direction, Link, Links, capacities, crossed
from .stream_load import Load, Work, charged, route
from .streams import Streams

_DOWN, _UP, _STREAMS, _TIMERS = range(4)  # what the clock's next event can be of


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
    peak_memory_bytes: int
    work: Work | None = None
    stage: str = "down"  # then "compute", or "stream" of a split plan, then "up"
    sharing: str = ""  # on a shared link: "latency", then "under way"
    num_bytes: int = 0
    transfer_s: float = 0.0
    down_s: float = 0.0
    load: Load | None = None
    crossing: StreamCharge = NO_STREAM
    finished: Finished | None = None


class VirtualClock:
    """Simulated seconds; arrivals in their simulated order."""

    def __init__(self, fleet: Fleet, pool: Pool) -> None:
        """At second 0, nothing in flight."""
        self.time_s = 0.0
        self._pool = pool
        self._down = Links(capacities(fleet, "down"))
        self._up = Links(capacities(fleet, "up"))
        self._streams = Streams(up=self._up, down=self._down)
        self._fleet = fleet
        self._profiles = fleet.profiles()
        self._journeys: dict[int, _Journey] = {}
        # (second, plan id): latencies and computations, whose ends are known when they begin
        self._timers: list[tuple[float, int]] = []

    def dispatch(
        self, plan: Plan, *, down_bytes: int, flops: int, peak_memory_bytes: int, work: Work | None = None
    ) -> None:
        """A plan leaves the server now. ``work``: what a split one makes its device and its host compute."""
        journey = _Journey(plan, self._profiles[plan.device], down_bytes, flops, peak_memory_bytes, work)
        self._journeys[plan.id] = journey
        if work is not None and work.replay:  # the device does not hear of it
            heapq.heappush(self._timers, (self.time_s, plan.id))
        else:
            self._send(journey, "down", down_bytes)

    def next(self, deadline_s: float | None) -> Arrival | None:
        """Advance to the next arrival; None when ``deadline_s`` comes first (the time is then ``deadline_s``)."""
        while self._journeys:
            time_s, plan_id, source = self._next_change()
            if deadline_s is not None and time_s > deadline_s:
                break
            self.time_s = max(self.time_s, time_s)
            arrival = self._change(plan_id, source)
            if arrival is not None:
                return arrival
        if deadline_s is not None:
            self.time_s = max(self.time_s, deadline_s)
        return None

    def cancel(self, plan_id: int) -> None:
        """Forget a plan: its transfer, if one is under way, frees its link."""
        journey = self._journeys.pop(plan_id, None)  # None: it has arrived, and what followed went wrong
        self._timers = [timer for timer in self._timers if timer[1] != plan_id]
        heapq.heapify(self._timers)
        if journey is not None and journey.stage == "stream":
            self._streams.cancel(plan_id, now_s=self.time_s)
        elif journey is not None and journey.sharing == "under way":
            (self._down if journey.stage == "down" else self._up).end(plan_id, now_s=self.time_s)

    def _next_change(self) -> tuple[float, int, int]:
        """When, for which plan, and of which of the four the next event is; ties go to the plan with the smaller id."""
        timer = self._timers[0] if self._timers else None
        firsts = self._down.first(), self._up.first(), self._streams.first(), timer
        return min((*first, source) for source, first in enumerate(firsts) if first is not None)

    def _change(self, plan_id: int, source: int) -> Arrival | None:
        """One stage of a plan, or an event of its stream, is over; the arrival, if it was the last."""
        journey = self._journeys[plan_id]
        if journey.stage == "stream":
            return self._streamed(journey, source)
        if source == _TIMERS:
            heapq.heappop(self._timers)
        if journey.stage == "compute":
            journey.finished = self._pool.result(plan_id)
            return self._computed(journey)
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
        journey.down_s = journey.transfer_s
        if journey.work is not None:
            self._stream(journey, journey.work)
            return None
        journey.stage = "compute"
        seconds = compute_s(journey.flops, flop_per_s=journey.profile.flop_per_s)
        heapq.heappush(self._timers, (self.time_s + seconds, plan_id))
        return None

    def _stream(self, journey: _Journey, work: Work) -> None:
        """A split plan's stream begins."""
        plan, profile = journey.plan, journey.profile
        assert plan.split is not None
        finished = journey.finished = self._pool.result(plan.id)
        replayed = work.replay and finished.report.outcome == Outcome.DONE
        journey.stage, journey.load = (
            "stream",
            work.load(
                work.nothing_sent if replayed else finished.stream.up,
                finished.stream.down,
                flop_per_s=profile.flop_per_s,
                host_flop_per_s=self._fleet.hosts.flop_per_s,
            ),
        )
        journey.flops = journey.load.flops
        self._streams.begin(plan.id, journey.load, route(self._fleet, profile, plan.split), now_s=self.time_s)

    def _streamed(self, journey: _Journey, source: int) -> Arrival | None:
        """An event of a plan's stream, or one of its packets has landed."""
        if source != _STREAMS:
            direction: Direction = "down" if source == _DOWN else "up"
            self._streams.landed(journey.plan.id, direction, now_s=self.time_s)
            return None
        seconds = self._streams.change()
        if seconds is None:
            return None
        assert journey.load is not None
        journey.crossing = charged(journey.load, seconds, flop_per_s=journey.profile.flop_per_s)
        return self._computed(journey)

    def _computed(self, journey: _Journey) -> Arrival | None:
        """The device is done: its update sets out. Without one (it failed, or trained nothing) the server hears at once."""
        assert journey.finished is not None
        if journey.finished.update is None:
            return self._arrive(journey, up_s=0.0)
        self._send(journey, "up", journey.finished.update.nbytes)
        return None

    def _send(self, journey: _Journey, stage: Direction, num_bytes: int) -> None:
        """A packet sets out: after the latency it joins the shared links, or has its own link to itself."""
        journey.stage, journey.num_bytes = stage, num_bytes
        _, rate, shared = self._way(journey)
        if shared:
            journey.sharing = "latency"
            heapq.heappush(self._timers, (self.time_s + journey.profile.latency_s, journey.plan.id))
        else:
            seconds = transfer_s(num_bytes, bytes_per_s=rate, latency_s=journey.profile.latency_s)
            journey.transfer_s = seconds
            heapq.heappush(self._timers, (self.time_s + seconds, journey.plan.id))

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

    def _way(self, journey: _Journey) -> tuple[int, float, tuple[Link, ...]]:
        """What a packet's way is like: its bytes, the device's own rate, and the shared links that it crosses."""
        direction: Direction = "down" if journey.stage == "down" else "up"
        rate = getattr(journey.profile, f"{direction}_bytes_per_s")
        return journey.num_bytes, rate, crossed(self._fleet, journey.profile, direction, to=SERVER_LINK)


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

    def dispatch(
        self, plan: Plan, *, down_bytes: int, flops: int, peak_memory_bytes: int, work: Work | None = None
    ) -> None:
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
