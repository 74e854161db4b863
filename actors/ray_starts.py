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

from .ray_faults import DIED, LOADING_S, MOST_STARTS, first_line, is_placed, placing_s

_LOOK_EVERY_S = 1.0  # at one that is late
Place = TypeVar("Place")


@dataclass(frozen=True)
class Arrived(Generic[Place]):
    """Who is ready: where it was wanted, the actor, and the id of its node."""

    place: Place
    actor: Any
    node: str


class NotStarted(Exception, Generic[Place]):
    """Nobody comes to ``place``. The cause is what Ray says: a ``RayTaskError`` of what was raised there, or a death."""

    def __init__(self, place: Place, why: str) -> None:
        """``why``: a sentence without its subject."""
        super().__init__(why)
        self.place = place


@dataclass(frozen=True)
class _Start(Generic[Place]):
    place: Place
    actor: Any
    number: int
    since: float
    placed: bool  # for certain


class Starts(Generic[Place]):
    """Actors under way, by the reference that tells when each is ready."""

    def __init__(
        self,
        start: Callable[[Place], tuple[Any, Any]],
        *,
        placement: Any,
        timeout_s: float,
        tell: Callable[[Place, str], None],
    ) -> None:
        """``start`` gives an actor and the reference of its node's id, which comes when it is ready.

        ``timeout_s``: that Ray may take to find one a place. ``tell``: that one has died while it started, and why.
        """
        self._start, self._placement, self._tell = start, placement, tell
        self._timeout_s = placing_s(timeout_s)
        self._under_way: dict[Any, _Start[Place]] = {}

    @property
    def references(self) -> list[Any]:
        """Of all that are under way; ``came`` takes each."""
        return list(self._under_way)

    @property
    def places(self) -> list[Place]:
        """Where somebody is to come."""
        return [start.place for start in self._under_way.values()]

    def send_for(self, place: Place, *, placed: bool = False) -> None:
        """Start an actor. ``placed``: its bundle has a place, whatever the others of the group have."""
        self._send(place, 1, placed=placed)

    def came(self, reference: Any) -> Arrived[Place] | None:
        """Who is ready; None where it has died, and another was sent for. Raises ``NotStarted``."""
        start = self._under_way.pop(reference)
        try:
            return Arrived(start.place, start.actor, ray.get(reference))
        except DIED as error:
            why = first_line(error)
            if start.number == MOST_STARTS:
                raise NotStarted(start.place, f"it died while it started: {why}") from error
        except RayTaskError as error:
            ray.kill(start.actor, no_restart=True)
            raise NotStarted(start.place, first_line(error.cause)) from error
        self._tell(start.place, why)
        self._send(start.place, start.number + 1, placed=start.placed)
        return None

    def left_s(self) -> float | None:
        """Seconds until ``late`` is to be looked at; None where nobody is under way."""
        now = time.monotonic()
        return min(
            (max(_LOOK_EVERY_S, start.since + self._timeout_s - now) for start in self._under_way.values()),
            default=None,
        )

    def late(self) -> Iterator[tuple[Place, bool, str]]:
        """Those that should have a place, or be ready: where, whether it has a place, and a sentence without its subject."""
        now = time.monotonic()
        late = [start for start in self._under_way.values() if now - start.since >= self._timeout_s]
        placed = not late or is_placed(self._placement)
        for start in late:
            if not (placed or start.placed):
                yield start.place, False, f"its bundle has found no place within {self._timeout_s:g} s"
            elif now - start.since >= self._timeout_s + LOADING_S:
                yield start.place, True, f"it was not ready within {self._timeout_s + LOADING_S:g} s"

    def drop(self, place: Place) -> None:
        """Wait no more for who was to come here."""
        for reference in [reference for reference, start in self._under_way.items() if start.place == place]:
            ray.kill(self._under_way.pop(reference).actor, no_restart=True)

    def close(self) -> None:
        """Wait for nobody."""
        for place in self.places:
            self.drop(place)

    def _send(self, place: Place, number: int, *, placed: bool) -> None:
        actor, ready = self._start(place)
        self._under_way[ready] = _Start(place, actor, number, time.monotonic(), placed)
