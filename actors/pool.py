"""The pool: where device plans run. The in-process pool runs them one at a time, when their result is asked for.

The runtime submits tasks and asks for results by plan; how many workers there are, and where, changes nothing else.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ..comms.channel import Channel
from ..comms.codecs import Array
from ..comms.link import State
from ..policies.plan import Plan
from ..policies.report import Answer, Outcome, Report
from .device import Device
from .plan_message import plan_message


class WorkerFailure(Exception):
    """No worker could be started, or none is left. One sentence says why."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One plan with the references of its packets, the device's state, and the group of workers that may run it."""

    plan: Plan
    packets: tuple[Any, ...]
    state: State | None = None
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a worker gave back. ``plan`` is the attempt that succeeded; ``control_bytes`` is the size of the report."""

    plan: Plan
    report: Report
    update: Array | None
    state: State | None
    control_bytes: int


class Pool(Protocol):
    """Runs tasks on workers."""

    @property
    def num_workers(self) -> int:
        """Workers that can run now."""
        ...

    def submit(self, task: Task) -> int:
        """Queue a task; the size of the plan message in bytes."""
        ...

    def result(self, plan_id: int) -> Finished:
        """Wait for this plan's end."""
        ...

    def next(self, timeout_s: float | None) -> Finished | None:
        """Wait for any plan's end; None when ``timeout_s`` passes or nothing is queued."""
        ...

    def cancel(self, plan_id: int) -> None:
        """Forget a task; its result is dropped."""
        ...

    def notices(self) -> list[str]:
        """What happened to workers since the last call, one sentence each."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class InlinePool:
    """Runs each task in this process, when its result is asked for."""

    num_workers = 1

    def __init__(self, device: Device, channel: Channel) -> None:
        """One worker: ``device``."""
        self._device = device
        self._channel = channel
        self._queue: OrderedDict[int, tuple[Task, bytes]] = OrderedDict()

    def submit(self, task: Task) -> int:
        """Queue a task."""
        assert task.plan.id not in self._queue, f"plan {task.plan.id} is queued already"
        message = plan_message(task.plan)
        self._queue[task.plan.id] = task, message
        return len(message)

    def result(self, plan_id: int) -> Finished:
        """Run this task now."""
        task, message = self._queue.pop(plan_id)
        report, update, state = self._device.run(
            message, [self._channel.get(reference) for reference in task.packets], task.state
        )
        return finished(task.plan, report, update, state)

    def next(self, timeout_s: float | None) -> Finished | None:
        """Run the oldest task, unless the time is up already; one that has begun is not broken off."""
        if not self._queue or (timeout_s is not None and timeout_s <= 0):
            return None
        return self.result(next(iter(self._queue)))

    def cancel(self, plan_id: int) -> None:
        """Forget a task."""
        self._queue.pop(plan_id, None)

    def notices(self) -> list[str]:
        """Nothing happens to workers in process."""
        return []

    def close(self) -> None:
        """Forget what is queued."""
        self._queue.clear()


def finished(plan: Plan, report: bytes, update: Array | None, state: State | None) -> Finished:
    """Read a worker's answer. One that cannot be read is the failure of this plan, and of no other."""
    try:
        decoded = Report.of(plan, msgspec.msgpack.decode(report, type=Answer))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = f"its report of {len(report)} bytes cannot be read: {error}"
        decoded = Report(plan=plan, outcome=Outcome.FAILED, stage="report", error=text)
    return Finished(plan=plan, report=decoded, update=update, state=state, control_bytes=len(report))
