"""Actors that start: whoever is needed is sent for, others go on working, and one that dies before it is ready is tried again.

A bundle whose node is gone has no place until Ray finds one, which may take an autoscaler minutes, or never happen. Who asked
for an actor decides how long to wait for it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayTaskError

from .faults import DIED, LOADING_S, MOST_STARTS, first_line, placing_s

_LOOK_EVERY_S = 1.0  # at one that is late
AnyPlace = TypeVar("AnyPlace")


@dataclass(frozen=True)
class Arrived(Generic[AnyPlace]):
    """Who is ready: where it was wanted, the actor, and the id of its node."""

    place: AnyPlace
    actor: Any
    node: str


class NotStarted(Exception, Generic[AnyPlace]):
    """Nobody comes to ``place``. The cause is what Ray says: a ``RayTaskError`` of what was raised there, or a death."""

    def __init__(self, place: AnyPlace, why: str) -> None:
        """``why``: a sentence without its subject."""
        super().__init__(why)
        self.place = place


@dataclass
class _Start(Generic[AnyPlace]):
    """``since``: when it was sent for. ``placed_since``: from when on it may have had a place, as far as anybody has looked."""

    place: AnyPlace
    actor: Any
    number: int
    since: float
    placed_since: float


class PendingActors(Generic[AnyPlace]):
    """Actors under way, by the reference that tells when each is ready."""

    def __init__(
        self,
        start: Callable[[AnyPlace], tuple[Any, Any]],
        *,
        has_room: Callable[[AnyPlace], bool],
        timeout_s: float,
        tell: Callable[[AnyPlace, str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``start`` gives an actor and the reference of its node's id, which comes when it is ready.

        ``has_room``: whether Ray has found it a place. ``timeout_s``: that this may take. ``tell``: that one has died while it
        started, and why.
        """
        self._start, self._has_room, self._tell = start, has_room, tell
        self._timeout_s, self._now = placing_s(timeout_s), now
        self._under_way: dict[Any, _Start[AnyPlace]] = {}

    @property
    def references(self) -> list[Any]:
        """Of all that are under way; ``came`` takes each."""
        return list(self._under_way)

    @property
    def places(self) -> list[AnyPlace]:
        """Where somebody is to come."""
        return [start.place for start in self._under_way.values()]

    def send_for(self, place: AnyPlace) -> None:
        """Start an actor."""
        self._send(place, 1)

    def came(self, reference: Any) -> Arrived[AnyPlace] | None:
        """Who is ready; None where it has died, and another was sent for. Raises ``NotStarted``."""
        start = self._under_way.pop(reference)
        try:
            node = ray.get(reference)
        except DIED as error:
            why = first_line(error)
            if start.number == MOST_STARTS:
                raise NotStarted(start.place, f"it died while it started: {why}") from error
            self._tell(start.place, why)
            self._send(start.place, start.number + 1)
            return None
        except RayTaskError as error:
            ray.kill(start.actor, no_restart=True)
            raise NotStarted(start.place, first_line(error.cause)) from error
        return Arrived(start.place, start.actor, node)

    def left_s(self) -> float | None:
        """Seconds until ``late`` is to be looked at; None where nobody is under way."""
        ends = [start.since + self._timeout_s - self._now() for start in self._under_way.values()]
        return max(_LOOK_EVERY_S, min(ends)) if ends else None

    def late(self) -> Iterator[tuple[AnyPlace, bool, str]]:
        """Those that should have a place, or be ready: where, whether it has a place, and a sentence without its subject."""
        now = self._now()
        for start in [start for start in self._under_way.values() if now - start.since >= self._timeout_s]:
            if not self._has_room(start.place):
                start.placed_since = now
                yield start.place, False, f"its bundle has found no place within {self._timeout_s:g} s"
            elif now - start.placed_since >= LOADING_S:
                yield start.place, True, f"it was not ready {LOADING_S:g} s after it had a place"

    def drop(self, place: AnyPlace) -> None:
        """Wait no more for who was to come here."""
        for reference in [reference for reference, start in self._under_way.items() if start.place == place]:
            ray.kill(self._under_way.pop(reference).actor, no_restart=True)

    def close(self) -> None:
        """Wait for nobody."""
        for place in self.places:
            self.drop(place)

    def _send(self, place: AnyPlace, number: int) -> None:
        actor, ready = self._start(place)
        now = self._now()
        self._under_way[ready] = _Start(place, actor, number, since=now, placed_since=now + self._timeout_s)
