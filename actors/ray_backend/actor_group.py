"""A group of supervised actors on Ray: how they are started, retried, replaced, moved and given up, and what is reported.

    start ──► starting ──► ready ──► died, or ended by ``replace``: started again
                 ├── died before it was ready: started again, ``MAX_STARTS`` times in all, then failed
                 ├── raised an error: failed
                 ├── not ready ``LOADING_S`` after it was placed: failed
                 └── not placed in time: moved to its fallback; without one, left starting while its group has another
                     actor that is ready, or placed; else failed

A bundle whose node has died has no place until Ray finds one, which may take an autoscaler minutes, or never happen. The other
actors go on working meanwhile. The workers of a run, those of real devices among them, are one such group, its partition hosts
another, its distiller a third. What a failed actor means for the run is decided by the owner of the group.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayTaskError

from ..pool import WorkerFailure
from .actor_placement import ActorPlacement
from .failures import ACTOR_DIED, first_line

MAX_STARTS = 3  # of one actor that dies before it is ready
LOADING_S = 120.0  # that an actor may take to load data and model after it was placed
_MIN_PLACEMENT_S = 5.0  # even a bundle that fits takes a moment to be placed
_POLL_S = 1.0  # between two checks of an actor that is late


@dataclass(eq=False)
class GroupMember:
    """An actor that is ready: its placement, its handle and the id of its node."""

    placement: ActorPlacement
    handle: Any
    node: str


Member = TypeVar("Member", bound=GroupMember)


@dataclass(frozen=True)
class StartFailure:
    """An actor that could not be started.

    ``reason``: why. ``cause``: what Ray raised, a ``RayTaskError`` of what the actor raised, or one of ``ACTOR_DIED``; None: it
    took too long. ``death``: why the actor that it was to replace had died; "": it replaces none.
    """

    placement: ActorPlacement
    reason: str
    cause: BaseException | None = None
    death: str = ""

    @property
    def predicate(self) -> str:
        """What happened, as a sentence without its subject."""
        if self.death:
            return f"died ({self.death}) and could not be replaced ({self.reason})"
        return f"could not be started ({self.reason})"

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.placement.name} {self.predicate}"

    def error(self) -> Exception:
        """The error that ends a run that needs the actor: a ``ValueError`` that the actor raised is the user's mistake."""
        if isinstance(self.cause, RayTaskError):
            return self.cause.cause if isinstance(self.cause.cause, ValueError) else self.cause
        return WorkerFailure(str(self))


@dataclass
class _Start:
    """An actor that is starting. ``since``: when it was started; ``placed_since``: from when on it may have been placed."""

    placement: ActorPlacement
    handle: Any
    attempt: int
    since: float
    placed_since: float
    at_fallback: bool

    @property
    def current(self) -> ActorPlacement:
        """Where it is started now."""
        return self.placement.at_fallback() if self.at_fallback else self.placement


class ActorGroup(Generic[Member]):
    """At most one actor for each placement.

    ``ready``: the actors that are ready. ``failed``: those that could not be started, until the owner removes them.
    """

    def __init__(
        self,
        start: Callable[[ActorPlacement], tuple[Any, Any]],
        member: Callable[[ActorPlacement, Any, str], Member],
        *,
        placement_timeout_s: float,
        report: Callable[[str], None],
        is_placed: Callable[[ActorPlacement], bool] = ActorPlacement.is_placed,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``start``: creates an actor; its handle, and the reference of its first call, which returns the id of its node.

        ``member``: makes the record of an actor that is ready. ``placement_timeout_s``: for Ray to place a bundle, 5 s at
        least. ``report``: receives sentences for the operator.
        """
        self._create, self._member, self._report = start, member, report
        self._placement_timeout_s = max(placement_timeout_s, _MIN_PLACEMENT_S)
        self._is_placed, self._now = is_placed, now
        self._starting: dict[Any, _Start] = {}  # by the reference of the first call
        self._queued: deque[ActorPlacement] = deque()
        self._deaths: dict[ActorPlacement, str] = {}  # of actors whose replacements are starting
        self._reported_pending: set[ActorPlacement] = set()
        self.ready: dict[ActorPlacement, Member] = {}
        self.failed: dict[ActorPlacement, StartFailure] = {}

    @property
    def references(self) -> list[Any]:
        """References of the actors that are starting, to wait for; ``arrived`` takes each."""
        return list(self._starting)

    @property
    def pending(self) -> list[ActorPlacement]:
        """Placements whose actors are starting or queued."""
        return [start.placement for start in self._starting.values()] + list(self._queued)

    def is_loading(self, placement: ActorPlacement) -> bool:
        """Whether an actor is placed, and not ready yet."""
        return any(start.placement == placement and self._is_placed(start.current) for start in self._starting.values())

    def start(self, placement: ActorPlacement) -> None:
        """Start an actor."""
        self._start(placement, attempt=1)

    def start_staggered(self, placements: Iterable[ActorPlacement], *, at_once: int) -> None:
        """Start the first ``at_once`` actors, and one more whenever one is ready or has failed."""
        self._queued.extend(placements)
        for _ in range(at_once):
            self._start_next()

    def arrived(self, reference: Any) -> Member | None:
        """The first call to an actor has ended. The actor, if it is ready; None if it is started again or has failed."""
        start = self._starting.pop(reference)
        try:
            node = ray.get(reference)
        except ACTOR_DIED as error:
            self._retry(start, error)
            return None
        except RayTaskError as error:
            ray.kill(start.handle, no_restart=True)
            self._fail(start.placement, first_line(error.cause), error)
            return None
        member = self.ready[start.placement] = self._member(start.placement, start.handle, node)
        self._deaths.pop(start.placement, None)
        self._reported_pending.discard(start.placement)
        self._start_next()
        return member

    def replace(self, member: Member, reason: str) -> None:
        """An actor has died, or is to be ended: start another one in its placement. ``reason``: why."""
        self.discard(member.placement)
        self._report(f"{member.placement.name} died ({reason}) and is replaced")
        self._deaths[member.placement] = reason
        self.start(member.placement)

    def discard(self, placement: ActorPlacement) -> None:
        """End an actor that is ready or starting, without replacement."""
        if placement in self.ready:
            ray.kill(self.ready.pop(placement).handle, no_restart=True)  # it may still live
        for reference in [ref for ref, start in self._starting.items() if start.placement == placement]:
            ray.kill(self._starting.pop(reference).handle, no_restart=True)

    def take_failed(self) -> list[StartFailure]:
        """The actors that could not be started since the last call."""
        failed, self.failed = list(self.failed.values()), {}
        return failed

    def on_node(self, node: str) -> list[Member]:
        """The actors on a node."""
        return [member for member in self.ready.values() if member.node == node]

    def left_s(self) -> float | None:
        """Seconds until ``check_late`` has something to do; None if no actor is starting."""
        ends = [start.since + self._placement_timeout_s - self._now() for start in self._starting.values()]
        return max(_POLL_S, min(ends)) if ends else None

    def check_late(self) -> None:
        """Move or give up the actors that should have been placed, or ready, by now."""
        now = self._now()
        for start in [s for s in self._starting.values() if now - s.since >= self._placement_timeout_s]:
            if not self._is_placed(start.current):
                start.placed_since = now
                self._not_placed(start)
            elif now - start.placed_since >= LOADING_S:
                self.discard(start.placement)
                self._fail(start.placement, f"it was not ready {LOADING_S:g} s after it was placed")

    def close(self) -> None:
        """End all actors."""
        self._queued.clear()
        for placement in [*self.ready, *self.pending]:
            self.discard(placement)

    def _start(self, placement: ActorPlacement, *, attempt: int, at_fallback: bool = False) -> None:
        handle, first_call = self._create(placement.at_fallback() if at_fallback else placement)
        now = self._now()
        self._starting[first_call] = _Start(
            placement, handle, attempt, now, now + self._placement_timeout_s, at_fallback
        )

    def _start_next(self) -> None:
        if self._queued:
            self.start(self._queued.popleft())

    def _retry(self, start: _Start, error: BaseException) -> None:
        """An actor has died before it was ready."""
        reason = first_line(error)
        if start.attempt == MAX_STARTS:
            self._fail(start.placement, f"it died while it started: {reason}", error)
            return
        self._report(f"{start.placement.name} died while it started ({reason}) and is replaced")
        self._start(start.placement, attempt=start.attempt + 1, at_fallback=start.at_fallback)

    def _not_placed(self, start: _Start) -> None:
        """The bundle of an actor was not placed in time."""
        placement = start.placement
        reason = f"its bundle has found no place within {self._placement_timeout_s:g} s"
        if placement.fallback is not None and not start.at_fallback:
            self._report(f"{placement.name}: {reason}; it goes on beside the server")
            self.discard(placement)
            self._start(placement, attempt=1, at_fallback=True)
        elif not self._has_another(placement):
            self.discard(placement)
            self._fail(placement, reason)
        elif placement not in self._reported_pending:
            self._reported_pending.add(placement)
            self._report(f"{placement.name} has found no place yet; {len(self.ready)} others are ready")

    def _has_another(self, placement: ActorPlacement) -> bool:
        """Whether another actor of a placement's group is ready, or is starting and placed."""
        others = [*self.ready, *(s.placement for s in self._starting.values() if self._is_placed(s.current))]
        return any(other.group == placement.group for other in others if other != placement)

    def _fail(self, placement: ActorPlacement, reason: str, cause: BaseException | None = None) -> None:
        """Give up an actor."""
        self.failed[placement] = StartFailure(placement, reason, cause, self._deaths.pop(placement, ""))
        self._start_next()
