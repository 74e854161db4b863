"""Detects actors that hang: stopped, in a deadlock, or blocked on a disk that does not answer.

One mechanism, a stopwatch for each actor, with two sources of activity. A worker is active when one of its plans ends. A
partition host is active when it answers any call; since none may be pending, ``Heartbeats`` adds one regularly. A host executes
its calls in order, so a busy host answers its heartbeat late, but other answers reset its stopwatch meanwhile.
"""

import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, TypeVar

_HEARTBEAT_PERIOD = 0.25  # of the limit
Actor = TypeVar("Actor")


class HangDetector(Generic[Actor]):
    """Stopwatches of the actors from which activity is expected. An actor hangs when its stopwatch reaches the limit."""

    def __init__(self, limit_s: float | None, *, now: Callable[[], float] = time.monotonic) -> None:
        """``limit_s``: in real seconds; None: no limit, so that no actor ever hangs."""
        self.limit_s, self._now = limit_s, now
        self._since: dict[Actor, float] = {}

    def restart(self, actor: Actor) -> None:
        """Start an actor's stopwatch at zero: activity is expected, or has just been seen."""
        self._since[actor] = self._now()

    def stop(self, actor: Actor) -> None:
        """No activity is expected of an actor any more."""
        self._since.pop(actor, None)

    def left_s(self, *, ignoring: Collection[Actor] = ()) -> float | None:
        """Seconds until an actor reaches the limit; None if none can. ``ignoring``: actors that are not judged now."""
        started = [since for actor, since in self._since.items() if actor not in ignoring]
        if self.limit_s is None or not started:
            return None
        return max(0.0, min(started) + self.limit_s - self._now())

    def hung(self, *, ignoring: Collection[Actor] = ()) -> list[Actor]:
        """The actors that hang. ``ignoring``: as in ``left_s``."""
        if self.limit_s is None:
            return []
        now = self._now()
        return [actor for actor, since in self._since.items() if actor not in ignoring and now - since >= self.limit_s]


class Heartbeats(Generic[Actor]):
    """Asks actors for heartbeats, a quarter of the limit after their last activity, and detects those that do not answer.

    ``Actor`` has a ``handle``, whose actor has a method ``heartbeat``.
    """

    def __init__(self, limit_s: float | None, *, now: Callable[[], float] = time.monotonic) -> None:
        """``limit_s``: real seconds without an answer; None: no limit, and no heartbeats."""
        self.limit_s, self._now = limit_s, now
        self._pending: dict[Actor, Any] = {}  # references of heartbeats that have not come
        self._next_s: dict[Actor, float] = {}  # when the others are asked again
        self._detector = HangDetector[Actor](limit_s, now=now)

    def request(self, actors: Iterable[Any]) -> list[Any]:
        """Ask the actors that are due for a heartbeat; the references of all heartbeats that have not come yet."""
        if self.limit_s is None:
            return []
        now = self._now()
        for actor in actors:
            if actor not in self._pending and now >= self._next_s.get(actor, now):
                self._pending[actor] = actor.handle.heartbeat.remote()
                self._detector.restart(actor)
        return list(self._pending.values())

    def received(self, reference: Any) -> bool:
        """Note that a call has returned, if it is a heartbeat; whether it is one."""
        for actor, pending in self._pending.items():
            if pending is reference:
                del self._pending[actor]
                self._detector.stop(actor)
                self.note_activity(actor)
                return True
        return False

    def note_activity(self, actor: Actor) -> None:
        """An actor has answered another call."""
        if self.limit_s is None:
            return
        if actor in self._pending:
            self._detector.restart(actor)
        else:
            self._next_s[actor] = self._now() + _HEARTBEAT_PERIOD * self.limit_s

    def is_pending(self, actor: Actor) -> bool:
        """Whether an actor has not answered its last heartbeat yet, and may hang."""
        return actor in self._pending

    def left_s(self) -> float | None:
        """Seconds until an actor hangs or is to be asked; None if there is none."""
        now = self._now()
        due = [max(0.0, next_s - now) for actor, next_s in self._next_s.items() if actor not in self._pending]
        hangs = self._detector.left_s()
        return min([*due, *([] if hangs is None else [hangs])], default=None)

    def hung(self) -> list[Actor]:
        """The actors that hang."""
        return self._detector.hung()

    def forget(self, actor: Actor) -> None:
        """An actor has ended."""
        self._pending.pop(actor, None)
        self._next_s.pop(actor, None)
        self._detector.stop(actor)
