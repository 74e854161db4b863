"""The virtual clock simulates when devices, links and partition hosts would do their work.

Each plan in flight has three stages: its packet goes down, the device computes, its update goes up. The size of the update is
known only once a worker has done the work, so at the end of a plan's simulated computation the clock waits for that plan's
result, while other plans may still be computed. A split plan's result is needed when its computation begins, since it streams
meanwhile. The clock is conservative: it never releases an arrival while a plan in flight could still have an earlier one, so
the same seed gives the same order with any number of workers.

A plan can be lost in any stage: its device drops out (``disruptions``) or becomes unreachable (``availability``). Its links
and its host are free at once; the server learns of the loss ``lost_after_s`` later. What was transferred and computed until
then is charged.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

from ...actors.pool import Pool, StreamBytes
from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile
from ...learning.spec import NonNegative
from ...policies.estimate import compute_s
from ...policies.plan import Plan
from ...policies.report import Outcome
from .availability import AvailabilitySchedule
from .costs import Costs
from .disruptions import NO_DISRUPTION, CurrentProfiles, Disruption, DisruptionSampler
from .in_flight import Arrival, InFlightPlan, Transfers
from .network_links import Direction
from .stream_load import Work, charged, route
from .streams import Streams

LOOK_EVERY_S = 1.0  # real seconds between checks whether a real device has joined
_DOWN, _UP, _STREAMS, _TIMERS, _LEAVING = range(5)  # sources of the clock's next event, in the order of ties


class VirtualClock:
    """Simulated seconds; arrivals in their simulated order."""

    # In a checkpoint. What is not saved follows from the seed and the time.
    SAVED: ClassVar = {
        "time_s": NonNegative,
        "_server_free_s": NonNegative,
        "_transfers": Transfers,
        "_streams": Streams,
        "plans_in_flight": dict[int, InFlightPlan],
        **dict.fromkeys(("_timers", "_leaving"), list[tuple[NonNegative, int]]),
    }
    NOT_SAVED = ("_pool", "_fleet", "_profiles", "_availability", "_disruption")

    def __init__(
        self, fleet: Fleet, pool: Pool, *, seed: int = 0, disruption: Callable[[Plan], Disruption] | None = None
    ) -> None:
        """At second 0, with nothing in flight. ``seed``: of the run. ``disruption``: replaces those drawn from the seed."""
        self.time_s = 0.0
        self._server_free_s = 0.0  # when the server has done its task, and sends plans again
        self._pool, self._fleet = pool, fleet
        self._transfers = Transfers(fleet)
        self._streams = Streams(up=self._transfers.up, down=self._transfers.down)
        self._profiles = CurrentProfiles(fleet)
        self._availability = AvailabilitySchedule(fleet, seed=seed)
        self._disruption = disruption or DisruptionSampler(fleet, seed=seed).of
        self.plans_in_flight: dict[int, InFlightPlan] = {}
        # (second, plan id): ends of latencies and computations, which are known when they begin
        self._timers: list[tuple[float, int]] = []
        self._leaving: list[tuple[float, int]] = []  # (second, plan id): when a plan's device becomes unreachable

    @property
    def sends_s(self) -> float:
        """When a plan that is dispatched now is sent: once the server is free."""
        return max(self.time_s, self._server_free_s)

    def stop_early(self, plan: Plan, costs: Costs) -> Plan:
        """The plan shortened to what its device has time for, before it is sent."""
        disruption = self._disruption(plan)
        profile = self._profiles.at(plan.device, disruption, now_s=self.sends_s)
        return costs.stop_early(plan, profile, share=disruption.steps)

    def dispatch(
        self, plan: Plan, *, down_bytes: int, flops: int, peak_memory_bytes: int, work: Work | None = None
    ) -> bool:
        """Dispatch a plan once the server is free. Returns whether its result will be needed. ``work``: of a split plan."""
        sent_s = self.sends_s
        replay = work is not None and work.replay  # on its host alone
        disruption = NO_DISRUPTION if replay else self._disruption(plan)
        profile = self._profiles.at(plan.device, disruption, now_s=sent_s)
        entry = InFlightPlan(plan, profile, disruption, down_bytes, flops, peak_memory_bytes, work, began_s=sent_s)
        self.plans_in_flight[plan.id] = entry
        if replay:
            heapq.heappush(self._timers, (sent_s, plan.id))
            return True
        if not self._availability.reachable(plan.device, sent_s):
            entry.down_bytes = entry.flops = 0
            entry.lose(stage="down", error="the device could not be reached", stream=StreamBytes())
            heapq.heappush(self._timers, (sent_s, plan.id))
            return False
        if (until_s := self._availability.until_s(plan.device, sent_s)) < math.inf:
            heapq.heappush(self._leaving, (until_s, plan.id))
        if disruption.lost_in == "down":
            entry.down_bytes = int(down_bytes * disruption.share)
        self._send(entry, "down", entry.down_bytes, now_s=sent_s)
        return disruption.lost_in in (None, "up") or (disruption.lost_in == "train" and work is not None)

    def next(self, deadline_s: float | None) -> Arrival | None:
        """Advance to the next arrival; None when ``deadline_s`` comes first (the time is then ``deadline_s``)."""
        while self.plans_in_flight:
            time_s, plan_id, source = self._next_event()
            if deadline_s is not None and time_s > deadline_s:
                break
            self.time_s = max(self.time_s, time_s)
            arrival = self._process(plan_id, source)
            if arrival is not None:
                return arrival
        self.time_s = max(self.time_s, deadline_s or 0.0)
        return None

    def spend(self, seconds: float) -> None:
        """The server is busy for so long: plans are sent afterwards, while updates that are under way arrive meanwhile."""
        self._server_free_s = self.time_s + seconds
        if not self.plans_in_flight:
            self.time_s = self._server_free_s

    def abandon(self, plan_id: int) -> Arrival | None:
        """Drop a plan, and free its links and its host. Returns what is charged for it until now; None: it has arrived."""
        entry = self.plans_in_flight.pop(plan_id, None)
        if entry is None:  # an error occurred after its arrival
            return None
        stage, completed = entry.reported_stage, self._free(entry)
        if stage != "gone":
            stream = entry.abort(*completed, now_s=self.time_s, planned=False)
            entry.lose(stage=stage, error="", stream=stream)
        return entry.arrival(time_s=self.time_s)

    def unreachable(self) -> frozenset[int]:
        """Devices that cannot be reached now, including real ones whose nodes are absent."""
        return self._availability.unreachable(self.time_s) | self._pool.unreachable()

    def next_reachable_s(self, devices: Iterable[int]) -> float:
        """When the first of these devices can be reached; infinite: never. Now, if only absent real ones may still join."""
        simulated = set(devices) - self._pool.unreachable()
        first_s = min((self._availability.next_s(device, self.time_s) for device in simulated), default=math.inf)
        return self.time_s if first_s == math.inf and self._pool.awaited() else first_s

    def wait(self, until_s: float) -> None:
        """Advance the time while nothing is in flight; wait in real time where ``until_s`` is not in the future."""
        assert not self.plans_in_flight
        if until_s <= self.time_s:
            self._pool.wait(LOOK_EVERY_S)
        self.time_s = max(self.time_s, until_s)

    def _next_event(self) -> tuple[float, int, int]:
        """Time, plan and source of the next event; ties go to the plan with the smaller id."""
        while self._leaving and self._has_ended(self._leaving[0][1]):
            heapq.heappop(self._leaving)
        timer = self._timers[0] if self._timers else None
        leaving = self._leaving[0] if self._leaving else None
        firsts = self._transfers.down.first(), self._transfers.up.first(), self._streams.first(), timer, leaving
        return min((*first, source) for source, first in enumerate(firsts) if first is not None)

    def _has_ended(self, plan_id: int) -> bool:
        return plan_id not in self.plans_in_flight or self.plans_in_flight[plan_id].stage == "gone"

    def _process(self, plan_id: int, source: int) -> Arrival | None:
        """Process an event: the end of a plan's stage, or one of its stream. Returns the plan's arrival if it has ended."""
        entry = self.plans_in_flight[plan_id]
        if source == _LEAVING:
            heapq.heappop(self._leaving)
            self._lose(entry, "the device cannot be reached any more")
            return None
        if entry.stage == "stream":
            return self._process_stream(entry, source)
        if source == _TIMERS:
            heapq.heappop(self._timers)
        if entry.stage == "gone":
            return self._arrive(entry)
        if entry.stage == "compute":
            if entry.disruption.lost_in == "train":
                self._lose(entry)
                return None
            entry.finished = self._pool.result(plan_id)
            return self._computed(entry)
        if entry.sharing == "latency":
            self._transfers.join(entry, now_s=self.time_s)
            return None
        if entry.disruption.lost_in == entry.stage:
            self._lose(entry)
            return None
        seconds = self._transfers.landed(entry, now_s=self.time_s)
        if entry.stage == "up":
            entry.up_s = seconds
            return self._arrive(entry)
        entry.down_s = seconds
        self._compute(entry)
        return None

    def _compute(self, entry: InFlightPlan) -> None:
        """The device has its packets: start its computation, or a split plan's stream."""
        entry.began_s = self.time_s
        if entry.work is not None:
            self._stream(entry, entry.work)
            return
        entry.stage = "compute"
        if entry.disruption.lost_in == "train":
            entry.flops = int(entry.flops * entry.disruption.share)
        seconds = compute_s(entry.flops, flop_per_s=entry.profile.flop_per_s)
        heapq.heappush(self._timers, (self.time_s + seconds, entry.plan.id))

    def _stream(self, entry: InFlightPlan, work: Work) -> None:
        """Start a split plan's stream."""
        plan, profile = entry.plan, self._update_profile(entry)
        assert plan.split is not None
        finished = entry.finished = self._pool.result(plan.id)
        replayed = work.replay and finished.report.outcome == Outcome.DONE
        up = work.nothing_sent if replayed else finished.stream.up
        if entry.disruption.lost_in == "train":
            up = up[: int(len(up) * entry.disruption.share)]
        host_flop_per_s = self._fleet.hosts.flop_per_s
        entry.stage = "stream"
        entry.load = work.load(up, finished.stream.down, flop_per_s=profile.flop_per_s, host_flop_per_s=host_flop_per_s)
        entry.flops = entry.load.flops
        self._streams.begin(plan.id, entry.load, route(self._fleet, profile, plan.split), now_s=self.time_s)

    def _process_stream(self, entry: InFlightPlan, source: int) -> Arrival | None:
        """Process an event of a plan's stream, or the end of one of its transfers on shared links."""
        if source != _STREAMS:
            direction: Direction = "down" if source == _DOWN else "up"
            self._streams.landed(entry.plan.id, direction, now_s=self.time_s)
            return None
        seconds = self._streams.change()
        if seconds is None:
            return None
        assert entry.load is not None
        entry.crossing = charged(entry.load, seconds, flop_per_s=entry.profile.flop_per_s)
        if entry.disruption.lost_in == "train":
            self._report_loss(entry, "stream", StreamBytes(tuple(entry.load.up), tuple(entry.load.down)))
            return None
        return self._computed(entry)

    def _computed(self, entry: InFlightPlan) -> Arrival | None:
        """The computation has ended: send the update. Without one (the plan failed, or trained nothing) it arrives at once."""
        finished, disruption = entry.finished, entry.disruption
        assert finished is not None
        if finished.update is None:
            if disruption.lost_in == "up":  # the report is lost too
                self._report_loss(entry, "up", finished.stream)
                return None
            return self._arrive(entry)
        size = finished.update.nbytes
        self._send(entry, "up", int(size * disruption.share) if disruption.lost_in == "up" else size)
        return None

    def _send(self, entry: InFlightPlan, stage: Direction, num_bytes: int, *, now_s: float | None = None) -> None:
        """Send a packet. ``now_s``: when (None: now)."""
        self._update_profile(entry)
        ends_s = self._transfers.send(entry, stage, num_bytes, now_s=self.time_s if now_s is None else now_s)
        heapq.heappush(self._timers, (ends_s, entry.plan.id))

    def _update_profile(self, entry: InFlightPlan) -> DeviceProfile:
        """Set the profile of a plan's device to the link rates of now."""
        entry.profile = self._profiles.at(entry.plan.device, entry.disruption, now_s=self.time_s)
        return entry.profile

    def _arrive(self, entry: InFlightPlan) -> Arrival:
        """A plan has ended."""
        del self.plans_in_flight[entry.plan.id]
        return entry.arrival(time_s=self.time_s)

    def _lose(self, entry: InFlightPlan, error: str = "") -> None:
        """The device is lost: where its disruption says so, at that point of the stage, or, with an ``error``, at any time."""
        stage = entry.reported_stage
        stream = entry.abort(*self._free(entry), now_s=self.time_s, planned=not error)
        self._report_loss(entry, stage, stream, error)

    def _report_loss(self, entry: InFlightPlan, stage: str, stream: StreamBytes, error: str = "") -> None:
        """Mark a plan as lost, and schedule when the server learns of it."""
        if entry.finished is None:
            self._pool.cancel(entry.plan.id)
        entry.lose(stage=stage, error=error or "the device dropped out", stream=stream)
        heapq.heappush(self._timers, (self.time_s + self._fleet.server.lost_after_s, entry.plan.id))

    def _free(self, entry: InFlightPlan) -> tuple[int, int]:
        """Remove a plan from timers, links and hosts.

        Returns what was completed: bytes transferred and 0, or packets received and micro-batches processed at the host.
        """
        plan_id = entry.plan.id
        self._timers = [timer for timer in self._timers if timer[1] != plan_id]
        heapq.heapify(self._timers)
        if entry.stage == "stream":
            return self._streams.cancel(plan_id, now_s=self.time_s)
        if entry.stage in ("down", "up"):
            return self._transfers.cancel(entry, now_s=self.time_s), 0
        return 0, 0
