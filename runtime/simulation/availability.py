"""Who can be reached when, in simulated seconds: what a fleet declares of it, what it leaves open drawn from the seed.

Nothing here has to be saved: every draw follows from seed and device, so the time alone says who is there. Periods of random
length are an alternating renewal process with exponential lengths, begun in its stationary state, so that the share holds
from second 0.
"""

import heapq
import math
from bisect import bisect_right
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ...clusters.availability import ALWAYS, Availability
from ...clusters.fleet import Fleet
from ...learning.seeds import derive

_DRAWN = 64  # periods at once


class _Part(Protocol):
    """One reason for being there or not."""

    def state(self, time_s: float, *, now_s: float) -> tuple[bool, float]:
        """Whether it lets the device be there at a time, and until when that holds. Nobody asks for times before ``now_s``."""
        ...


@dataclass(frozen=True)
class _Between:
    """There from one second to another."""

    start_s: float
    end_s: float

    def state(self, time_s: float, *, now_s: float) -> tuple[bool, float]:
        if time_s < self.start_s:
            return False, self.start_s
        return (True, self.end_s) if time_s < self.end_s else (False, math.inf)


@dataclass(frozen=True)
class _Schedule:
    """There for ``on_s`` out of every ``every_s``."""

    on_s: float
    every_s: float
    phase_s: float

    def state(self, time_s: float, *, now_s: float) -> tuple[bool, float]:
        if self.on_s == self.every_s:
            return True, math.inf
        number = math.floor((time_s - self.phase_s) / self.every_s)
        while self._begins_s(number) > time_s:  # what is rounded must agree with what was told before
            number -= 1
        while self._begins_s(number + 1) <= time_s:
            number += 1
        off_s = self._begins_s(number) + self.on_s
        return (True, off_s) if time_s < off_s else (False, self._begins_s(number + 1))

    def _begins_s(self, number: int) -> float:
        return self.phase_s + number * self.every_s


class _Trace:
    """There in these windows, which may touch or overlap."""

    def __init__(self, windows: list[tuple[float, float]]) -> None:
        edges: list[float] = []
        for start_s, end_s in sorted(windows):
            if edges and start_s <= edges[-1]:
                edges[-1] = max(edges[-1], end_s)
            else:
                edges += start_s, end_s
        self._edges = edges

    def state(self, time_s: float, *, now_s: float) -> tuple[bool, float]:
        passed = bisect_right(self._edges, time_s)
        return bool(passed % 2), self._edges[passed] if passed < len(self._edges) else math.inf


@dataclass
class _Random:
    """There in periods of random length. ``edges``: the next ends of periods; ``there``: what holds before the first."""

    rng: np.random.Generator
    mean_s: tuple[float, float]  # of a period in which it is not there, and of one in which it is
    there: bool
    edges: deque[float] = field(default_factory=deque)
    drawn: bool = True  # what the newest period is that was drawn; set in __post_init__
    last_s: float = 0.0

    def __post_init__(self) -> None:
        self.drawn = not self.there

    def state(self, time_s: float, *, now_s: float) -> tuple[bool, float]:
        while self.last_s <= time_s:
            for length in self.rng.standard_exponential(_DRAWN).tolist():
                self.drawn = not self.drawn
                self.last_s += length * self.mean_s[self.drawn]
                self.edges.append(self.last_s)
        while self.edges[0] <= now_s:
            self.edges.popleft()
            self.there = not self.there
        there = self.there
        for edge in self.edges:
            if edge > time_s:
                return there, edge
            there = not there
        raise AssertionError("no period was drawn that ends later")


class AvailabilitySchedule:
    """When each device of a fleet can be reached. Ask for times that never go back."""

    def __init__(self, fleet: Fleet, *, seed: int) -> None:
        """``seed``: of the run. Devices are looked at when they are first asked for."""
        self._fleet, self._seed = fleet, seed
        self._parts: dict[int, tuple[_Part, ...]] = {}
        first, devices = 0, list[int]()  # those of which anything is declared
        self._windows: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        for kind in fleet.classes:
            trace = kind.availability.trace or ()
            assert not isinstance(trace, str), "a fleet is loaded with its traces"
            for device, start_s, end_s in trace:
                self._windows[device].append((start_s, end_s))
            if kind.availability != ALWAYS:
                devices += range(first, first + kind.count)
            first += kind.count
        self._away: frozenset[int] = frozenset()
        self._changes = [(-math.inf, device) for device in devices]  # a heap: when to look at each again

    def unreachable(self, now_s: float) -> frozenset[int]:
        """All devices that cannot be reached now. It costs no more than what has changed since it was asked last."""
        changed: dict[int, bool] = {}
        while self._changes and self._changes[0][0] <= now_s:
            device = self._changes[0][1]
            changed[device], until_s = self._state(device, now_s, now_s)
            heapq.heapreplace(self._changes, (until_s, device))
        if changed:
            gone = {device for device, there in changed.items() if not there}
            self._away = (self._away - changed.keys()) | gone
        return self._away

    def reachable(self, device: int, now_s: float) -> bool:
        """Whether a device can be reached now."""
        return self._state(device, now_s, now_s)[0]

    def until_s(self, device: int, now_s: float) -> float:
        """When a device that can be reached now is gone; infinite: never."""
        return self._state(device, now_s, now_s)[1]

    def next_s(self, device: int, now_s: float) -> float:
        """When a device can be reached next, ``now_s`` if it is now; infinite: never again."""
        time_s = now_s
        while time_s < math.inf:
            there, until_s = self._state(device, time_s, now_s)
            if there:
                return time_s
            time_s = until_s
        return math.inf

    def _state(self, device: int, time_s: float, now_s: float) -> tuple[bool, float]:
        """Whether it is there, and until when; where several things keep it away, until the last of them is over."""
        if device not in self._parts:
            self._parts[device] = self._make(device, self._fleet.class_of(device).availability)
        states = [part.state(time_s, now_s=now_s) for part in self._parts[device]]
        away = [until_s for there, until_s in states if not there]
        return not away, max(away) if away else min((until_s for _, until_s in states), default=math.inf)

    def _make(self, device: int, declared: Availability) -> tuple[_Part, ...]:
        """What a class declares, for one device."""
        if declared.share == 0:
            return (_Between(math.inf, math.inf),)
        parts: list[_Part] = []
        if declared.joins_s or declared.leaves_s is not None:
            parts.append(_Between(declared.joins_s, math.inf if declared.leaves_s is None else declared.leaves_s))
        if declared.on_s is not None and declared.every_s is not None:
            rng = np.random.default_rng(derive(self._seed, "availability", device, "phase"))
            phase_s = rng.uniform(0, declared.every_s) if declared.phase_s is None else declared.phase_s
            parts.append(_Schedule(declared.on_s, declared.every_s, phase_s))
        if declared.trace is not None:
            parts.append(_Trace(self._windows[device]))
        if declared.share < 1:
            rng = np.random.default_rng(derive(self._seed, "availability", device))
            off_s = declared.mean_on_s * (1 - declared.share) / declared.share
            parts.append(_Random(rng, (off_s, declared.mean_on_s), there=bool(rng.random() < declared.share)))
        return tuple(parts)
