"""When each device can be reached, in simulated seconds: as its fleet class declares, with what is random drawn from the seed.

Nothing is saved in a checkpoint: every draw follows from seed and device. Periods of random length are an alternating renewal
process with exponential lengths that starts in its stationary state, so the declared share holds from second 0.
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

_DRAWN = 64  # periods that are drawn at once


class _Rule(Protocol):
    """One declared rule; a device is reachable while all of its rules say so."""

    def state(self, time_s: float, *, now_s: float) -> tuple[bool, float]:
        """Whether the rule holds at ``time_s``, and until when that does not change. ``now_s``: no earlier time is needed."""
        ...


@dataclass(frozen=True)
class _Between:
    """Reachable from one second to another."""

    start_s: float
    end_s: float

    def state(self, time_s: float, *, now_s: float) -> tuple[bool, float]:
        if time_s < self.start_s:
            return False, self.start_s
        return (True, self.end_s) if time_s < self.end_s else (False, math.inf)


@dataclass(frozen=True)
class _Schedule:
    """Reachable for ``on_s`` out of every ``every_s``."""

    on_s: float
    every_s: float
    phase_s: float

    def state(self, time_s: float, *, now_s: float) -> tuple[bool, float]:
        if self.on_s == self.every_s:
            return True, math.inf
        number = math.floor((time_s - self.phase_s) / self.every_s)
        while self._begins_s(number) > time_s:  # rounded figures must agree with those returned before
            number -= 1
        while self._begins_s(number + 1) <= time_s:
            number += 1
        off_s = self._begins_s(number) + self.on_s
        return (True, off_s) if time_s < off_s else (False, self._begins_s(number + 1))

    def _begins_s(self, number: int) -> float:
        return self.phase_s + number * self.every_s


class _Trace:
    """Reachable in these windows, which may touch or overlap."""

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
    """Reachable in periods of random length. ``edges``: the next ends of periods; ``reachable``: before the first of them."""

    rng: np.random.Generator
    mean_s: tuple[float, float]  # of an unreachable period, and of a reachable one
    reachable: bool
    edges: deque[float] = field(default_factory=deque)
    drawn: bool = True  # whether the newest drawn period is a reachable one; set in __post_init__
    last_s: float = 0.0

    def __post_init__(self) -> None:
        self.drawn = not self.reachable

    def state(self, time_s: float, *, now_s: float) -> tuple[bool, float]:
        while self.last_s <= time_s:
            for length in self.rng.standard_exponential(_DRAWN).tolist():
                self.drawn = not self.drawn
                self.last_s += length * self.mean_s[self.drawn]
                self.edges.append(self.last_s)
        while self.edges[0] <= now_s:
            self.edges.popleft()
            self.reachable = not self.reachable
        reachable = self.reachable
        for edge in self.edges:
            if edge > time_s:
                return reachable, edge
            reachable = not reachable
        raise AssertionError("no period was drawn that ends later")


class AvailabilitySchedule:
    """When each device of a fleet can be reached. The times asked for must not decrease."""

    def __init__(self, fleet: Fleet, *, seed: int) -> None:
        """``seed``: of the run. A device's rules are made when it is first asked for."""
        self._fleet, self._seed = fleet, seed
        self._rules: dict[int, tuple[_Rule, ...]] = {}
        first, restricted = 0, list[int]()  # devices whose classes declare an availability
        self._windows: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        for device_class in fleet.classes:
            trace = device_class.availability.trace or ()
            assert not isinstance(trace, str), "a fleet is loaded with its traces"
            for device, start_s, end_s in trace:
                self._windows[device].append((start_s, end_s))
            if device_class.availability != ALWAYS:
                restricted += range(first, first + device_class.count)
            first += device_class.count
        self._unreachable: frozenset[int] = frozenset()
        self._changes = [(-math.inf, device) for device in restricted]  # a heap: when the state of each changes next

    def unreachable(self, now_s: float) -> frozenset[int]:
        """All devices that cannot be reached now. The cost is that of the changes since the last call."""
        changed: dict[int, bool] = {}
        while self._changes and self._changes[0][0] <= now_s:
            device = self._changes[0][1]
            changed[device], until_s = self._state(device, now_s, now_s)
            heapq.heapreplace(self._changes, (until_s, device))
        if changed:
            gone = {device for device, reachable in changed.items() if not reachable}
            self._unreachable = (self._unreachable - changed.keys()) | gone
        return self._unreachable

    def reachable(self, device: int, now_s: float) -> bool:
        """Whether a device can be reached now."""
        return self._state(device, now_s, now_s)[0]

    def until_s(self, device: int, now_s: float) -> float:
        """When a device that can be reached now becomes unreachable; infinite: never."""
        return self._state(device, now_s, now_s)[1]

    def next_s(self, device: int, now_s: float) -> float:
        """When a device can be reached next, ``now_s`` if it can be now; infinite: never again."""
        time_s = now_s
        while time_s < math.inf:
            reachable, until_s = self._state(device, time_s, now_s)
            if reachable:
                return time_s
            time_s = until_s
        return math.inf

    def _state(self, device: int, time_s: float, now_s: float) -> tuple[bool, float]:
        """Whether a device can be reached, and until when; while several rules prevent it, until the last of them changes."""
        if device not in self._rules:
            self._rules[device] = self._make_rules(device, self._fleet.class_of(device).availability)
        states = [rule.state(time_s, now_s=now_s) for rule in self._rules[device]]
        prevented = [until_s for reachable, until_s in states if not reachable]
        return not prevented, max(prevented) if prevented else min((until_s for _, until_s in states), default=math.inf)

    def _make_rules(self, device: int, declared: Availability) -> tuple[_Rule, ...]:
        """The rules that a class declares, for one device."""
        if declared.share == 0:
            return (_Between(math.inf, math.inf),)
        rules: list[_Rule] = []
        if declared.joins_s or declared.leaves_s is not None:
            rules.append(_Between(declared.joins_s, math.inf if declared.leaves_s is None else declared.leaves_s))
        if declared.on_s is not None and declared.every_s is not None:
            rng = np.random.default_rng(derive(self._seed, "availability", device, "phase"))
            phase_s = rng.uniform(0, declared.every_s) if declared.phase_s is None else declared.phase_s
            rules.append(_Schedule(declared.on_s, declared.every_s, phase_s))
        if declared.trace is not None:
            rules.append(_Trace(self._windows[device]))
        if declared.share < 1:
            rng = np.random.default_rng(derive(self._seed, "availability", device))
            off_s = declared.mean_on_s * (1 - declared.share) / declared.share
            rules.append(_Random(rng, (off_s, declared.mean_on_s), reachable=bool(rng.random() < declared.share)))
        return tuple(rules)
