"""The wall clock: real seconds, and arrivals in the order in which results come in.

It ignores a fleet's availability, dropouts and jitter: only real devices whose nodes are absent are unreachable.
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
    """Real seconds, and arrivals as results come in. The virtual figures of a report are estimates."""

    SAVED: ClassVar = {"_before_s": NonNegative}  # in a checkpoint
    SAVED_AS = NonNegative
    NOT_SAVED = ("_pool", "_now", "_estimate", "plans_in_flight")

    def __init__(self, pool: Pool, *, now: Callable[[], float], estimate: Callable[[int, Plan], Estimate]) -> None:
        """``now``: seconds since the start of the run."""
        self._pool = pool
        self._now = now
        self._estimate = estimate
        self._before_s = 0.0  # seconds before the run was resumed
        self.plans_in_flight: dict[int, InFlightPlan] = {}  # nothing is simulated

    @property
    def time_s(self) -> float:
        """Seconds since the start of the run."""
        return self._before_s + self._now()

    @property
    def sends_s(self) -> float:
        """When a plan that is dispatched now is sent: at once."""
        return self.time_s

    def saved(self) -> float:
        """What a checkpoint holds: the time."""
        return self.time_s

    def restore(self, time_s: float) -> None:
        """Continue from ``time_s``."""
        self._before_s = time_s - self._now()

    def stop_early(self, plan: Plan, costs: Costs) -> Plan:
        """The plan with the seconds that its device may train, by the device's own clock: its deadline less the transfers."""
        if plan.deadline_s is None:
            return plan
        cost = self._estimate(plan.device, plan)
        return replace(plan, train_s=max(0.0, plan.deadline_s - cost.down_s - cost.up_s))

    def dispatch(
        self, plan: Plan, *, down_bytes: int, flops: int, peak_memory_bytes: int, work: Work | None = None
    ) -> bool:
        """Nothing is simulated; every plan's result is needed."""
        return True

    def next(self, deadline_s: float | None) -> Arrival | None:
        """The next result; None when ``deadline_s`` comes first."""
        timeout = None if deadline_s is None else max(0.0, deadline_s - self.time_s)
        found = self._pool.next(timeout)
        if found is None:
            return None
        return Arrival(time_s=self.time_s, finished=found, virtual=self._estimate(found.plan.device, found.plan))

    def spend(self, seconds: float) -> None:
        """Nothing: the server has spent real seconds."""

    def abandon(self, plan_id: int) -> Arrival | None:
        """Nothing was simulated, so nothing is charged."""
        return None

    def unreachable(self) -> frozenset[int]:
        """Real devices whose nodes are absent."""
        return self._pool.unreachable()

    def next_reachable_s(self, devices: Iterable[int]) -> float:
        """When to check again whether a real device has joined; infinite where none may still join."""
        return self.time_s + LOOK_EVERY_S if self._pool.awaited() else math.inf

    def wait(self, until_s: float) -> None:
        """Wait while nothing is in flight."""
        self._pool.wait(max(0.0, until_s - self.time_s))


Clock = VirtualClock | WallClock
