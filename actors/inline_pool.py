"""The pool in this process: it runs tasks one at a time, each when its result is asked for."""

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..comms.channel import Channel
from ..comms.codec import Array
from ..policies.plan import Plan
from ..policies.report import Outcome
from .device.plan_runner import PlanRunner
from .host.partition_host import PartitionHost
from .messages.plan_message import plan_message
from .pool import Finished, Task, failed_upload_result, join_legs, read_answer, read_report, replayed, upload_again
from .replay.replay_index import Settlement
from .replay.upload import ViewKey


class InlinePool:
    """Runs each task in this process when its result is asked for."""

    num_workers = 1

    def __init__(self, device: PlanRunner, channel: Channel, hosts: Sequence[PartitionHost] = ()) -> None:
        """``device``: the one worker. ``hosts``: the partition hosts, which load nothing before their first plan."""
        self._device, self._hosts = device, hosts
        self._channel = channel
        self._queue: OrderedDict[int, tuple[Task, bytes]] = OrderedDict()
        self._notices: list[str] = []

    def ready(self) -> None:
        """Always ready."""

    def time_steps(self, plans: Sequence[Plan]) -> list[float | None]:
        """Time the steps now."""
        return self._device.time_steps([plan_message(plan) for plan in plans])

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
            return read_report(task.plan, *self._device.run(message, packets, task.state))
        host = self._hosts[task.plan.split.host]
        host_packets = [self._channel.get(reference) for reference in task.host_packets]
        if not task.needs_device:
            return self._replay(task, host, message, host_packets)
        host.begin(message, task.num_samples, *host_packets)
        return self._stream(task, host, message, packets)

    def _stream(self, task: Task, host: PartitionHost, message: bytes, packets: Sequence[Array]) -> Finished:
        """Run both legs of a plan whose slot the host has made."""
        link = _InlineLink(host, task.plan)
        result = read_report(task.plan, *self._device.run(message, packets, task.state, link))
        return join_legs(result, *read_answer(*host.end(task.plan.id, task.plan.attempt)), self._notices)

    def _replay(self, task: Task, host: PartitionHost, message: bytes, host_packets: Sequence[Array]) -> Finished:
        """Train on a view; a view that the host has lost is uploaded again first."""
        answer, update = read_answer(*host.replay(message, task.num_samples, *host_packets))
        if answer.gone and (again := upload_again(task)) is not None:
            again_message = plan_message(again.plan)
            host.record(again_message, again.num_samples)
            uploaded = self._stream(again, host, again_message, ())
            if uploaded.report.outcome != Outcome.DONE:
                return failed_upload_result(task, uploaded.report)
            answer, update = read_answer(*host.replay(message, task.num_samples, *host_packets))
        return join_legs(replayed(task), answer, update, self._notices)

    def next(self, timeout_s: float | None) -> Finished | None:
        """Run the oldest task, unless the timeout is 0 or less; a running task is not interrupted."""
        if not self._queue or (timeout_s is not None and timeout_s <= 0):
            return None
        return self.result(next(iter(self._queue)))

    def cancel(self, plan_id: int) -> None:
        """Drop a task."""
        self._queue.pop(plan_id, None)

    def settle(self, settlement: Settlement) -> None:
        """Done at once."""
        self._hosts[settlement.host].settle(settlement.plan_id, settlement.keep, settlement.drop)

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def unreachable(self) -> frozenset[int]:
        """No device: all are simulated."""
        return frozenset()

    def awaited(self) -> frozenset[int]:
        """No device: all are simulated."""
        return frozenset()

    def take_lost_devices(self) -> list[int]:
        """No device: all are simulated."""
        return []

    def notices(self) -> list[str]:
        """Notices of the hosts about their views."""
        notices, self._notices = self._notices, []
        return notices

    def bodies(self, host: int, keys: Sequence[ViewKey]) -> dict[ViewKey, Array]:
        """The views that the host has."""
        return self._hosts[host].bodies(keys)

    def put(self, host: int, key: ViewKey, lengths: Array, body: Array) -> None:
        """Done at once."""
        self._hosts[host].put(key, lengths, body)

    def close(self) -> None:
        """Drop all tasks, and close the device and the hosts."""
        self._queue.clear()
        self._device.close()
        for host in self._hosts:
            host.close()


@dataclass
class _InlineLink:
    """A device's connection to a host in the same process."""

    host: PartitionHost
    plan: Plan
    answers: deque[Array] = field(default_factory=deque)

    def send(self, packet: Array, *, window: int) -> None:
        """Have the host process the packet at once."""
        self.answers += self.host.take(self.plan.id, self.plan.attempt, packet)

    def answer(self) -> Array:
        """The oldest answer."""
        return self.answers.popleft()

    def flush(self) -> None:
        """The host has processed all packets."""
