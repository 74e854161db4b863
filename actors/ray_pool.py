"""The pool on Ray: one worker actor per placement-group bundle.

Ray restarts and retries nothing here (``max_restarts=0``, ``max_task_retries=0``): the runtime does, under an attempt
number, so that an update is never folded twice. A worker's report, update and device state are separate returns owned by
this process, since what a worker puts into the store by itself dies with it. Each worker has one plan running and one
waiting, so that it is never idle between two.
"""

import time
from collections import Counter, deque
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from ..comms.codecs import Array
from ..comms.link import State, copy_state
from ..learning.workload import WorkloadSettings
from ..policies.plan import Plan
from .partition_host import BufferedViews
from .plan_message import plan_message
from .pool import Finished, Task, WorkerFailure, finished, joined, lost, replayed
from .ray_hosts import DIED, RayHosts, Way, first_line
from .ray_worker import Bundle, await_warm, start_worker
from .seats import Call, Patience, Seat, free_seat, group_name


class RayPool:
    """Runs tasks on worker actors, replaces those that die, and places their work again."""

    def __init__(
        self,
        settings: WorkloadSettings,
        *,
        placement: Any,
        bundles: list[Bundle],
        timeout_s: float,
        hosts: RayHosts | None = None,
        max_attempts: int = 3,
        stuck_after_s: float | None = None,
    ) -> None:
        """A worker in every bundle, its data loaded; raises ``ValueError`` for what a worker cannot load.

        ``max_attempts``: a plan whose worker or host dies so often is lost. ``stuck_after_s``: a worker that runs one plan for
        longer is ended, and replaced as one that died (None: never).
        """
        self._start = partial(start_worker, settings, placement=placement)
        self._timeout_s, self._max_attempts, self._hosts = timeout_s, max_attempts, hosts
        self._patience = Patience(stuck_after_s)
        self._deaths: Counter[int] = Counter()  # of workers and hosts, by the plan that they were at
        self._notices: list[str] = []
        self.call_host = hosts.call if hosts is not None else lambda number, method, *arguments: None
        self._queue: deque[Task] = deque()
        self._tasks: dict[int, Task] = {}
        self._done: dict[int, Finished] = {}
        self._ending: dict[Any, tuple[Finished, Way]] = {}  # by reference: device's leg over, host's asked to end
        self._seats = [Seat(bundle, self._start(bundle=bundle)) for bundle in bundles]
        await_warm([seat.actor for seat in self._seats], timeout_s=timeout_s)

    @property
    def num_workers(self) -> int:
        """Workers that sit in a bundle now."""
        return len(self._seats)

    def submit(self, task: Task) -> int:
        """Queue a task and hand it to a worker with a free place."""
        if not any(seat.bundle.group == task.group for seat in self._seats):
            raise WorkerFailure(f"no worker is left for {group_name(task.group)}")
        self._tasks[task.plan.id] = task
        self._queue.append(task)
        self._hand_out()
        return len(plan_message(task.plan))

    def result(self, plan_id: int) -> Finished:
        """Wait for this plan's end."""
        while plan_id not in self._done:
            self._wait(None)
        return self._done.pop(plan_id)

    def next(self, timeout_s: float | None) -> Finished | None:
        """Wait for any plan's end."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._done:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._tasks or not self._wait(left):
                return None
        return self._done.pop(next(iter(self._done)))

    def cancel(self, plan_id: int) -> None:
        """Forget a task: what is queued is dropped, what runs may finish and is not looked at."""
        self._queue = deque(task for task in self._queue if task.plan.id != plan_id)
        self._tasks.pop(plan_id, None)
        self._deaths.pop(plan_id, None)
        self._done.pop(plan_id, None)

    def settle(self, plan: Plan, *, keep: bool) -> BufferedViews:
        """Tell the plan's host."""
        return self._hosts.settle(plan, keep=keep, notices=self._notices) if self._hosts is not None else ()

    def notices(self) -> list[str]:
        """What happened to workers since the last call."""
        found, self._notices = self._notices, []
        return found

    def lost_hosts(self) -> list[int]:
        """Numbers of the partition hosts that have died since the last call."""
        return self._hosts.take_lost() if self._hosts is not None else []

    def close(self) -> None:
        """End the workers."""
        for seat in self._seats:
            ray.kill(seat.actor, no_restart=True)
        self._seats = []
        if self._hosts is not None:
            self._hosts.close()

    def _hand_out(self) -> None:
        """Give queued tasks to workers of their group, the least loaded first."""
        waiting: deque[Task] = deque()
        while self._queue:
            task = self._queue.popleft()
            if self._hosts and task.plan.split and task.plan.split.view is not None:  # a host's alone
                reference, way = self._hosts.replay(task, plan_message(task.plan))
                self._ending[reference] = replayed(task), way
                continue
            if (seat := free_seat(self._seats, task.group)) is None:
                waiting.append(task)
                continue
            message = plan_message(task.plan)
            meant = self._hosts.begin(task, message) if self._hosts and task.plan.split else None
            references = seat.actor.run.remote(message, task.state, meant, *task.packets)
            seat.give(Call(task.plan, references, meant))
        self._queue.extendleft(reversed(waiting))

    def _wait(self, timeout_s: float | None) -> bool:
        """Wait until at least one running plan has ended, well or not; False when ``timeout_s`` passes first."""
        owners = {call.references[0]: (seat, plan_id) for seat in self._seats for plan_id, call in seat.running.items()}
        waited = [*owners, *self._ending]
        if not waited:
            raise WorkerFailure("plans are waiting, but no worker is left to run them")
        ready, _ = ray.wait(waited, num_returns=1, timeout=self._patience.left_s(self._seats, timeout_s))
        if not ready:
            self._end_stuck()
        for reference in ready:
            if reference in self._ending:
                self._host_ended(reference)
                continue
            seat, plan_id = owners[reference]
            if seat in self._seats and plan_id in seat.running:
                self._ended(seat, plan_id)
        self._hand_out()
        return bool(ready)

    def _end_stuck(self) -> None:
        """End the workers that have run one plan for too long, and replace them."""
        for seat in self._patience.lost_with(self._seats):
            ray.kill(seat.actor, no_restart=True)
            self._replace(seat, f"stuck: it ran one plan for more than {self._patience.seconds:g} s")

    def _ended(self, seat: Seat, plan_id: int) -> None:
        """A call to a worker is over: bring its result to this process, as views of the object store."""
        try:
            answer = ray.get(seat.running[plan_id].references)
        except DIED as error:
            self._replace(seat, first_line(error))
        else:
            self._answered(seat, plan_id, *answer)

    def _answered(self, seat: Seat, plan_id: int, report: bytes, update: Array | None, state: State | None) -> None:
        """What a worker gave back for a plan."""
        call = seat.take(plan_id)
        task = self._tasks.get(plan_id)
        if task is None or task.plan.attempt != call.plan.attempt:
            if call.way is not None and self._hosts is not None:
                self._hosts.drop(call.way)
            return
        # A view would keep its object in the store until the plan arrives, and a cohort's states may exceed the store.
        state = copy_state(state) if state is not None else None
        found = finished(call.plan, report, update, state)
        if call.way is None:
            self._finish(found)
        elif self._hosts is not None:
            self._ending[self._hosts.end(call.way)] = found, call.way

    def _host_ended(self, reference: Any) -> None:
        """A host's leg is over too: with the device's, that is the plan's end. If the host died, the plan is placed again."""
        assert self._hosts is not None
        found, way = self._ending.pop(reference)
        task = self._tasks.get(found.plan.id)
        try:
            answer, update = ray.get(reference)
        except DIED as error:
            why = first_line(error)
            if notice := self._hosts.replace(way, why):
                self._notices.append(notice)
            if task is not None:
                self._again(task, f"its partition host died: {why}")
            return
        if task is not None:
            self._finish(joined(found, answer, update, self._notices))
        else:
            self._hosts.drop(way)

    def _finish(self, found: Finished) -> None:
        """A plan has come to its end."""
        plan_id = found.plan.id
        del self._tasks[plan_id]
        self._deaths.pop(plan_id, None)
        self._done[plan_id] = found

    def _replace(self, seat: Seat, why: str) -> None:
        """A worker has died: put another into its bundle, and place its plans again, but those that it was done with."""
        for plan_id in list(seat.running):
            try:
                answer = ray.get(seat.running[plan_id].references, timeout=0)
            except (GetTimeoutError, *DIED):
                break
            self._answered(seat, plan_id, *answer)
        self._seats.remove(seat)
        over = [self._tasks[plan_id] for plan_id in seat.running if plan_id in self._tasks]
        try:
            actor = self._start(bundle=seat.bundle)
            await_warm([actor], timeout_s=self._timeout_s)
        except (WorkerFailure, RayTaskError) as error:
            self._notices.append(
                f"worker of bundle {seat.bundle.index} died ({why}) and could not be replaced ({error}); "
                f"{len(self._seats)} workers are left"
            )
        else:
            self._seats.append(Seat(seat.bundle, actor))
            self._notices.append(f"worker of bundle {seat.bundle.index} died ({why}) and was replaced")
        for number, task in enumerate(over):
            self._again(task, f"worker died: {why}", at_it=number == 0)

    def _again(self, task: Task, why: str, *, at_it: bool = True) -> None:
        """Place a task again under the next attempt number; after the last attempt its outcome is ``lost``.

        ``at_it``: it was being carried out, and did not just wait behind another one.
        """
        self._deaths[task.plan.id] += at_it
        if self._deaths[task.plan.id] >= self._max_attempts:
            self._finish(lost(task, why))
            return
        plan = msgspec.structs.replace(task.plan, attempt=task.plan.attempt + 1)
        again = replace(task, plan=plan)
        self._tasks[plan.id] = again
        self._queue.appendleft(again)
