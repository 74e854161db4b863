"""The workers of the pool on Ray: who is at which place, and who comes after one that has died.

Another one is started in its place while the others go on working. Nobody waits for a bundle without a place who can work, and
the run ends only where a group has no worker left and none comes in time. The worker of a real device is there as long as its
node is; without it the device cannot be reached, and nothing waits for it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ...clusters.ray_backend.checks import versions_here
from ...clusters.ray_backend.real_devices import RealDevice
from ...learning.workload_settings import WorkloadSettings
from ..pool import WorkerFailure
from .faults import until
from .pending_actors import NotStarted, PendingActors
from .ray_devices import RealDevices
from .ray_place import ActorPlacement
from .ray_worker import start_worker
from .workers import WorkerHandle, group_name


class WorkerGroup:
    """``seats``: the workers that are at work. The others are known by the reference that tells when they are ready."""

    def __init__(
        self,
        settings: WorkloadSettings,
        places: Sequence[ActorPlacement],
        devices: RealDevices,
        *,
        least: int = 0,
        timeout_s: float,
        tell: Callable[[str], None],
    ) -> None:
        """Begin to start a worker in each of ``places``, and for each real device that is there.

        ``least``: real devices without which nothing is begun. ``timeout_s``: for Ray to find a bundle a place. ``tell``: an
        operator.
        """
        versions = versions_here()

        def start(place: ActorPlacement) -> tuple[Any, Any]:
            site = devices.sites[place.device.number] if place.device is not None else None
            actor = start_worker(settings, place, site)
            return actor, actor.warm_up.remote(versions)

        self._starts: PendingActors[ActorPlacement] = PendingActors(
            start, has_room=ActorPlacement.has_room, timeout_s=timeout_s, tell=self._died_early
        )
        self._devices = devices
        self._tell, self._told = tell, set[ActorPlacement]()  # places without room, once told
        self._why: dict[ActorPlacement, str] = {}  # of those who come: the one before has died
        self._end = ""  # of the last one who was not replaced
        self.seats: list[WorkerHandle] = []
        # What a worker imports takes seconds of a core. The server needs one too, and the first worker can train early.
        self._later = deque(places)
        for _ in range(max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)):
            self._send_next()
        self._least = least
        self.look()
        self._missed = set(devices.numbers) - devices.sites.keys()  # real devices that are not there, as is told

    @property
    def coming(self) -> list[Any]:
        """References of those that come; ``arrived`` takes each."""
        return self._starts.references

    @property
    def num_coming(self) -> int:
        """How many come, or will be sent for when one of these is there."""
        return len(self._starts.references) + len(self._later)

    @property
    def unreachable(self) -> frozenset[int]:
        """Real devices that have no worker which is ready."""
        return self._devices.numbers - {
            seat.place.device.number for seat in self.seats if seat.place.device is not None
        }

    def calls(self) -> dict[Any, tuple[WorkerHandle, int]]:
        """Who works on which plan, by the reference that tells when it is over."""
        return {call.references[0]: (seat, id_) for seat in self.seats for id_, call in seat.running.items()}

    def check(self, *wanted: str) -> None:
        """Raise ``WorkerFailure`` where a group that is wanted has no worker, and none will come; or no device is left."""
        groups = [seat.place.group for seat in self.seats]
        groups += [place.group for place in (*self._starts.places, *self._later)]
        if not groups and (why := self._devices.why_none()):
            raise WorkerFailure(f"no device is left: {why}")
        for group in set(wanted).difference(groups, self._devices.groups):
            raise WorkerFailure(f"no worker is left for {group_name(group)}" + (self._end and f": {self._end}"))

    def replace(self, seat: WorkerHandle, why: str, *, gone: bool = False) -> None:
        """A worker has died, or is to: start another in its place. ``gone``: its node is too, and with it a real device."""
        ray.kill(seat.actor, no_restart=True)  # where it lives
        self.seats.remove(seat)
        if gone and seat.place.device is not None:
            self._lose(seat.place.device, why)
            return
        self._tell(f"worker of {seat.place.name} died ({why}) and is replaced")
        self._why[seat.place] = why
        self._starts.send_for(seat.place)

    def look(self) -> list[tuple[WorkerHandle, str]]:
        """Start workers on the nodes of real devices that have joined. The workers of those that are gone, and why."""
        joined, gone = self._devices.look()
        for place in joined:
            self._starts.send_for(place)
        workers = {seat.place: seat for seat in self.seats}
        for place, why in gone:
            if place not in workers and place.device is not None:  # it was starting
                self._starts.drop(place)
                self._lose(place.device, why)
        return [(workers[place], why) for place, why in gone if place in workers]

    def arrived(self, reference: Any) -> None:
        """Somebody is ready, or could not start."""
        try:
            self._take_seat(reference)
        except NotStarted as error:
            self._give_up(error.place, str(error))

    def left_s(self) -> float | None:
        """Seconds until ``give_up`` or ``look`` has something to do; None where nobody comes or goes."""
        return until(self._starts.left_s(), self._devices.left_s())

    def give_up(self) -> None:
        """Wait no more for those that were placed and are not ready, nor for one without a place whose group has nobody."""
        for place, placed, why in self._starts.late():
            if placed or not any(seat.place.group == place.group for seat in self.seats):
                self._starts.drop(place)
                self._give_up(place, why)
            elif place not in self._told:
                self._told.add(place)
                self._tell(f"{place.name} has found no place yet; {len(self.seats)} workers are left")

    def close(self) -> None:
        """End all."""
        self._later.clear()
        for seat in self.seats:
            ray.kill(seat.actor, no_restart=True)
        self.seats = []
        self._starts.close()

    def ready(self) -> None:
        """Wait for the first worker, and for all real devices that are there, of which a number must be.

        Raises ``ValueError`` for what a worker cannot load, ``WorkerFailure`` where one does not come.
        """
        try:
            while self._first_is_awaited():
                for reference in ray.wait(self.coming, num_returns=1, timeout=self._starts.left_s())[0]:
                    self._take_first(reference)
                for place, placed, why in self._starts.late():
                    if placed:
                        raise NotStarted(place, why)
        except NotStarted as error:
            self.close()
            if isinstance(raised := error.__cause__, RayTaskError):  # a ``ValueError`` is the user's mistake
                raise (raised.cause if isinstance(raised.cause, ValueError) else raised) from None
            raise WorkerFailure(f"the worker of {error.place.name} could not be started: {error}") from error
        if (there := len(self._devices.numbers - self.unreachable)) < self._least:
            self.close()
            raise WorkerFailure(
                f"{there} real devices are there, and {self._least} are needed; {self._devices.why_missing()}"
            )

    def _first_is_awaited(self) -> bool:
        """Whether one who must be there to begin is on his way: the first of the shared places, or a real device."""
        coming = [place for place in self._starts.places if place.has_room()]
        shared = any(seat.place.device is None for seat in self.seats)
        return any(place.device is not None or not shared for place in coming)

    def _send_next(self) -> None:
        """Send for the next of those that wait for their turn."""
        if self._later:
            self._starts.send_for(self._later.popleft())

    def _take_first(self, reference: Any) -> None:
        """One of the first is ready. Raises ``NotStarted``, but for a real device whose node is lost meanwhile."""
        try:
            self._take_seat(reference)
        except NotStarted as error:
            if error.place.device is None or isinstance(error.__cause__, RayTaskError):
                raise
            self._give_up(error.place, str(error))

    def _take_seat(self, reference: Any) -> None:
        """Somebody is ready. Raises ``NotStarted``."""
        if arrived := self._starts.came(reference):
            place = arrived.place
            self.seats.append(WorkerHandle(place, arrived.actor, arrived.node))
            self._told.discard(place)
            if place.device is not None and place.device.number in self._missed:
                self._missed.remove(place.device.number)
                self._tell(f"{place.name} has joined ({self._devices.sites[place.device.number].told})")
            self._why.pop(place, None)
            self._send_next()

    def _died_early(self, place: ActorPlacement, why: str) -> None:
        self._tell(f"worker of {place.name} died while it started ({why}) and is replaced")

    def _give_up(self, place: ActorPlacement, error: str) -> None:
        """Nobody comes."""
        self._send_next()
        died = self._why.pop(place, "")
        told = f"died ({died}) and could not be replaced ({error})" if died else f"could not be started ({error})"
        if place.device is not None:
            self._lose(place.device, f"its worker {told}")
            return
        self._end = f"worker of {place.name} {told}"
        self._tell(f"{self._end}; {len(self.seats)} workers are left")

    def _lose(self, device: RealDevice, why: str) -> None:
        """A real device cannot be reached any more."""
        self._devices.forget(device, why)
        self._missed.add(device.number)
        self._tell(f"{device.name} cannot be reached: {why}")
