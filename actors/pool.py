"""The contract of pools, which run plans on workers and partition hosts, and helpers that all pools share.

The runtime submits tasks and takes results by plan; the number of workers, and where they are, changes nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from ..comms.codec import Array, NumBytes
from ..comms.links.state import LinkState
from ..policies.plan import Plan
from ..policies.report import Answer, Outcome, Report
from .messages.host_messages import HostAnswer
from .replay.replay_index import Settlement
from .replay.upload import ViewKey


class WorkerFailure(Exception):
    """An actor that a run needs could not be started, or none is left of them. One sentence says why."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One plan with the references of its packets, the device's state, and the group of workers that may run it.

    ``host_packets``: references for the host of a split plan. ``num_samples``: the device's, from which the host derives the
    stream. ``upload``: for a plan that replays a view, the plan that uploaded it; it is repeated if the host has lost the view.
    ``records``: whether this task is such a repeated upload.
    """

    plan: Plan
    packets: tuple[Any, ...]
    state: LinkState | None = None
    group: str = ""
    host_packets: tuple[Any, ...] = ()
    num_samples: int = 0
    upload: Plan | None = None
    records: bool = False

    @property
    def needs_device(self) -> bool:
        """Whether the task needs a device worker; the host carries out a replay alone."""
        return not self.plan.replays


@dataclass(frozen=True)
class StreamBytes:
    """Bytes of each packet that crossed a cut, in order."""

    up: tuple[NumBytes, ...] = ()
    down: tuple[NumBytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result of a task. ``plan``: with the attempt that ended; ``control_bytes``: size of the report.

    Of a split plan, ``update`` is the device's and ``host_update`` the host's; ``stream``: packets that crossed the cut.
    """

    plan: Plan
    report: Report
    update: Array | None
    state: LinkState | None
    control_bytes: NumBytes
    host_update: Array | None = None
    stream: StreamBytes = StreamBytes()


class Pool(Protocol):
    """Runs tasks on workers."""

    @property
    def num_workers(self) -> int:
        """Number of workers that run or are being started."""
        ...

    def ready(self) -> None:
        """Wait until a worker is ready.

        Raises ``ValueError`` if a worker cannot load the workload, ``WorkerFailure`` if none starts.
        """
        ...

    def time_steps(self, plans: Sequence[Plan]) -> list[float | None]:
        """Seconds of a training step of each of these plans, on one worker, after ``ready``; None for one that fails.

        The plans are of a whole model, and no task has been submitted.
        """
        ...

    def submit(self, task: Task) -> int:
        """Queue a task; returns the size of the plan message in bytes."""
        ...

    def result(self, plan_id: int) -> Finished:
        """Wait for this plan's result."""
        ...

    def next(self, timeout_s: float | None) -> Finished | None:
        """Wait for any plan's result; None when ``timeout_s`` passes or nothing is queued."""
        ...

    def cancel(self, plan_id: int) -> None:
        """Drop a task and its result."""
        ...

    def settle(self, settlement: Settlement) -> None:
        """Have a host keep or drop views at the end of a plan. Does not wait for the host."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait while nothing is queued."""
        ...

    def unreachable(self) -> frozenset[int]:
        """Real devices that cannot be reached now; never a simulated one."""
        ...

    def awaited(self) -> frozenset[int]:
        """Unreachable devices that may still join: those absent for longer than the pool waits for a device are left out."""
        ...

    def take_lost_devices(self) -> list[int]:
        """Real devices that have lost what they held since the last call: they left, or the pool is new."""
        ...

    def notices(self) -> list[str]:
        """Notices about workers and views since the last call, one sentence each."""
        ...

    def bodies(self, host: int, keys: Sequence[ViewKey]) -> dict[ViewKey, Array]:
        """The packets of these views, as far as a host has them, each view as one array; empty if the host is busy or dead."""
        ...

    def put(self, host: int, key: ViewKey, lengths: Array, body: Array) -> None:
        """Send a host the packets of a view, as returned by ``bodies``. ``lengths``: [packet] bytes."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def replayed(task: Task) -> Finished:
    """The result of the device's leg of a replay: no update, and the samples of the view, which weight the host's update."""
    report = Report(plan=task.plan, samples=task.num_samples)
    return Finished(plan=task.plan, report=report, update=None, state=None, control_bytes=0)


def upload_again(task: Task) -> Task | None:
    """The repeated upload of the view that a replay needs, as a task with a new attempt number; None if it is not known.

    The device sends the same packets, and the host stores them without training.
    """
    if task.upload is None:
        return None
    plan = msgspec.structs.replace(task.upload, attempt=task.upload.attempt + 1)
    return Task(plan=plan, packets=(), group=task.group, num_samples=task.num_samples, records=True)


def failed_upload_result(task: Task, upload: Report) -> Finished:
    """The result of a replay whose view could not be uploaded again; ``upload``: the report of that attempt."""
    text = f"its view is lost, and could not be uploaded again: {upload.error}"
    outcome = Outcome.LOST if upload.outcome == Outcome.LOST else Outcome.FAILED
    report = Report(plan=task.plan, outcome=outcome, stage=upload.stage, error=text)
    return Finished(plan=task.plan, report=report, update=None, state=None, control_bytes=0)


def lost_result(task: Task, why: str, *, stage: str) -> Finished:
    """The result of a plan that no worker could carry out. ``stage``: "run", or the stage at which a real device left."""
    report = Report(plan=task.plan, outcome=Outcome.LOST, stage=stage, error=why)
    return Finished(plan=task.plan, report=report, update=None, state=task.state, control_bytes=0)


def read_answer(answer: bytes, host_update: Array | None) -> tuple[HostAnswer, Array | None]:
    """Decode a host's answer."""
    return msgspec.msgpack.decode(answer, type=HostAnswer), host_update


def join_legs(device: Finished, host: HostAnswer, host_update: Array | None, notices: list[str]) -> Finished:
    """The result of both legs of a split plan, which is done if both are. The host's notices are appended to ``notices``."""
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


def read_report(plan: Plan, report: bytes, update: Array | None, state: LinkState | None) -> Finished:
    """Decode a worker's answer. An answer that cannot be read fails this plan only."""
    try:
        decoded = Report.of(plan, msgspec.msgpack.decode(report, type=Answer))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = f"its report of {len(report)} bytes cannot be read: {error}"
        decoded = Report(plan=plan, outcome=Outcome.FAILED, stage="report", error=text)
    return Finished(plan=plan, report=decoded, update=update, state=state, control_bytes=len(report))
