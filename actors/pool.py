"""The pool: where device plans run. The in-process pool runs them one at a time, when their result is asked for.

The runtime submits tasks and asks for results by plan; how many workers there are, and where, changes nothing else.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from ..comms.channel import Channel
from ..comms.codecs import Array, NumBytes
from ..comms.link import State
from ..policies.plan import Plan
from ..policies.report import Answer, Outcome, Report
from .device import Device
from .host_messages import HostAnswer
from .partition_host import PartitionHost
from .plan_message import plan_message
from .replay_index import Settlement
from .replay_upload import ViewKey


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
        return self.plan.split is None or self.plan.split.view is None


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


class InlinePool:
    """Runs each task in this process, when its result is asked for."""

    num_workers = 1

    def __init__(self, device: Device, channel: Channel, hosts: Sequence[PartitionHost] = ()) -> None:
        """One worker, ``device``; and the partition hosts, which do nothing before a split plan comes."""
        self._device, self._hosts = device, hosts
        self._channel = channel
        self._queue: OrderedDict[int, tuple[Task, bytes]] = OrderedDict()
        self._notices: list[str] = []

    def submit(self, task: Task) -> int:
        """Queue a task."""
        assert task.plan.id not in self._queue, f"plan {task.plan.id} is queued already"
        message = plan_message(task.plan)
        self._queue[task.plan.id] = task, message
        return len(message)

    def result(self, plan_id: int) -> Finished:
        """Run this task now."""
        task, message = self._queue.pop(plan_id)
        packets = [self._channel.get(reference) for reference in task.packets]
        if task.plan.split is None:
            return finished(task.plan, *self._device.run(message, packets, task.state))
        host = self._hosts[task.plan.split.host]
        host_packets = [self._channel.get(reference) for reference in task.host_packets]
        if not task.needs_device:
            return self._replay(task, host, message, host_packets)
        host.begin(message, task.num_samples, *host_packets)
        return self._stream(task, host, message, packets)

    def _stream(self, task: Task, host: PartitionHost, message: bytes, packets: Sequence[Array]) -> Finished:
        """Run a plan whose slot its host has made."""
        link = _Here(host, task.plan)
        ended = finished(task.plan, *self._device.run(message, packets, task.state, link))
        return joined(ended, *read_answer(*host.end(task.plan.id, task.plan.attempt)), self._notices)

    def _replay(self, task: Task, host: PartitionHost, message: bytes, host_packets: Sequence[Array]) -> Finished:
        """Run a plan on a view; one that its host has lost is uploaded again first."""
        answer, update = read_answer(*host.replay(message, task.num_samples, *host_packets))
        if answer.gone and (again := upload_again(task)) is not None:
            again_message = plan_message(again.plan)
            host.record(again_message, again.num_samples)
            made = self._stream(again, host, again_message, ())
            if made.report.outcome != Outcome.DONE:
                return not_again(task, made.report)
            answer, update = read_answer(*host.replay(message, task.num_samples, *host_packets))
        return joined(replayed(task), answer, update, self._notices)

    def next(self, timeout_s: float | None) -> Finished | None:
        """Run the oldest task, unless the time is up already; one that has begun is not broken off."""
        if not self._queue or (timeout_s is not None and timeout_s <= 0):
            return None
        return self.result(next(iter(self._queue)))

    def cancel(self, plan_id: int) -> None:
        """Forget a task."""
        self._queue.pop(plan_id, None)

    def settle(self, settlement: Settlement) -> None:
        """At once."""
        self._hosts[settlement.host].settle(settlement.plan_id, settlement.keep, settlement.drop)

    def wait(self, seconds: float) -> None:
        """Nothing comes of it here."""
        time.sleep(seconds)

    def unreachable(self) -> frozenset[int]:
        """None: all devices are here."""
        return frozenset()

    def awaited(self) -> frozenset[int]:
        """None: all devices are here."""
        return frozenset()

    def take_lost_devices(self) -> list[int]:
        """None: all devices are here."""
        return []

    def notices(self) -> list[str]:
        """Nothing happens to workers in process, but to what hosts have buffered."""
        found, self._notices = self._notices, []
        return found

    def bodies(self, host: int, keys: Sequence[ViewKey]) -> dict[ViewKey, Array]:
        """Of those that are there."""
        return self._hosts[host].bodies(keys)

    def put(self, host: int, key: ViewKey, lengths: Array, body: Array) -> None:
        """At once."""
        self._hosts[host].put(key, lengths, body)

    def close(self) -> None:
        """Forget what is queued."""
        self._queue.clear()
        for host in self._hosts:
            host.close()


@dataclass
class _Here:
    """The way to a host in this process."""

    host: PartitionHost
    plan: Plan
    answers: deque[Array] = field(default_factory=deque)

    def send(self, packet: Array, *, window: int) -> None:
        """Tell it; nothing is ever under way here."""
        self.answers += self.host.take(self.plan.id, self.plan.attempt, packet)

    def answer(self) -> Array:
        """What it said."""
        return self.answers.popleft()

    def flush(self) -> None:
        """Nothing is under way."""


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
