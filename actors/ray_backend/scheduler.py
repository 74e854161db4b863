"""Schedules the tasks of the pool on Ray: the queue, retries under new attempt numbers, lost plans, and results.

    submit ──► queued ──► running ──► finished
                 ▲           ├── its worker or host died: queued again, in front; lost after ``max_attempts`` deaths
                 │           └── its host has lost the view to replay
                 └── waiting ◄──┘ for a task that uploads the view again

The scheduler depends neither on Ray nor on workers: the pool decides whether a task can start.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import msgspec

from ...policies.report import Outcome
from ..pool import Finished, Task, failed_upload_result, lost_result


class Scheduler:
    """The tasks of a pool. ``finished``: results by plan, in the order in which they came, until the pool removes them."""

    def __init__(self, max_attempts: int) -> None:
        """``max_attempts``: a plan is lost after so many deaths of workers and hosts at it, or losses of its view."""
        self._max_attempts = max_attempts
        self._queue = TaskQueue()
        self._tasks: dict[int, Task] = {}  # not finished, under their newest attempt
        self._deaths, self._lost_views = Counter[int](), Counter[int]()
        self._waiting: dict[int, Task] = {}  # replays, by the plan that uploads their view again
        self.finished: dict[int, Finished] = {}

    @property
    def has_tasks(self) -> bool:
        """Whether any task is not finished."""
        return bool(self._tasks)

    @property
    def groups(self) -> set[str]:
        """Groups of devices for whose workers tasks are queued."""
        return self._queue.groups

    def submit(self, task: Task) -> None:
        """Queue a task."""
        self._tasks[task.plan.id] = task
        self._queue.append(task)

    def dispatch(self, start: Callable[[Task], bool]) -> None:
        """Start queued tasks. ``start`` returns False for a task that cannot start yet."""
        self._queue.dispatch(start)

    def current(self, plan_id: int, attempt: int) -> Task | None:
        """The task of an attempt of a plan; None if it was cancelled, or is not the newest attempt."""
        task = self._tasks.get(plan_id)
        return task if task is not None and task.plan.attempt == attempt else None

    def retry(self, task: Task, reason: str, *, running: bool) -> bool:
        """Queue a task again whose worker or host has died, in front. False: it was the last attempt, and the plan is lost.

        ``running``: the worker was at this plan, so that the death counts for it; else it waited in the worker.
        """
        self._deaths[task.plan.id] += running
        if self._deaths[task.plan.id] >= self._max_attempts:
            self.lose(task, reason, stage="run")
            return False
        self._tasks[task.plan.id] = retry = _next_attempt(task)
        self._queue.append_left(retry)
        return True

    def upload_again(self, upload: Task, replay: Task) -> bool:
        """Queue the upload of a view that the host has lost; ``replay`` is queued again when it is done.

        False: the view was lost too often, and the plan of ``replay`` is lost.
        """
        self._lost_views[replay.plan.id] += 1
        if self._lost_views[replay.plan.id] >= self._max_attempts:
            self.lose(replay, "its partition host has lost its view again and again", stage="run")
            return False
        self._waiting[upload.plan.id] = self._tasks[replay.plan.id] = _next_attempt(replay)
        self._tasks[upload.plan.id] = upload
        self._queue.append_left(upload)
        return True

    def finish(self, finished: Finished) -> None:
        """A plan has ended. One that uploads a view again has no result: its replay is queued, or has failed with it."""
        plan_id = finished.plan.id
        self._forget(plan_id)
        replay = self._waiting.pop(plan_id, None)
        if replay is None:
            self.finished[plan_id] = finished
        elif finished.report.outcome == Outcome.DONE:
            self._queue.append_left(replay)
        else:
            self.finish(failed_upload_result(replay, finished.report))

    def lose(self, task: Task, reason: str, *, stage: str) -> None:
        """A plan has ended as lost."""
        self.finish(lost_result(task, reason, stage=stage))

    def cancel(self, plan_id: int) -> None:
        """Forget a task: it is removed from the queue, and the result of one that runs is dropped."""
        for upload, replay in list(self._waiting.items()):
            if replay.plan.id == plan_id:
                del self._waiting[upload]
                self.cancel(upload)
        self._queue.discard(plan_id)
        self._forget(plan_id)
        self.finished.pop(plan_id, None)

    def _forget(self, plan_id: int) -> None:
        for by_plan in (self._tasks, self._deaths, self._lost_views):
            by_plan.pop(plan_id, None)


def _next_attempt(task: Task) -> Task:
    return replace(task, plan=msgspec.structs.replace(task.plan, attempt=task.plan.attempt + 1))


class _Lane(NamedTuple):
    """What a task needs: a worker of this group (None: it needs no device), and this host (None: it is not split)."""

    group: str | None
    host: int | None


class TaskQueue:
    """First in, first out; a task that cannot start blocks only those that need the same.

    A search for tasks that can start costs the number of lanes (groups of workers, and hosts), whatever the number of tasks.
    """

    def __init__(self) -> None:
        """Empty."""
        self._lanes: dict[_Lane, deque[tuple[int, Task]]] = {}
        self._first = self._last = 0  # numbers of the tasks at both ends

    @property
    def groups(self) -> set[str]:
        """Groups of workers that queued tasks need."""
        return {lane.group for lane in self._lanes if lane.group is not None}

    def append(self, task: Task) -> None:
        """Add a task behind all others."""
        self._last += 1
        self._lanes.setdefault(_lane(task), deque()).append((self._last, task))

    def append_left(self, task: Task) -> None:
        """Add a task before all others."""
        self._first -= 1
        self._lanes.setdefault(_lane(task), deque()).appendleft((self._first, task))

    def discard(self, plan_id: int) -> None:
        """Remove the task of a plan, if it is queued."""
        for lane, tasks in list(self._lanes.items()):
            kept = deque(entry for entry in tasks if entry[1].plan.id != plan_id)
            if len(kept) < len(tasks):
                self._set(lane, kept)

    def dispatch(self, start: Callable[[Task], bool]) -> None:
        """Call ``start`` with each task that may start, in order; a task for which it returns False stays, with its lane."""
        blocked: set[_Lane] = set()
        while lanes := self._lanes.keys() - blocked:
            lane = min(lanes, key=lambda lane: self._lanes[lane][0][0])
            number, task = self._lanes[lane].popleft()
            self._set(lane, self._lanes[lane])
            if not start(task):
                blocked.add(lane)
                self._lanes.setdefault(lane, deque()).appendleft((number, task))

    def _set(self, lane: _Lane, tasks: deque[tuple[int, Task]]) -> None:
        if tasks:
            self._lanes[lane] = tasks
        else:
            del self._lanes[lane]


def _lane(task: Task) -> _Lane:
    split = task.plan.split
    return _Lane(task.group if task.needs_device else None, split.host if split is not None else None)
