"""The workers of the pool on Ray: who sits in which bundle, and who comes after one that has died.

Another one is started in its bundle while the others go on working. Nobody waits for a bundle without a place who can work,
and the run ends only where a group has no worker left and none comes in time.
"""

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ..learning.workload import WorkloadSettings
from .pool import WorkerFailure
from .ray_starts import NotStarted, Starts
from .ray_worker import Bundle, start_worker
from .seats import Seat, group_name


class Crew:
    """``seats``: the workers that are at work. The others are known by the reference that tells when they are ready."""

    def __init__(
        self,
        settings: WorkloadSettings,
        bundles: list[Bundle],
        *,
        placement: Any,
        timeout_s: float,
        tell: Callable[[str], None],
    ) -> None:
        """A worker in every bundle, its data loaded. ``timeout_s``: for Ray to find a bundle a place. ``tell``: an operator.

        Raises ``ValueError`` for what a worker cannot load, ``WorkerFailure`` where one does not come.
        """

        def start(bundle: Bundle) -> tuple[Any, Any]:
            actor = start_worker(settings, placement=placement, bundle=bundle)
            return actor, actor.warm_up.remote()

        self._starts = Starts(
            start,
            placement=placement,
            bundle_of=lambda bundle: bundle.index,
            timeout_s=timeout_s,
            tell=self._died_early,
        )
        self._tell, self._told = tell, set[Bundle]()  # bundles without a place, once told
        self._why: dict[Bundle, str] = {}  # of those who come: the one before has died
        self._end = ""  # of the last one who was not replaced
        self.seats: list[Seat] = []
        for bundle in bundles:
            self._starts.send_for(bundle)
        self._await_all()

    @property
    def coming(self) -> list[Any]:
        """References of those that come; ``arrived`` takes each."""
        return self._starts.references

    def calls(self) -> dict[Any, tuple[Seat, int]]:
        """Who works on which plan, by the reference that tells when it is over."""
        return {call.references[0]: (seat, id_) for seat in self.seats for id_, call in seat.running.items()}

    def check(self, *wanted: str) -> None:
        """Raise ``WorkerFailure`` where no worker of a group that is wanted is left, and none will come."""
        groups = [seat.bundle.group for seat in self.seats] + [bundle.group for bundle in self._starts.places]
        for group in set(wanted).difference(groups):
            raise WorkerFailure(f"no worker is left for {group_name(group)}" + (self._end and f": {self._end}"))

    def replace(self, seat: Seat, why: str) -> None:
        """A worker has died, or is to: start another in its bundle."""
        ray.kill(seat.actor, no_restart=True)  # where it lives
        self.seats.remove(seat)
        self._tell(f"worker of bundle {seat.bundle.index} died ({why}) and is replaced")
        self._why[seat.bundle] = why
        self._starts.send_for(seat.bundle)

    def arrived(self, reference: Any) -> None:
        """Somebody is ready, or could not start."""
        try:
            self._take_seat(reference)
        except NotStarted as error:
            self._give_up(error.place, str(error))

    def left_s(self) -> float | None:
        """Seconds until ``give_up`` has something to do; None where nobody comes."""
        return self._starts.left_s()

    def give_up(self) -> None:
        """Wait no more for those that were placed and are not ready, nor for one without a place whose group has nobody."""
        for bundle, placed, why in self._starts.late():
            if placed or not any(seat.bundle.group == bundle.group for seat in self.seats):
                self._starts.drop(bundle)
                self._give_up(bundle, why)
            elif bundle not in self._told:
                self._told.add(bundle)
                self._tell(f"bundle {bundle.index} has found no place yet; {len(self.seats)} workers are left")

    def close(self) -> None:
        """End all."""
        for seat in self.seats:
            ray.kill(seat.actor, no_restart=True)
        self.seats = []
        self._starts.close()

    def _await_all(self) -> None:
        """The first ones: all must come."""
        try:
            while self.coming:
                for reference in ray.wait(self.coming, num_returns=1, timeout=self._starts.left_s())[0]:
                    self._take_seat(reference)
                for bundle, _, why in self._starts.late():
                    raise NotStarted(bundle, why)
        except NotStarted as error:
            self.close()
            if isinstance(raised := error.__cause__, RayTaskError):  # a ``ValueError`` is the user's mistake
                raise (raised.cause if isinstance(raised.cause, ValueError) else raised) from None
            raise WorkerFailure(f"the worker of bundle {error.place.index} could not be started: {error}") from error
        self.seats.sort(key=lambda seat: seat.bundle.index)

    def _take_seat(self, reference: Any) -> None:
        """Somebody is ready. Raises ``NotStarted``."""
        if arrived := self._starts.came(reference):
            self.seats.append(Seat(arrived.place, arrived.actor, arrived.node))
            self._told.discard(arrived.place)
            self._why.pop(arrived.place, None)

    def _died_early(self, bundle: Bundle, why: str) -> None:
        self._tell(f"worker of bundle {bundle.index} died while it started ({why}) and is replaced")

    def _give_up(self, bundle: Bundle, error: str) -> None:
        """Nobody comes."""
        self._end = (
            f"worker of bundle {bundle.index} died ({self._why.pop(bundle)}) and could not be replaced ({error})"
        )
        self._tell(f"{self._end}; {len(self.seats)} workers are left")
