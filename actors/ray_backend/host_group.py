"""The partition hosts that there are on Ray, and those that start: an actor in a bundle of its own for each.

One is sent for when a split plan first needs it, and after a death; others go on working meanwhile. Where its bundle finds no
place any more, it goes on in the server's: that has one as long as anybody asks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from ..pool import WorkerFailure
from .object_actor import ObjectActor, start_host
from .pending_actors import NotStarted, PendingActors
from .ray_place import ActorPlacement


class PartitionHostActor(ObjectActor):
    """The actor of a partition host. Ray names a process after the class in which the method that runs is written."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the partition host."""
        return super().call(method, *arguments)

    def sign(self) -> None:
        """A sign of life."""


class HostGroup:
    """``actors``, ``nodes``: of those that are ready, by number."""

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        places: Sequence[ActorPlacement],
        server: ActorPlacement,
        timeout_s: float,
        tell: Callable[[str], None],
    ) -> None:
        """``make``: a host's object, in its process. ``places``: of each host, and ``server``: the server's.

        ``timeout_s``: for Ray to find one a place. ``tell``: an operator. Nothing is started yet.
        """
        self._make, self._own, self._tell = make, places, tell
        # In the server's bundle it reserves nothing.
        self._beside_server = [replace(place, placement=server.placement, cpus=0.0) for place in places]
        self._starts = PendingActors(
            self._start,
            has_room=lambda number: self._place(number).has_room(),
            timeout_s=timeout_s,
            tell=self._died_early,
        )
        self._moved: set[int] = set()  # those in the server's bundle
        self._failed: dict[int, str] = {}  # those that could not start, and why
        self._why: dict[int, str] = {}  # of those that have died
        self.actors: dict[int, Any] = {}
        self.nodes: dict[int, str] = {}

    @property
    def coming(self) -> list[Any]:
        """References of those that start; ``arrived`` takes each."""
        return self._starts.references

    def is_ready(self, number: int) -> bool:
        """Whether a host is there; one that is not is sent for. Raises ``WorkerFailure`` where it could not start."""
        if number in self._failed:
            died = f" (it had died: {self._why[number]})" if number in self._why else ""
            raise WorkerFailure(f"partition host {number} could not be started: {self._failed.pop(number)}{died}")
        if number not in self.actors and number not in self._starts.places:
            self._starts.send_for(number)
        return number in self.actors

    def wait_for(self, number: int) -> Any:
        """A host's actor, once it is ready. Raises ``WorkerFailure``."""
        while not self.is_ready(number):
            for reference in ray.wait(self.coming, num_returns=1, timeout=self.left_s())[0]:
                self.arrived(reference)
            self.give_up()
        return self.actors[number]

    def arrived(self, reference: Any) -> None:
        """A host is ready, or could not start: who wants it is told by ``is_ready``."""
        try:
            arrived = self._starts.came(reference)
        except NotStarted as error:
            self._failed[error.place] = str(error)
            return
        if arrived:
            self.actors[arrived.place], self.nodes[arrived.place] = arrived.actor, arrived.node
            self._why.pop(arrived.place, None)

    def left_s(self) -> float | None:
        """Seconds until ``give_up`` has something to do; None where nobody starts."""
        return self._starts.left_s()

    def give_up(self) -> None:
        """Wait no more for those that are late: who has no place goes on in the server's bundle."""
        for number, placed, why in self._starts.late():
            self._starts.drop(number)
            if placed:
                self._failed[number] = why
            else:
                self._moved.add(number)
                self._tell(f"partition host {number}: {why}; it goes on beside the server")
                self._starts.send_for(number)

    def forget(self, number: int, why: str) -> None:
        """A host has died."""
        del self.actors[number], self.nodes[number]
        self._moved.discard(number)
        self._why[number] = why

    def close(self) -> None:
        """End all."""
        for actor in self.actors.values():
            ray.kill(actor, no_restart=True)
        self.actors = {}
        self._starts.close()

    def _place(self, number: int) -> ActorPlacement:
        return (self._beside_server if number in self._moved else self._own)[number]

    def _start(self, number: int) -> tuple[Any, Any]:
        """A host's actor, and the reference of its node's id."""
        actor = start_host(self._place(number), kind=PartitionHostActor)
        return actor, actor.make.remote(self._make)

    def _died_early(self, number: int, why: str) -> None:
        self._tell(f"partition host {number} died while it started ({why}) and is replaced")
