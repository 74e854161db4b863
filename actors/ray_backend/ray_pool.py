"""The pool on Ray: a worker actor in each bundle, and on the node of each real device.

Ray restarts and retries nothing here (``max_restarts=0``, ``max_task_retries=0``): the runtime does, under an attempt
number, so that an update is never folded twice. A worker's report, update and device state are separate returns owned by
this process, since what a worker puts into the store by itself dies with it. Each worker has one plan running and one
waiting, so that it is never idle between two. Where a whole node is gone, all that was there is placed again at once.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from ...comms.codec import Array
from ...comms.links.link import State, copy_state
from ...comms.ray_channel import store_told
from ...learning.workload_settings import WorkloadSettings
from ...policies.report import Outcome
from ..messages.plan_message import plan_message
from ..pool import Finished, Task, finished, joined, lost, not_again, replayed, upload_again
from .faults import DIED, first_line, gone, until
from .ray_devices import RealDevices
from .ray_hosts import RayHosts
from .ray_link import Way
from .ray_place import ActorPlacement
from .task_queue import TaskQueue
from .worker_group import WorkerGroup
from .workers import HangTimeout, RetryBudget, RunningPlan, WorkerHandle, free_worker

_IDLE_S = 1.0  # between two looks at whether somebody has come


class RayPool:
    """Runs tasks on worker actors, replaces those that die, and places their work again."""

    def __init__(
        self,
        settings: WorkloadSettings,
        *,
        places: Sequence[ActorPlacement],
        devices: RealDevices,
        least_devices: int = 0,
        timeout_s: float,
        hosts: RayHosts,
        max_attempts: int = 3,
        stuck_after_s: float | None = None,
    ) -> None:
        """Begin to start a worker in each place, and for each real device that is there.

        ``least_devices``: real devices without which it does not begin (``WorkerFailure``). ``max_attempts``: a plan whose
        worker or host dies so often is lost. ``stuck_after_s``: a worker that runs one plan for longer is ended, and replaced
        as one that died (None: never).
        """
        self._hosts, self._patience, self._attempts = hosts, HangTimeout(stuck_after_s), RetryBudget(max_attempts)
        self._notices = hosts.notices
        self.settle, self.bodies, self.put = hosts.settle, hosts.bodies, hosts.put
        self._queue = TaskQueue()
        self._tasks: dict[int, Task] = {}
        self._done: dict[int, Finished] = {}
        self._ending: dict[Any, tuple[Finished, Way]] = {}  # by reference: device's leg over, host's asked to end
        self._waiting: dict[int, Task] = {}  # replays, by the plan that uploads their lost view again
        self._view_losses = RetryBudget(max_attempts)  # how often a replay has found its view lost
        self._uploaded_again = 0
        self._devices = devices
        tell = self._notices.append
        self._crew = WorkerGroup(settings, places, devices, least=least_devices, timeout_s=timeout_s, tell=tell)

    @property
    def num_workers(self) -> int:
        """Workers that are there, or on their way."""
        return len(self._crew.seats) + self._crew.num_coming

    def ready(self) -> None:
        """Wait for the first worker; the others come while it works."""
        self._crew.ready()

    def submit(self, task: Task) -> int:
        """Queue a task and hand it to a worker with a free place."""
        self._crew.check(*([task.group] if task.needs_device else []))
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
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._done:
            if not self._tasks:
                return None
            self._wait(None if end is None else max(0.0, end - time.monotonic()))
            if not self._done and end is not None and time.monotonic() >= end:
                return None
        return self._done.pop(next(iter(self._done)))

    def wait(self, seconds: float) -> None:
        """Let so much time pass; workers may come and go meanwhile."""
        end = time.monotonic() + seconds
        while (left_s := end - time.monotonic()) > 0:
            self._wait(left_s)

    def unreachable(self) -> frozenset[int]:
        """Real devices that cannot be reached now."""
        return self._crew.unreachable

    def awaited(self) -> frozenset[int]:
        """Those of them that may still join. Raises ``WorkerFailure`` where no device is left, nor awaited."""
        self._crew.check()
        return self._devices.awaited

    def take_lost_devices(self) -> list[int]:
        """Real devices that have gone away since the last call."""
        found, self._devices.lost = self._devices.lost, []
        return found

    def cancel(self, plan_id: int) -> None:
        """Forget a task: what is queued is dropped, what runs may finish and is not looked at."""
        for upload, replay in list(self._waiting.items()):
            if replay.plan.id == plan_id:
                del self._waiting[upload]
                self.cancel(upload)
        self._queue.discard(plan_id)
        self._tasks.pop(plan_id, None)
        self._attempts.forget(plan_id)
        self._view_losses.forget(plan_id)
        self._done.pop(plan_id, None)

    def notices(self) -> list[str]:
        """What happened to workers and hosts since the last call."""
        found, self._notices[:] = list(self._notices), []
        return found

    def close(self) -> None:
        """End the workers."""
        self._crew.close()
        self._hosts.close()

    @store_told()
    def _hand_out(self) -> None:
        """Give queued tasks to workers of their group, the least loaded first, once their hosts are there."""
        self._queue.begin(self._begin)

    def _begin(self, task: Task) -> bool:
        """Have a task carried out, if what it needs is there."""
        split, seat = task.plan.split, free_worker(self._crew.seats, task.group)
        if away := task.needs_device and self._devices.why_away(task.group):
            self._lose(task, away, stage="down")
        elif split and not self._hosts.is_ready(split.host):
            return False
        elif not task.needs_device:
            reference, way = self._hosts.replay(task, plan_message(task.plan))
            self._ending[reference] = replayed(task), way
        elif seat is None:
            return False
        else:
            message = plan_message(task.plan)
            meant = self._hosts.begin(task, message) if split else None
            seat.give(RunningPlan(task.plan, seat.actor.run.remote(message, task.state, meant, *task.packets), meant))
        return True

    @store_told()
    def _wait(self, timeout_s: float | None) -> None:
        """Wait until something has ended, well or not, or ``timeout_s`` have passed, or somebody has hung for too long."""
        self._crew.check(*self._queue.groups)
        owners, of_hosts = self._crew.calls(), self._hosts.awaited()
        left_s = until(self._patience.left_s(self._blamed(), timeout_s), self._hosts.left_s(), self._crew.left_s())
        if not (awaited := [*owners, *self._ending, *self._crew.coming, *of_hosts]):
            time.sleep(until(left_s, _IDLE_S) or 0.0)
        ready, rest = ray.wait(awaited, num_returns=1, timeout=left_s) if awaited else ([], [])
        ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0] if ready and rest else []
        for reference in ready:
            if reference in self._ending:
                self._host_ended(reference)
            elif reference in owners:
                seat, plan_id = owners[reference]
                if seat in self._crew.seats and plan_id in seat.running:
                    self._ended(seat, plan_id)
            elif not self._hosts.came(reference) and reference in self._crew.coming:
                self._crew.arrived(reference)  # else the sign of a host that has died in the meantime
        self._crew.give_up()  # all that has come was looked at, so nobody is judged who has answered
        for seat, why in self._crew.look():
            self._all_again(self._unseat(seat, why, gone=True), why)
        self._hosts.give_up()
        self._end_stuck()
        self._hand_out()

    def _blamed(self) -> list[WorkerHandle]:
        """Workers that may be ended for what they take: not those whose host owes a sign of life."""
        return [seat for seat in self._crew.seats if seat.way is None or not self._hosts.is_silent(seat.way)]

    def _end_stuck(self) -> None:
        """End the hosts and workers that hang, and replace them."""
        if self._hosts.end_stuck():
            self._patience.renew(self._crew.seats)
        for seat in self._patience.lost_with(self._blamed()):
            self._replace(seat, f"stuck: it ran one plan for more than {self._patience.seconds:g} s")

    def _ended(self, seat: WorkerHandle, plan_id: int) -> None:
        """A call to a worker is over: bring its result to this process, as views of the object store."""
        try:
            answer = ray.get(seat.running[plan_id].references)
        except DIED as error:
            self._replace(seat, first_line(error))
        else:
            self._answered(seat, plan_id, *answer)

    def _answered(
        self, seat: WorkerHandle, plan_id: int, report: bytes, update: Array | None, state: State | None
    ) -> None:
        """What a worker gave back for a plan."""
        call = seat.take(plan_id)
        task = self._tasks.get(plan_id)
        if task is None or task.plan.attempt != call.plan.attempt:
            if call.way is not None:
                self._hosts.drop(call.way)
            return
        # A view would keep its object in the store until the plan arrives, and a cohort's states may exceed the store.
        state = copy_state(state) if state is not None else None
        found = finished(call.plan, report, update, state)
        if call.way is None:
            self._finish(found)
        else:
            self._ending[self._hosts.end(call.way)] = found, call.way

    def _host_ended(self, reference: Any) -> None:
        """A host's leg is over too: with the device's, that is the plan's end. If the host died, the plan is placed again."""
        found, way = self._ending.pop(reference)
        task = self._tasks.get(found.plan.id)
        try:
            answer, update = self._hosts.ended(reference)
        except DIED as error:
            why, node = first_line(error), self._hosts.node_of(way)
            if not self._bury_node(node):
                self._hosts.replace(way, why)
            if task is not None:
                self._again(task, f"its partition host died: {why}")
            return
        if task is None:
            self._hosts.drop(way)
        elif answer.gone and (again := upload_again(task)) is not None:
            self._upload_again(again, task)
        else:
            self._finish(joined(found, answer, update, self._notices))

    def _upload_again(self, again: Task, task: Task) -> None:
        """A replay finds its view lost: it is placed again when that has been uploaded again."""
        retry = self._view_losses.next(task, at_it=True)
        if retry is None:
            self._lose(task, "its partition host has lost its view again and again", stage="run")
            return
        self._uploaded_again += 1
        if self._uploaded_again.bit_count() == 1:
            self._notices.append(
                f"device {task.plan.device} uploads a view again that its partition host has lost "
                f"(number {self._uploaded_again})"
            )
        self._waiting[again.plan.id] = self._tasks[task.plan.id] = retry
        self._tasks[again.plan.id] = again
        self._queue.append_left(again)

    def _finish(self, found: Finished) -> None:
        """A plan has come to its end; one that has uploaded a view again is no end, but lets its replay go on."""
        self._attempts.forget(found.plan.id)
        self._view_losses.forget(found.plan.id)
        del self._tasks[found.plan.id]
        replay = self._waiting.pop(found.plan.id, None)
        if replay is None:
            self._done[found.plan.id] = found
        elif found.report.outcome == Outcome.DONE:
            self._queue.append_left(replay)
        else:
            self._finish(not_again(replay, found.report))

    def _lose(self, task: Task, why: str, *, stage: str) -> None:
        """A plan ends as lost; its host has nothing to wait for."""
        self._hosts.discard(task.plan)
        self._finish(lost(task, why, stage=stage))

    def _replace(self, seat: WorkerHandle, why: str) -> None:
        """A worker has died, or is to: another comes, and its plans are placed again, but those that it was done with."""
        if self._bury_node(seat.node):
            return
        self._all_again(self._unseat(seat, why), f"worker died: {why}")

    def _bury_node(self, node: str) -> bool:
        """Where a node is gone, all who were there are replaced, before anything is handed out."""
        if not node or not (why := gone(node)):
            return False
        self._hosts.bury_node(node, why)
        there = [seat for seat in self._crew.seats if seat.node == node]
        for tasks in [self._unseat(seat, why, gone=True) for seat in there]:
            self._all_again(tasks, why)
        return True

    def _unseat(self, seat: WorkerHandle, why: str, *, gone: bool = False) -> list[Task]:
        """Send for another worker in place of one; the plans that it was not done with. ``gone``: with its node."""
        for plan_id in list(seat.running):
            try:
                answer = ray.get(seat.running[plan_id].references, timeout=0)
            except (GetTimeoutError, *DIED):
                break
            self._answered(seat, plan_id, *answer)
        self._crew.replace(seat, why, gone=gone)
        return [self._tasks[plan_id] for plan_id in seat.running if plan_id in self._tasks]

    def _all_again(self, tasks: list[Task], why: str) -> None:
        """Place the tasks of a worker again: it was at the first, and the others have waited."""
        for number, task in enumerate(tasks):
            self._again(task, why, at_it=number == 0)

    def _again(self, task: Task, why: str, *, at_it: bool = True) -> None:
        """Place a task again, which was being carried out if ``at_it``; after the last attempt its outcome is ``lost``."""
        if away := task.needs_device and self._devices.why_away(task.group):
            self._lose(task, away, stage="train" if at_it else "down")
            return
        again = self._attempts.next(task, at_it=at_it)
        if again is None:
            self._lose(task, why, stage="run")
            return
        self._tasks[again.plan.id] = again
        self._queue.append_left(again)
