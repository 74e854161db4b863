"""The wall clock takes arrivals as they come. A fleet's availability, dropouts and jitter are not acted on.

A device cannot be reached where it is a real one whose node is not there.
"""

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

from msgspec.structs import replace

from ...actors.pool import Pool
from ...learning.spec import NonNegative
from ...policies.estimate import Estimate
from ...policies.plan import Plan
from .costs import Costs
from .in_flight import Arrival, InFlightPlan
from .stream_load import Work
from .virtual_clock import LOOK_EVERY_S, VirtualClock


class WallClock:
    """Real seconds; arrivals as they come. What the virtual clock would charge is recorded as an estimate only."""

    SAVED: ClassVar = {"_before_s": NonNegative}  # by a checkpoint
    SAVED_AS = NonNegative
    NOT_SAVED = ("_pool", "_now", "_estimate", "journeys")

    def __init__(self, pool: Pool, *, now: Callable[[], float], estimate: Callable[[int, Plan], Estimate]) -> None:
        """``now``: seconds since the start of the run."""
        self._pool = pool
        self._now = now
        self._estimate = estimate
        self._before_s = 0.0  # of a run that was resumed
        self.journeys: dict[int, InFlightPlan] = {}  # nothing is simulated

    @property
    def time_s(self) -> float:
        """Seconds since the start of the run."""
        return self._before_s + self._now()

    def saved(self) -> float:
        """What a checkpoint must hold: the time."""
        return self.time_s

    def restore(self, time_s: float) -> None:
        """Go on from there."""
        self._before_s = time_s - self._now()

    def stop_early(self, plan: Plan, costs: Costs) -> Plan:
        """A plan that is to be sent, with the seconds that its device may train: by its own clock, less the transfers."""
        if plan.deadline_s is None:
            return plan
        cost = self._estimate(plan.device, plan)
        return replace(plan, train_s=max(0.0, plan.deadline_s - cost.down_s - cost.up_s))

    def dispatch(
        self, plan: Plan, *, down_bytes: int, flops: int, peak_memory_bytes: int, work: Work | None = None
    ) -> bool:
        """Nothing to simulate; the plan is to be carried out."""
        return True

    def next(self, deadline_s: float | None) -> Arrival | None:
        """The next plan that ends; None when ``deadline_s`` comes first."""
        timeout = None if deadline_s is None else max(0.0, deadline_s - self.time_s)
        found = self._pool.next(timeout)
        if found is None:
            return None
        return Arrival(time_s=self.time_s, finished=found, virtual=self._estimate(found.plan.device, found.plan))

    def abandon(self, plan_id: int) -> Arrival | None:
        """Nothing to forget, and nothing that is known."""
        return None

    def unreachable(self) -> frozenset[int]:
        """The real devices that are away."""
        return self._pool.unreachable()

    def next_reachable_s(self, devices: Iterable[int]) -> float:
        """When to look again whether a real device has joined; infinite where none is awaited."""
        return self.time_s + LOOK_EVERY_S if self._pool.awaited() else math.inf

    def wait(self, until_s: float) -> None:
        """Let time pass while nothing is in flight."""
        self._pool.wait(max(0.0, until_s - self.time_s))


Clock = VirtualClock | WallClock
