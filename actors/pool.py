"""The pool: where device plans run. The in-process pool runs them one at a time, when their result is asked for.

The runtime submits tasks and asks for results by plan; how many workers there are, and where, changes nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from ..comms.codec import Array, NumBytes
from ..comms.links.link import State
from ..policies.plan import Plan
from ..policies.report import Answer, Outcome, Report
from .messages.host_messages import HostAnswer
from .replay.replay_index import Settlement
from .replay.upload import ViewKey


class WorkerFailure(Exception):
    """No worker could be started, or none is left. One sentence says why."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One plan with the references of its packets, the device's state, and the group of workers that may run it.

    ``host_packets``: what the host of a split plan needs. ``num_samples``: what the device has, which tells the host what to
    expect. ``upload``: of a plan that replays a view, the one by which it was uploaded; where the host has lost the view, it
    is carried out again. ``records``: this is such a plan.
    """

    plan: Plan
    packets: tuple[Any, ...]
    state: State | None = None
    group: str = ""
    host_packets: tuple[Any, ...] = ()
    num_samples: int = 0
    upload: Plan | None = None
    records: bool = False

    @property
    def needs_device(self) -> bool:
        """Whether it needs a worker: not on a buffered view, which its host trains alone."""
        return not self.plan.replays


@dataclass(frozen=True)
class StreamBytes:
    """Bytes of the packets that crossed a cut, in order."""

    up: tuple[NumBytes, ...] = ()
    down: tuple[NumBytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a worker gave back. ``plan`` is the attempt that succeeded; ``control_bytes`` is the size of the report.

    Of a split plan, ``host_update`` is the other leg's, and ``stream`` the bytes of each packet that crossed the cut.
    """

    plan: Plan
    report: Report
    update: Array | None
    state: State | None
    control_bytes: NumBytes
    host_update: Array | None = None
    stream: StreamBytes = StreamBytes()


class Pool(Protocol):
    """Runs tasks on workers."""

    @property
    def num_workers(self) -> int:
        """Workers that are there, or on their way."""
        ...

    def ready(self) -> None:
        """Wait until work can begin.

        Raises ``ValueError`` for what a worker cannot load, ``WorkerFailure`` where none comes.
        """
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

    def settle(self, settlement: Settlement) -> None:
        """A plan is over for the run: have its host keep or drop views. Waits for nothing."""
        ...

    def wait(self, seconds: float) -> None:
        """Let so much time pass while nothing is queued."""
        ...

    def unreachable(self) -> frozenset[int]:
        """Real devices that cannot be reached now; none of those that are simulated."""
        ...

    def awaited(self) -> frozenset[int]:
        """Those of them that may still join: none of those that have been away for longer than they are awaited."""
        ...

    def take_lost_devices(self) -> list[int]:
        """Real devices that have gone away since the last call: what they held is not known any more."""
        ...

    def notices(self) -> list[str]:
        """What happened to workers since the last call, one sentence each."""
        ...

    def bodies(self, host: int, keys: Sequence[ViewKey]) -> dict[ViewKey, Array]:
        """The packets of those of these views that a host has, each view as one array; none where it has no time for that."""
        ...

    def put(self, host: int, key: ViewKey, lengths: Array, body: Array) -> None:
        """Give a host the packets of a view, as ``bodies`` gave them; ``lengths`` of each."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def replayed(task: Task) -> Finished:
    """The device's leg of a replay: it is empty, and weighs what the view's samples do."""
    report = Report(plan=task.plan, samples=task.num_samples)
    return Finished(plan=task.plan, report=report, update=None, state=None, control_bytes=0)


def upload_again(task: Task) -> Task | None:
    """The plan by which a view was uploaded that a replay needs, as a task under a new attempt number; None: not known.

    It sends the same packets, and its host keeps them without training.
    """
    if task.upload is None:
        return None
    plan = msgspec.structs.replace(task.upload, attempt=task.upload.attempt + 1)
    return Task(plan=plan, packets=(), group=task.group, num_samples=task.num_samples, records=True)


def not_again(task: Task, upload: Report) -> Finished:
    """The end of a replay whose view could not be uploaded again, for which ``upload`` says why."""
    text = f"its view is lost, and could not be uploaded again: {upload.error}"
    outcome = Outcome.LOST if upload.outcome == Outcome.LOST else Outcome.FAILED
    report = Report(plan=task.plan, outcome=outcome, stage=upload.stage, error=text)
    return Finished(plan=task.plan, report=report, update=None, state=None, control_bytes=0)


def lost(task: Task, why: str, *, stage: str) -> Finished:
    """The end of a plan that no worker could carry out. ``stage``: "run"; of a real device that went away, where it was."""
    report = Report(plan=task.plan, outcome=Outcome.LOST, stage=stage, error=why)
    return Finished(plan=task.plan, report=report, update=None, state=task.state, control_bytes=0)


def read_answer(answer: bytes, host_update: Array | None) -> tuple[HostAnswer, Array | None]:
    """What a host gave back."""
    return msgspec.msgpack.decode(answer, type=HostAnswer), host_update


def joined(device: Finished, host: HostAnswer, host_update: Array | None, notices: list[str]) -> Finished:
    """One end of both legs of a split plan: it is done when both are. What an operator should know goes to ``notices``."""
    notices += host.notices
    stream = StreamBytes(tuple(host.up_bytes), tuple(host.down_bytes))
    report = device.report
    if report.outcome == Outcome.DONE:
        report = msgspec.structs.replace(report, steps=host.steps, loss=host.loss, loss_square=host.loss_square)
        if host.error:
            report = msgspec.structs.replace(report, outcome=Outcome.FAILED, stage="stream", error=host.error)
    done = report.outcome == Outcome.DONE
    return replace(
        device,
        report=report,
        update=device.update if done else None,
        host_update=host_update if done else None,
        stream=stream,
    )


def finished(plan: Plan, report: bytes, update: Array | None, state: State | None) -> Finished:
    """Read a worker's answer. One that cannot be read is the failure of this plan, and of no other."""
    try:
        decoded = Report.of(plan, msgspec.msgpack.decode(report, type=Answer))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = f"its report of {len(report)} bytes cannot be read: {error}"
        decoded = Report(plan=plan, outcome=Outcome.FAILED, stage="report", error=text)
    return Finished(plan=plan, report=decoded, update=update, state=state, control_bytes=len(report))
