"""The partition hosts of a run on Ray: a group of supervised actors, the server's calls to them, and those that hang.

A host is started when a split plan first needs it, and replaced when it dies. If its bundle cannot be placed any more, it runs
beside the server, whose bundle exists as long as the server does. Ray neither restarts a host nor repeats a call: the pool
retries the plans that streamed to a host which died, under the next attempt number.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from ...clusters.scratch import Scratch
from ...comms.codec import Array
from ...comms.ray_channel import raising_store_full
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan
from ..messages.host_messages import HostAnswer, ReplaySettings
from ..pool import Task, WorkerFailure, read_answer
from ..replay.replay_index import Settlement
from ..replay.upload import ViewKey
from .actor_group import ActorGroup, GroupMember
from .actor_placement import ActorPlacement
from .failures import ACTOR_DIED, earliest
from .hang_detector import Heartbeats
from .host_actor import HostSlot, PartitionHostActor, start_partition_host

_BODIES_TIMEOUT_S = 60.0  # that a checkpoint waits for a busy host


@dataclass(eq=False)
class Host(GroupMember):
    """A partition host that is ready."""

    handle: PartitionHostActor


class PartitionHosts:
    """The hosts by number. ``notices``: what to tell the operator; the reader empties the list."""

    def __init__(
        self,
        settings: WorkloadSettings,
        replay: ReplaySettings,
        *,
        scratch: Scratch,
        placements: Sequence[ActorPlacement],
        placement_timeout_s: float,
        stuck_after_s: float | None = None,
    ) -> None:
        """Nothing is started yet. ``scratch``: for temporary files. ``placements``: of each host.

        ``stuck_after_s``: a host that has answered no call for longer is ended and replaced (None: never).
        """

        def start(placement: ActorPlacement) -> tuple[Any, Any]:
            host = start_partition_host(placement)
            return host, host.make.remote(settings, replay, scratch)

        self.notices: list[str] = []
        self._placements = placements
        self._group = ActorGroup(start, Host, placement_timeout_s=placement_timeout_s, report=self.notices.append)
        self._heartbeats = Heartbeats[Host](stuck_after_s)
        self._calls: dict[Any, Host] = {}  # hosts by the references that ``replay`` and ``end`` gave

    def is_ready(self, number: int) -> bool:
        """Whether a host is ready; it is started if it was not. Raises ``WorkerFailure`` if it could not be started."""
        placement = self._placements[number]
        if (failure := self._group.failed.pop(placement, None)) is not None:
            raise WorkerFailure(str(failure))
        if placement in self._group.ready:
            return True
        if placement not in self._group.pending:
            self._group.start(placement)
        return False

    def begin(self, task: Task, message: bytes) -> HostSlot:
        """Make the slot of a split plan; its host is ready."""
        host, plan = self._handle(task.plan), task.plan
        if task.records:
            begun = host.record.remote(message, task.num_samples)
        else:
            begun = host.begin.remote(message, task.num_samples, *task.host_packets)
        return HostSlot(host, plan.id, plan.attempt, [begun])

    def replay(self, task: Task, message: bytes) -> tuple[Any, HostSlot]:
        """Carry out a plan on a buffered view; its host is ready. The reference of answer and update, and the slot."""
        host, plan = self._handle(task.plan), task.plan
        reference = host.replay.remote(message, task.num_samples, *task.host_packets)
        return self._note_call(reference, HostSlot(host, plan.id, plan.attempt, []))

    def end(self, slot: HostSlot) -> Any:
        """End a slot: the reference of answer and update."""
        return self._note_call(slot.host.end.remote(slot.plan_id, slot.attempt), slot)[0]

    def result(self, reference: Any) -> tuple[HostAnswer, Array | None]:
        """The result of ``replay`` or ``end``. Raises one of ``ACTOR_DIED``."""
        member = self._calls.pop(reference, None)
        answer, update = read_answer(*ray.get(reference))
        if member is not None and member in self._group.ready.values():  # it may have died since
            self._heartbeats.note_activity(member)
        return answer, update

    def settle(self, settlement: Settlement) -> None:
        """Have a host keep or forget what a plan has uploaded, and drop other views. Does not wait.

        A host that dies loses all views; they are uploaded again when they are needed.
        """
        if (member := self._ready(settlement.host)) is not None:
            member.handle.settle.remote(settlement.plan_id, settlement.keep, settlement.drop)

    @raising_store_full()
    def bodies(self, host: int, keys: Sequence[ViewKey]) -> dict[ViewKey, Array]:
        """The packets of those of these views that a host has; none if it is not ready, or busy for too long."""
        if (member := self._ready(host)) is None:
            return {}
        reference = member.handle.bodies.remote(keys)
        try:
            found: dict[ViewKey, Array] = ray.get(reference, timeout=_BODIES_TIMEOUT_S)
        except GetTimeoutError:
            self.notices.append(
                f"partition host {host} was busy for {_BODIES_TIMEOUT_S:g} s: {len(keys)} of its views are in no checkpoint "
                "yet; those that are needed after a resumption are uploaded again"
            )
            return {}
        except ACTOR_DIED:  # noticed by the plans that stream to it
            return {}
        return found

    @raising_store_full()
    def put(self, host: int, key: ViewKey, lengths: Array, body: Array) -> None:
        """Give a host the packets of a view, once it is ready. Raises ``WorkerFailure``."""
        member = self.wait_for(host)
        with suppress(*ACTOR_DIED):  # noticed by the plans that stream to it
            ray.get(member.handle.put.remote(key, lengths, body))

    def wait_for(self, number: int) -> Host:
        """A host, once it is ready. Raises ``WorkerFailure``."""
        while not self.is_ready(number):
            for reference in ray.wait(self._group.references, num_returns=1, timeout=self._group.left_s())[0]:
                self._group.arrived(reference)
            self._group.check_late()
        return self._group.ready[self._placements[number]]

    def drop(self, slot: HostSlot) -> None:
        """Free a slot, and forget what its plan has uploaded."""
        slot.host.drop.remote(slot.plan_id)
        slot.host.settle.remote(slot.plan_id, False, ())

    def discard(self, plan: Plan) -> None:
        """Free the slot of a plan that is lost, if it has one."""
        if plan.split is not None and (member := self._ready(plan.split.host)) is not None:
            member.handle.drop.remote(plan.id)

    def node_of(self, slot: HostSlot) -> str:
        """The node of a slot's host; "" if the host is known to have died."""
        member = self._member(slot)
        return member.node if member is not None else ""

    def replace(self, slot: HostSlot, reason: str) -> None:
        """The host of a slot has died."""
        if (member := self._member(slot)) is not None:
            self._replace(member, reason)

    def evict(self, node: str, reason: str) -> None:
        """A node has died, with the hosts on it."""
        for member in self._group.on_node(node):
            self._replace(member, reason)

    def references(self) -> list[Any]:
        """Ask for the heartbeats that are due. References of starting hosts and of heartbeats, to wait for (``arrived``)."""
        return self._group.references + self._heartbeats.request(self._group.ready.values())

    def arrived(self, reference: Any) -> bool:
        """Take one of ``references``, which has come; whether it is one of them."""
        if reference in self._group.references:
            self._group.arrived(reference)
            return True
        return self._heartbeats.received(reference)

    def left_s(self) -> float | None:
        """Seconds until ``check_late``, ``end_hung`` or ``references`` has something to do."""
        return earliest(self._heartbeats.left_s(), self._group.left_s())

    def check_late(self) -> None:
        """Move or give up hosts that should have been placed, or ready, by now."""
        self._group.check_late()

    def may_hang(self, slot: HostSlot) -> bool:
        """Whether the host of a slot has not answered its last heartbeat yet."""
        member = self._member(slot)
        return member is not None and self._heartbeats.is_pending(member)

    def end_hung(self) -> bool:
        """End and replace the hosts that hang; whether there were any. Pending calls to them fail."""
        hung = self._heartbeats.hung()
        for member in hung:
            self._replace(member, f"stuck: it did not answer for more than {self._heartbeats.limit_s:g} s")
        return bool(hung)

    def close(self) -> None:
        """End the hosts, and remove what they have on disk."""
        with suppress(*ACTOR_DIED, RayTaskError, GetTimeoutError):
            ray.get([member.handle.close.remote() for member in self._group.ready.values()], timeout=5)
        self._group.close()

    def _ready(self, number: int) -> Host | None:
        return self._group.ready.get(self._placements[number])

    def _handle(self, plan: Plan) -> PartitionHostActor:
        """The handle of a split plan's host, which is ready."""
        assert plan.split is not None
        return self._group.ready[self._placements[plan.split.host]].handle

    def _member(self, slot: HostSlot) -> Host | None:
        """The host of a slot, unless it is known to have died."""
        return next((member for member in self._group.ready.values() if member.handle is slot.host), None)

    def _note_call(self, reference: Any, slot: HostSlot) -> tuple[Any, HostSlot]:
        if (member := self._member(slot)) is not None:
            self._calls[reference] = member
        return reference, slot

    def _replace(self, member: Host, reason: str) -> None:
        self._heartbeats.forget(member)
        self._group.replace(member, reason)
