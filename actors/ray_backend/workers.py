"""The workers of the pool on Ray, their plans, how long one may take over a plan, and how often a plan is placed again."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from ...policies.plan import Plan
from ..pool import Task
from .ray_link import Way
from .ray_place import ActorPlacement

_QUEUE_PER_WORKER = 2  # plans: one runs, one waits


@dataclass(frozen=True)
class RunningPlan:
    """One plan with a worker: its three references, and the way to its host where it is split."""

    plan: Plan
    references: list[Any]
    way: Way | None


@dataclass
class WorkerHandle:
    """A worker: its place, actor and node, and the plans given to it. The first one runs, ``since`` then."""

    place: ActorPlacement
    actor: Any
    node: str
    running: dict[int, RunningPlan] = field(default_factory=dict)
    since: float = 0.0

    def give(self, call: RunningPlan) -> None:
        """One plan more."""
        if not self.running:
            self.since = time.monotonic()
        self.running[call.plan.id] = call

    @property
    def way(self) -> Way | None:
        """To the host of the plan that runs, where it has one."""
        return next(iter(self.running.values())).way if self.running else None

    def take(self, plan_id: int) -> RunningPlan:
        """A plan is over; the next one runs."""
        self.since = time.monotonic()
        return self.running.pop(plan_id)


@dataclass(frozen=True)
class HangTimeout:
    """Real seconds that a worker may take over one plan; None: any."""

    seconds: float | None

    def left_s(self, seats: Sequence[WorkerHandle], timeout_s: float | None) -> float | None:
        """How long to wait, at most ``timeout_s``, before one of them has taken too long."""
        begun = [seat.since for seat in seats if seat.running]
        if self.seconds is None or not begun:
            return timeout_s
        left = max(0.0, min(begun) + self.seconds - time.monotonic())
        return left if timeout_s is None else min(left, timeout_s)

    def renew(self, seats: Sequence[WorkerHandle]) -> None:
        """A host was at fault: who may have waited for it begins again."""
        for seat in seats:
            seat.since = time.monotonic() if seat.way is not None else seat.since

    def lost_with(self, seats: Sequence[WorkerHandle]) -> list[WorkerHandle]:
        """Those that have taken too long."""
        if self.seconds is None:
            return []
        now = time.monotonic()
        return [seat for seat in seats if seat.running and now - seat.since >= self.seconds]


class RetryBudget:
    """How often plans may be placed again."""

    def __init__(self, most: int) -> None:
        """``most``: deaths of workers and hosts that were at one plan."""
        self._most = most
        self._deaths: Counter[int] = Counter()

    def next(self, task: Task, *, at_it: bool) -> Task | None:
        """A task under its next attempt number, after one more death, if that was ``at_it``; None: it was the last."""
        self._deaths[task.plan.id] += at_it
        if self._deaths[task.plan.id] >= self._most:
            return None
        return replace(task, plan=msgspec.structs.replace(task.plan, attempt=task.plan.attempt + 1))

    def forget(self, plan_id: int) -> None:
        """A plan is over."""
        self._deaths.pop(plan_id, None)


def free_worker(seats: Sequence[WorkerHandle], group: str) -> WorkerHandle | None:
    """The least loaded of a group that has a place for a plan."""
    free = [seat for seat in seats if seat.place.group == group and len(seat.running) < _QUEUE_PER_WORKER]
    return min(free, key=lambda seat: len(seat.running)) if free else None


def group_name(group: str) -> str:
    """A group, for people."""
    return group or "the simulated devices"
