"""Tasks that wait for a worker or a partition host, in order."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..pool import Task


class _Lane(NamedTuple):
    """What a task waits for: a worker of this group (None: it needs no device), and this host (None: it is not split)."""

    group: str | None
    host: int | None


class TaskQueue:
    """First in, first out; a task that has to wait holds up only those that wait for the same.

    To look for tasks that can begin costs the number of lanes (groups of workers, and hosts), whatever the number of tasks.
    """

    def __init__(self) -> None:
        """Empty."""
        self._lanes: dict[_Lane, deque[tuple[int, Task]]] = {}
        self._first = self._last = 0  # numbers of the tasks at both ends

    @property
    def groups(self) -> set[str]:
        """Groups whose workers are waited for."""
        return {lane.group for lane in self._lanes if lane.group is not None}

    def append(self, task: Task) -> None:
        """Behind all others."""
        self._last += 1
        self._lanes.setdefault(_lane(task), deque()).append((self._last, task))

    def append_left(self, task: Task) -> None:
        """Before all others."""
        self._first -= 1
        self._lanes.setdefault(_lane(task), deque()).appendleft((self._first, task))

    def discard(self, plan_id: int) -> None:
        """Take out the task of a plan, where it is here."""
        for lane, waiting in list(self._lanes.items()):
            kept = deque(each for each in waiting if each[1].plan.id != plan_id)
            if len(kept) < len(waiting):
                self._set(lane, kept)

    def begin(self, begin: Callable[[Task], bool]) -> None:
        """Call ``begin`` with each task that may begin, in order; one of which it says False stays, with its lane."""
        blocked: set[_Lane] = set()
        while lanes := self._lanes.keys() - blocked:
            lane = min(lanes, key=lambda lane: self._lanes[lane][0][0])
            number, task = self._lanes[lane].popleft()
            self._set(lane, self._lanes[lane])
            if not begin(task):
                blocked.add(lane)
                self._lanes.setdefault(lane, deque()).appendleft((number, task))

    def _set(self, lane: _Lane, waiting: deque[tuple[int, Task]]) -> None:
        if waiting:
            self._lanes[lane] = waiting
        else:
            del self._lanes[lane]


def _lane(task: Task) -> _Lane:
    split = task.plan.split
    return _Lane(task.group if task.needs_device else None, split.host if split is not None else None)
