"""The pool on Ray: a worker actor in each bundle, and one on the node of each real device.

Ray restarts and retries nothing here (``max_restarts=0``, ``max_task_retries=0``): the pool does, under an attempt number, so
that an update is never folded twice. A worker's report, update and device state are separate returns owned by this process,
since an object that a worker puts into the store dies with the worker. When a node dies, all actors on it are evicted at once.

One iteration (``_wait``): wait for a result, a started actor or a heartbeat; handle all that have come; check which actors are
late, gone or hung; dispatch queued tasks.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from ...comms.codec import Array
from ...comms.links.state import LinkState, copy_state
from ...comms.ray_channel import raising_store_full
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan
from ..messages.plan_message import plan_message
from ..pool import Finished, Task, join_legs, read_report, replayed, upload_again
from .actor_placement import ActorPlacement
from .device_registry import DeviceRegistry
from .failures import ACTOR_DIED, earliest, first_line, node_failure
from .host_actor import HostSlot
from .partition_hosts import PartitionHosts
from .scheduler import Scheduler
from .worker_group import Assignment, Worker, WorkerGroup, least_loaded

_IDLE_S = 1.0  # between two checks of the devices when there is nothing to wait for


class RayPool:
    """Runs tasks on worker actors, replaces those that die, and retries their tasks."""

    def __init__(
        self,
        settings: WorkloadSettings,
        *,
        placements: Sequence[ActorPlacement],
        devices: DeviceRegistry,
        min_devices: int = 0,
        placement_timeout_s: float,
        hosts: PartitionHosts,
        max_attempts: int = 3,
        stuck_after_s: float | None = None,
        enforce: bool = False,
    ) -> None:
        """Start a worker in each placement, and for each real device that has joined.

        ``min_devices``: real devices without which it does not begin (``WorkerFailure``). ``max_attempts``: a plan whose worker
        or host dies so often is lost. ``stuck_after_s``: a worker that runs one plan for longer is ended and replaced (None:
        never). ``enforce``: whether plans run under their devices' memory budgets.
        """
        self._hosts, self._devices = hosts, devices
        self._notices = hosts.notices
        self.settle, self.bodies, self.put = hosts.settle, hosts.bodies, hosts.put
        self._scheduler = Scheduler(max_attempts)
        self._ending: dict[Any, tuple[Finished, HostSlot]] = {}  # device's leg, by the reference of its host's leg
        self._num_uploads_again = 0
        self._workers = WorkerGroup(
            settings,
            placements,
            devices,
            min_devices=min_devices,
            placement_timeout_s=placement_timeout_s,
            stuck_after_s=stuck_after_s,
            enforce=enforce,
            report=self._notices.append,
        )

    @property
    def num_workers(self) -> int:
        """Workers that are ready, or are to be started."""
        return self._workers.size

    def ready(self) -> None:
        """Wait for the first worker; the others start while it works."""
        self._workers.wait_until_ready()

    def time_steps(self, plans: Sequence[Plan]) -> list[float | None]:
        """Have the first worker time the steps, if possible one of simulated devices; if there is none, all steps fail.

        So they do if the worker dies of them. It is replaced when it is sent a plan.
        """
        worker = min(self._workers.ready, key=lambda each: each.placement.device is not None, default=None)
        if worker is None:
            return [None] * len(plans)
        try:
            seconds: list[float | None] = ray.get(
                worker.handle.time_steps.remote([plan_message(plan) for plan in plans])
            )
        except ACTOR_DIED:
            return [None] * len(plans)
        return seconds

    def submit(self, task: Task) -> int:
        """Queue a task, and start it if a worker is free."""
        self._workers.check(*([task.group] if task.needs_device else []))
        self._scheduler.submit(task)
        self._dispatch()
        return len(plan_message(task.plan))

    def result(self, plan_id: int) -> Finished:
        """Wait for this plan's end."""
        while plan_id not in self._scheduler.finished:
            self._wait(None)
        return self._scheduler.finished.pop(plan_id)

    def next(self, timeout_s: float | None) -> Finished | None:
        """Wait for any plan's end."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        results = self._scheduler.finished
        while not results:
            if not self._scheduler.has_tasks:
                return None
            self._wait(None if end is None else max(0.0, end - time.monotonic()))
            if not results and end is not None and time.monotonic() >= end:
                return None
        return results.pop(next(iter(results)))

    def wait(self, seconds: float) -> None:
        """Let so much time pass; workers may come and go meanwhile."""
        end = time.monotonic() + seconds
        while (left_s := end - time.monotonic()) > 0:
            self._wait(left_s)

    def unreachable(self) -> frozenset[int]:
        """Real devices that cannot be reached now."""
        return self._workers.unreachable

    def awaited(self) -> frozenset[int]:
        """Those of them that may still join. Raises ``WorkerFailure`` if no device is left, nor awaited."""
        self._workers.check()
        return self._devices.awaited

    def take_lost_devices(self) -> list[int]:
        """Real devices that have gone away since the last call."""
        return self._devices.take_lost()

    def cancel(self, plan_id: int) -> None:
        """Forget a task: a queued one is removed, the result of one that runs is dropped."""
        self._scheduler.cancel(plan_id)

    def notices(self) -> list[str]:
        """What happened to workers and hosts since the last call."""
        notices, self._notices[:] = list(self._notices), []
        return notices

    def close(self) -> None:
        """End workers and hosts."""
        self._workers.close()
        self._hosts.close()

    @raising_store_full()
    def _dispatch(self) -> None:
        """Send queued tasks to workers of their group, the least loaded first, and to hosts that are ready."""
        self._scheduler.dispatch(self._start)

    def _start(self, task: Task) -> bool:
        """Start a task, or lose it with its device; whether that was possible."""
        split, worker = task.plan.split, least_loaded(self._workers.ready, task.group)
        if absence := task.needs_device and self._devices.absence(task.group):
            self._lose(task, absence, stage="down")
        elif split and not self._hosts.is_ready(split.host):
            return False
        elif not task.needs_device:
            reference, slot = self._hosts.replay(task, plan_message(task.plan))
            self._ending[reference] = replayed(task), slot
        elif worker is None:
            return False
        else:
            self._send(worker, task)
        return True

    def _send(self, worker: Worker, task: Task) -> None:
        """Send a task to a worker; the slot of a split plan is made at its host, which is ready."""
        message = plan_message(task.plan)
        slot = self._hosts.begin(task, message) if task.plan.split is not None else None
        references = worker.handle.run.remote(message, task.state, slot, *task.packets)
        self._workers.assign(worker, Assignment(task.plan, references, slot))

    @raising_store_full()
    def _wait(self, timeout_s: float | None) -> None:
        """Wait until something has ended, well or not, ``timeout_s`` have passed, or something is late; and handle it."""
        self._workers.check(*self._scheduler.groups)
        running, of_hosts = self._workers.assignments(), self._hosts.references()
        left_s = earliest(timeout_s, self._hosts.left_s(), self._workers.left_s(ignoring=self._blocked()))
        references = [*running, *self._ending, *self._workers.references, *of_hosts]
        if not references:
            time.sleep(earliest(left_s, _IDLE_S) or 0.0)
        come, rest = ray.wait(references, num_returns=1, timeout=left_s) if references else ([], [])
        come += ray.wait(rest, num_returns=len(rest), timeout=0)[0] if come and rest else []
        for reference in come:
            if reference in self._ending:
                self._host_ended(reference)
            elif reference in running:
                worker, plan_id = running[reference]
                if worker in self._workers.ready and plan_id in worker.assigned:
                    self._worker_ended(worker, plan_id)
            elif not self._hosts.arrived(reference) and reference in self._workers.references:
                self._workers.arrived(reference)  # else the heartbeat of a host that was replaced meanwhile
        self._workers.check_late()  # after all that came, so that no actor is given up which has answered
        self._hosts.check_late()
        for worker, reason in self._workers.update_devices():
            self._retry_all(self._replace(worker, reason, node_is_gone=True), reason)
        self._end_hung()
        self._dispatch()

    def _blocked(self) -> list[Worker]:
        """Workers that may be waiting for a host that hangs, and are not judged before that is known."""
        return [worker for worker in self._workers.ready if worker.slot and self._hosts.may_hang(worker.slot)]

    def _end_hung(self) -> None:
        """End and replace the hosts and workers that hang."""
        if self._hosts.end_hung():
            self._workers.restart_stopwatches()
        for worker, reason in self._workers.hung(ignoring=self._blocked()):
            self._worker_died(worker, reason)

    def _worker_ended(self, worker: Worker, plan_id: int) -> None:
        """A call to a worker has ended: bring its result to this process, as views of the object store."""
        try:
            result = ray.get(worker.assigned[plan_id].references)
        except ACTOR_DIED as error:
            self._worker_died(worker, first_line(error))
        else:
            self._accept(worker, plan_id, *result)

    def _accept(
        self, worker: Worker, plan_id: int, report: bytes, update: Array | None, state: LinkState | None
    ) -> None:
        """Take the result of a worker's plan; the host's leg of a split plan is ended."""
        assignment = self._workers.release(worker, plan_id)
        plan, slot = assignment.plan, assignment.slot
        if self._scheduler.current(plan_id, plan.attempt) is None:
            if slot is not None:
                self._hosts.drop(slot)
            return
        # A view would keep its object in the store until the plan arrives, and a cohort's states may exceed the store.
        state = copy_state(state) if state is not None else None
        result = read_report(plan, report, update, state)
        if slot is None:
            self._scheduler.finish(result)
        else:
            self._ending[self._hosts.end(slot)] = result, slot

    def _host_ended(self, reference: Any) -> None:
        """The host's leg has ended, and with it the plan; if the host has died, the plan is retried."""
        device_leg, slot = self._ending.pop(reference)
        task = self._scheduler.current(slot.plan_id, slot.attempt)
        try:
            answer, update = self._hosts.result(reference)
        except ACTOR_DIED as error:
            reason = first_line(error)
            if not self._evict(self._hosts.node_of(slot)):
                self._hosts.replace(slot, reason)
            if task is not None:
                self._retry(task, f"its partition host died: {reason}")
            return
        if task is None:
            self._hosts.drop(slot)
        elif answer.gone and (upload := upload_again(task)) is not None:
            self._upload_again(upload, task)
        else:
            self._scheduler.finish(join_legs(device_leg, answer, update, self._notices))

    def _upload_again(self, upload: Task, replay: Task) -> None:
        """A host has lost the view of a replay."""
        if not self._scheduler.upload_again(upload, replay):
            self._hosts.discard(replay.plan)
            return
        self._num_uploads_again += 1
        if self._num_uploads_again.bit_count() == 1:  # at 1, 2, 4, 8, ...
            self._notices.append(
                f"device {replay.plan.device} uploads a view again that its partition host has lost "
                f"(number {self._num_uploads_again})"
            )

    def _worker_died(self, worker: Worker, reason: str) -> None:
        """A worker has died, or hangs: replace it, with all others of its node if that is gone, and retry its plans."""
        if not self._evict(worker.node):
            self._retry_all(self._replace(worker, reason), f"worker died: {reason}")

    def _evict(self, node: str) -> bool:
        """Replace all actors of a node, if it has died, before anything is sent to them; whether it has died."""
        if not node or not (reason := node_failure(node)):
            return False
        self._hosts.evict(node, reason)
        workers = self._workers.on_node(node)
        for tasks in [self._replace(worker, reason, node_is_gone=True) for worker in workers]:
            self._retry_all(tasks, reason)
        return True

    def _replace(self, worker: Worker, reason: str, *, node_is_gone: bool = False) -> list[Task]:
        """Replace a worker; the tasks of its unfinished plans, in order. Plans that had ended before are accepted."""
        for plan_id in list(worker.assigned):
            try:
                result = ray.get(worker.assigned[plan_id].references, timeout=0)
            except (GetTimeoutError, *ACTOR_DIED):
                break
            self._accept(worker, plan_id, *result)
        self._workers.replace(worker, reason, node_is_gone=node_is_gone)
        tasks = [self._scheduler.current(plan_id, each.plan.attempt) for plan_id, each in worker.assigned.items()]
        return [task for task in tasks if task is not None]

    def _retry_all(self, tasks: Sequence[Task], reason: str) -> None:
        """Retry the tasks of a worker: the first one was running, the others waited."""
        for number, task in enumerate(tasks):
            self._retry(task, reason, running=number == 0)

    def _retry(self, task: Task, reason: str, *, running: bool = True) -> None:
        """Retry a task, or lose it: after its last attempt, or with its real device."""
        if absence := task.needs_device and self._devices.absence(task.group):
            self._lose(task, absence, stage="train" if running else "down")
        elif not self._scheduler.retry(task, reason, running=running):
            self._hosts.discard(task.plan)

    def _lose(self, task: Task, reason: str, *, stage: str) -> None:
        """A plan ends as lost, and its slot is freed."""
        self._hosts.discard(task.plan)
        self._scheduler.lose(task, reason, stage=stage)
