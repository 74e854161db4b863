"""The workers of the pool on Ray: who sits in which bundle, and who comes after one that has died.

Another one is started in its bundle while the others go on working. A bundle whose node is gone has no place until Ray finds
one, which may take an autoscaler minutes, or never happen: nobody waits for it who can work, and the run ends only where a
group has no worker left and none comes in time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ..learning.workload import WorkloadSettings
from .pool import WorkerFailure
from .ray_faults import DIED, LOADING_S, MOST_STARTS, first_line, is_placed, placing_s, until
from .ray_worker import Bundle, await_warm, start_worker
from .seats import Seat, group_name


@dataclass
class _Coming:
    """A worker that starts. ``told``: that it has no place yet."""

    bundle: Bundle
    actor: Any
    why: str
    starts: int
    since: float
    told: bool = False


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
        """A worker in every bundle, its data loaded. ``timeout_s``: for Ray to find a bundle a place. ``tell``: an operator."""
        self._start = partial(start_worker, settings, placement=placement)
        self._placement, self._timeout_s, self._tell = placement, placing_s(timeout_s), tell
        self._coming: dict[Any, _Coming] = {}
        self._end = ""  # of the last one who was not replaced
        actors = [self._start(bundle=bundle) for bundle in bundles]
        signs = [actor.warm_up.remote() for actor in actors]
        self.seats = [self._first(*each, timeout_s=timeout_s) for each in zip(bundles, actors, signs, strict=True)]

    @property
    def coming(self) -> list[Any]:
        """References of those that come; ``arrived`` takes each."""
        return list(self._coming)

    def calls(self) -> dict[Any, tuple[Seat, int]]:
        """Who works on which plan, by the reference that tells when it is over."""
        return {call.references[0]: (seat, id_) for seat in self.seats for id_, call in seat.running.items()}

    def check(self, *wanted: str) -> None:
        """Raise ``WorkerFailure`` where no worker of a group that is wanted is left, and none will come."""
        groups = [seat.bundle.group for seat in self.seats] + [coming.bundle.group for coming in self._coming.values()]
        for group in set(wanted).difference(groups):
            raise WorkerFailure(f"no worker is left for {group_name(group)}" + (self._end and f": {self._end}"))

    def replace(self, seat: Seat, why: str) -> None:
        """A worker has died, or is to: start another in its bundle."""
        ray.kill(seat.actor, no_restart=True)  # where it lives
        self.seats.remove(seat)
        self._tell(f"worker of bundle {seat.bundle.index} died ({why}) and is replaced")
        self._send_for(seat.bundle, why, starts=1)

    def arrived(self, reference: Any) -> None:
        """Somebody is ready, or could not start."""
        coming = self._coming.pop(reference)
        try:
            node = ray.get(reference)
        except DIED as error:
            if coming.starts < MOST_STARTS:
                self._send_for(coming.bundle, coming.why, starts=coming.starts + 1)
            else:
                self._give_up(coming, f"the next one died while it started: {first_line(error)}")
        except RayTaskError as error:
            self._give_up(coming, first_line(error.cause))
        else:
            self.seats.append(Seat(coming.bundle, coming.actor, node))

    def left_s(self) -> float | None:
        """Seconds until one of them should have been ready; None where nobody comes."""
        now = time.monotonic()
        ends = [c.since + self._timeout_s + (LOADING_S if c.told else 0) for c in self._coming.values()]
        return until(*(max(1.0, end - now) for end in ends))

    def give_up(self) -> None:
        """Wait no more for those that were placed and are not ready, nor for one without a place whose group has nobody."""
        late = [ref for ref, c in self._coming.items() if time.monotonic() - c.since >= self._timeout_s]
        placed = not late or is_placed(self._placement)
        for reference in late:
            coming = self._coming[reference]
            alone = not any(seat.bundle.group == coming.bundle.group for seat in self.seats)
            if placed and time.monotonic() - coming.since < self._timeout_s + LOADING_S:
                continue
            if placed or alone:
                del self._coming[reference]
                ray.kill(coming.actor, no_restart=True)
                waited = f"within {self._timeout_s + LOADING_S * placed:g} s"
                why = f"it was not ready {waited}" if placed else f"its bundle has found no place {waited}"
                self._give_up(coming, why)
            elif not coming.told:
                coming.told = True
                self._tell(f"bundle {coming.bundle.index} has found no place yet; {len(self.seats)} workers are left")

    def close(self) -> None:
        """End all."""
        for actor in [seat.actor for seat in self.seats] + [coming.actor for coming in self._coming.values()]:
            ray.kill(actor, no_restart=True)
        self.seats = []
        self._coming.clear()

    def _first(self, bundle: Bundle, actor: Any, sign: Any, *, timeout_s: float, starts: int = 1) -> Seat:
        """The first one of a bundle; all must come, or ``WorkerFailure``."""
        try:
            return Seat(bundle, actor, await_warm(sign, timeout_s=timeout_s))
        except DIED as error:
            why = first_line(error)
            if starts == MOST_STARTS:
                raise WorkerFailure(f"a worker died while it started: {why}") from error
            self._tell(f"worker of bundle {bundle.index} died while it started ({why}) and is replaced")
        actor = self._start(bundle=bundle)
        return self._first(bundle, actor, actor.warm_up.remote(), timeout_s=timeout_s, starts=starts + 1)

    def _send_for(self, bundle: Bundle, why: str, *, starts: int) -> None:
        actor = self._start(bundle=bundle)
        self._coming[actor.warm_up.remote()] = _Coming(bundle, actor, why, starts, time.monotonic())

    def _give_up(self, coming: _Coming, error: str) -> None:
        """Nobody comes."""
        self._end = f"worker of bundle {coming.bundle.index} died ({coming.why}) and could not be replaced ({error})"
        self._tell(f"{self._end}; {len(self.seats)} workers are left")
