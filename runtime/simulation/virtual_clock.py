"""The virtual clock says when things would happen on the devices themselves.

Each plan in flight goes through three stages: its packet travels down, the device computes, its update travels up. The size of
the update is known only when the work has really been done, so the clock stops at the end of a plan's computation until a
worker has delivered that plan's result, while others may still be at work. A split plan streams while it computes, so its
result is needed when that begins. The clock never releases an arrival that a plan still in flight could precede: the same seed
gives the same order on any number of workers.

In any stage a plan can be lost: its device drops out, by the plan's fate, or cannot be reached any more. Its links and its host
are free at once; the server learns of it ``lost_after_s`` later. What had travelled and been computed is charged.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

from ...actors.pool import Pool, StreamBytes
from ...clusters.fleet import Fleet
from ...learning.spec import NonNegative
from ...policies.estimate import compute_s
from ...policies.plan import Plan
from ...policies.report import Outcome
from .availability import AvailabilitySchedule
from .costs import Costs
from .disruptions import NO_DISRUPTION, Disruption, DisruptionSampler
from .in_flight import Arrival, InFlightPlan
from .link_rates import Rates
from .links import Direction
from .stream_load import Work, charged, route
from .streams import Streams
from .transfers import Transfers

LOOK_EVERY_S = 1.0  # real seconds: whether a real device has joined
_DOWN, _UP, _STREAMS, _TIMERS, _LEAVING = range(5)  # what the clock's next event can be of


class VirtualClock:
    """Simulated seconds; arrivals in their simulated order."""

    # By a checkpoint.
    SAVED: ClassVar = {"time_s": NonNegative, "_transfers": Transfers, "_streams": Streams, "journeys": dict[int, InFlightPlan],
                       **dict.fromkeys(("_timers", "_leaving"), list[tuple[NonNegative, int]])}  # fmt: skip
    NOT_SAVED = ("_pool", "_fleet", "_rates", "_presence", "_fates")  # which follow from the seed and the time

    def __init__(
        self, fleet: Fleet, pool: Pool, *, seed: int = 0, fates: Callable[[Plan], Disruption] | None = None
    ) -> None:
        """At second 0, nothing in flight. ``seed``: of the run; ``fates``: in place of those drawn from it."""
        self.time_s = 0.0
        self._pool, self._fleet = pool, fleet
        self._transfers = Transfers(fleet)
        self._streams = Streams(up=self._transfers.up, down=self._transfers.down)
        self._rates = Rates(fleet)
        self._presence = AvailabilitySchedule(fleet, seed=seed)
        self._fates = fates or DisruptionSampler(fleet, seed=seed).of
        self.journeys: dict[int, InFlightPlan] = {}
        # (second, plan id): latencies and computations, whose ends are known when they begin
        self._timers: list[tuple[float, int]] = []
        self._leaving: list[tuple[float, int]] = []  # when devices of plans cannot be reached any more

    def stop_early(self, plan: Plan, costs: Costs) -> Plan:
        """A plan that is to be sent, as far as its device will get with it."""
        fate = self._fates(plan)
        return costs.stop_early(plan, self._rates.now(plan.device, fate, now_s=self.time_s), share=fate.steps)

    def dispatch(
        self, plan: Plan, *, down_bytes: int, flops: int, peak_memory_bytes: int, work: Work | None = None
    ) -> bool:
        """A plan leaves the server now; whether its result will be asked for. ``work``: what a split one computes."""
        replay = work is not None and work.replay  # the device does not hear of it
        fate = NO_DISRUPTION if replay else self._fates(plan)
        profile = self._rates.now(plan.device, fate, now_s=self.time_s)
        journey = InFlightPlan(plan, profile, fate, down_bytes, flops, peak_memory_bytes, work, began_s=self.time_s)
        self.journeys[plan.id] = journey
        if replay:
            heapq.heappush(self._timers, (self.time_s, plan.id))
            return True
        if not self._presence.reachable(plan.device, self.time_s):
            journey.down_bytes = journey.flops = 0
            journey.lose(stage="down", error="the device could not be reached", stream=StreamBytes())
            heapq.heappush(self._timers, (self.time_s, plan.id))
            return False
        if (until_s := self._presence.until_s(plan.device, self.time_s)) < math.inf:
            heapq.heappush(self._leaving, (until_s, plan.id))
        if fate.lost_in == "down":
            journey.down_bytes = int(down_bytes * fate.share)
        self._send(journey, "down", journey.down_bytes)
        return fate.lost_in in (None, "up") or (fate.lost_in == "train" and work is not None)

    def next(self, deadline_s: float | None) -> Arrival | None:
        """Advance to the next arrival; None when ``deadline_s`` comes first (the time is then ``deadline_s``)."""
        while self.journeys:
            time_s, plan_id, source = self._next_change()
            if deadline_s is not None and time_s > deadline_s:
                break
            self.time_s = max(self.time_s, time_s)
            arrival = self._change(plan_id, source)
            if arrival is not None:
                return arrival
        self.time_s = max(self.time_s, deadline_s or 0.0)
        return None

    def abandon(self, plan_id: int) -> Arrival | None:
        """Forget a plan, which frees its links and its host: what is charged for it until now. None: it has arrived already."""
        journey = self.journeys.pop(plan_id, None)
        if journey is None:  # something went wrong after it arrived
            return None
        stage, travelled = journey.told_stage, self._free(journey)
        if stage != "gone":
            stream = journey.broken_off(*travelled, now_s=self.time_s, by_fate=False)
            journey.lose(stage=stage, error="", stream=stream)
        return journey.arrival(time_s=self.time_s)

    def unreachable(self) -> frozenset[int]:
        """The devices that cannot be reached now; real ones too whose nodes are away."""
        return self._presence.unreachable(self.time_s) | self._pool.unreachable()

    def next_reachable_s(self, devices: Iterable[int]) -> float:
        """When the first of these can be reached; infinite: none ever. Real ones that are awaited may join now."""
        simulated = set(devices) - self._pool.unreachable()
        first_s = min((self._presence.next_s(device, self.time_s) for device in simulated), default=math.inf)
        return self.time_s if first_s == math.inf and self._pool.awaited() else first_s

    def wait(self, until_s: float) -> None:
        """Let time pass while nothing is in flight; real time, where no simulated time is to pass."""
        assert not self.journeys
        if until_s <= self.time_s:
            self._pool.wait(LOOK_EVERY_S)
        self.time_s = max(self.time_s, until_s)

    def _next_change(self) -> tuple[float, int, int]:
        """When, for which plan, and of which of the five the next event is; ties go to the plan with the smaller id."""
        while self._leaving and self._over(self._leaving[0][1]):
            heapq.heappop(self._leaving)
        timer = self._timers[0] if self._timers else None
        leaving = self._leaving[0] if self._leaving else None
        firsts = self._transfers.down.first(), self._transfers.up.first(), self._streams.first(), timer, leaving
        return min((*first, source) for source, first in enumerate(firsts) if first is not None)

    def _over(self, plan_id: int) -> bool:
        return plan_id not in self.journeys or self.journeys[plan_id].stage == "gone"

    def _change(self, plan_id: int, source: int) -> Arrival | None:
        """One stage of a plan, or an event of its stream, is over; the arrival, if it was the last."""
        journey = self.journeys[plan_id]
        if source == _LEAVING:
            heapq.heappop(self._leaving)
            self._lose(journey, "the device cannot be reached any more")
            return None
        if journey.stage == "stream":
            return self._streamed(journey, source)
        if source == _TIMERS:
            heapq.heappop(self._timers)
        if journey.stage == "gone":
            return self._arrive(journey)
        if journey.stage == "compute":
            if journey.fate.lost_in == "train":
                self._lose(journey)
                return None
            journey.finished = self._pool.result(plan_id)
            return self._computed(journey)
        if journey.sharing == "latency":
            self._transfers.join(journey, now_s=self.time_s)
            return None
        if journey.fate.lost_in == journey.stage:
            self._lose(journey)
            return None
        seconds = self._transfers.landed(journey, now_s=self.time_s)
        if journey.stage == "up":
            journey.up_s = seconds
            return self._arrive(journey)
        journey.down_s = seconds
        self._compute(journey)
        return None

    def _compute(self, journey: InFlightPlan) -> None:
        """The device has what it needs: it computes, and a split plan's stream begins."""
        journey.began_s = self.time_s
        if journey.work is not None:
            self._stream(journey, journey.work)
            return
        journey.stage = "compute"
        if journey.fate.lost_in == "train":
            journey.flops = int(journey.flops * journey.fate.share)
        seconds = compute_s(journey.flops, flop_per_s=journey.profile.flop_per_s)
        heapq.heappush(self._timers, (self.time_s + seconds, journey.plan.id))

    def _stream(self, journey: InFlightPlan, work: Work) -> None:
        """A split plan's stream begins."""
        plan, profile = journey.plan, self._rates.update(journey, now_s=self.time_s)
        assert plan.split is not None
        finished = journey.finished = self._pool.result(plan.id)
        replayed = work.replay and finished.report.outcome == Outcome.DONE
        up = work.nothing_sent if replayed else finished.stream.up
        if journey.fate.lost_in == "train":
            up = up[: int(len(up) * journey.fate.share)]
        host_flop_per_s = self._fleet.hosts.flop_per_s
        journey.stage = "stream"
        journey.load = work.load(
            up, finished.stream.down, flop_per_s=profile.flop_per_s, host_flop_per_s=host_flop_per_s
        )
        journey.flops = journey.load.flops
        self._streams.begin(plan.id, journey.load, route(self._fleet, profile, plan.split), now_s=self.time_s)

    def _streamed(self, journey: InFlightPlan, source: int) -> Arrival | None:
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
        if journey.fate.lost_in == "train":
            self._lost(journey, "stream", StreamBytes(tuple(journey.load.up), tuple(journey.load.down)))
            return None
        return self._computed(journey)

    def _computed(self, journey: InFlightPlan) -> Arrival | None:
        """The device is done: its update sets out. Without one (it failed, or trained nothing) the server hears at once."""
        finished, fate = journey.finished, journey.fate
        assert finished is not None
        if finished.update is None:
            if fate.lost_in == "up":  # nor does the server hear that it is done
                self._lost(journey, "up", finished.stream)
                return None
            return self._arrive(journey)
        size = finished.update.nbytes
        self._send(journey, "up", int(size * fate.share) if fate.lost_in == "up" else size)
        return None

    def _send(self, journey: InFlightPlan, stage: Direction, num_bytes: int) -> None:
        """A packet sets out."""
        self._rates.update(journey, now_s=self.time_s)
        ends_s = self._transfers.send(journey, stage, num_bytes, now_s=self.time_s)
        heapq.heappush(self._timers, (ends_s, journey.plan.id))

    def _arrive(self, journey: InFlightPlan) -> Arrival:
        """A journey is over."""
        del self.journeys[journey.plan.id]
        return journey.arrival(time_s=self.time_s)

    def _lose(self, journey: InFlightPlan, error: str = "") -> None:
        """The device is gone: by its fate, at the end of what that lets it do, or, with an ``error``, at any time."""
        stage = journey.told_stage
        stream = journey.broken_off(*self._free(journey), now_s=self.time_s, by_fate=not error)
        self._lost(journey, stage, stream, error)

    def _lost(self, journey: InFlightPlan, stage: str, stream: StreamBytes, error: str = "") -> None:
        """The server will learn of it."""
        if journey.finished is None:
            self._pool.cancel(journey.plan.id)
        journey.lose(stage=stage, error=error or "the device dropped out", stream=stream)
        heapq.heappush(self._timers, (self.time_s + self._fleet.server.lost_after_s, journey.plan.id))

    def _free(self, journey: InFlightPlan) -> tuple[int, int]:
        """Take a journey out of what it is in: bytes that had travelled; or packets that the host had got, and those done."""
        plan_id = journey.plan.id
        self._timers = [timer for timer in self._timers if timer[1] != plan_id]
        heapq.heapify(self._timers)
        if journey.stage == "stream":
            return self._streams.cancel(plan_id, now_s=self.time_s)
        if journey.stage in ("down", "up"):
            return self._transfers.break_off(journey, now_s=self.time_s), 0
        return 0, 0
