"""Partition hosts on Ray: an actor in a bundle of its own for each, started when the first split plan needs it.

Ray neither restarts a host nor repeats a call: what streamed to a host that died is placed again by the pool, under the next
attempt number.
"""

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray import exceptions as faults
from ray.exceptions import GetTimeoutError, RayTaskError

from ..comms.codecs import Array
from ..learning.workload import WorkloadSettings
from ..policies.plan import Plan
from .host_messages import ReplaySettings
from .partition_host import BufferedViews, PartitionHost
from .pool import Task, WorkerFailure
from .ray_host import Host, start_host
from .stream import StreamFault

# The last: Ray's memory monitor killed it, because the node (not one plan) was short of memory.
DIED = (faults.RayActorError, faults.WorkerCrashedError, faults.ObjectLostError, faults.OutOfMemoryError)


class PartitionHostActor(Host):
    """The actor of a partition host. Ray names a process after the class in which the method that runs is written."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the partition host."""
        return super().call(method, *arguments)


@dataclass(frozen=True)
class Way:
    """A device's way to its host, as it travels to the worker: the actor, and what tells that the slot is there."""

    host: Any
    plan_id: int
    attempt: int
    begun: list[Any]  # in a list, so that Ray hands over the reference and does not wait for it


class RayHosts:
    """The hosts of a run, by number."""

    def __init__(
        self,
        settings: WorkloadSettings,
        replay: ReplaySettings,
        *,
        placement: Any,
        bundles: list[int],
        cpus: float,
        timeout_s: float,
    ) -> None:
        """``bundles``: index of each host's bundle. Nothing is started yet."""
        self._settings, self._replay, self._placement, self._bundles = settings, replay, placement, bundles
        self._cpus, self._timeout_s = cpus, timeout_s
        self._actors: dict[int, Any] = {}
        self.lost: list[int] = []

    def begin(self, task: Task, message: bytes) -> Way:
        """Have a slot made for a split plan."""
        assert task.plan.split is not None
        actor = self._actor(task.plan.split.host)
        begun = actor.call.remote("begin", message, task.num_samples, *task.host_packets)
        return Way(actor, task.plan.id, task.plan.attempt, [begun])

    def replay(self, task: Task, message: bytes) -> tuple[Any, Way]:
        """Have a plan carried out on a buffered view: the reference of answer and update, and where."""
        assert task.plan.split is not None
        way = Way(self._actor(task.plan.split.host), task.plan.id, task.plan.attempt, [])
        return way.host.call.remote("replay", message, task.num_samples, *task.host_packets), way

    def end(self, way: Way) -> Any:
        """Have the slot of a plan ended: the reference of answer and update."""
        return way.host.call.remote("end", way.plan_id, way.attempt)

    def settle(self, plan: Plan, *, keep: bool, notices: list[str]) -> BufferedViews:
        """Have what a plan has uploaded kept or forgotten: what its host has buffered then. ``notices`` grows."""
        assert plan.split is not None
        actor = self._actors.get(plan.split.host)
        if actor is None:  # it has died, with all that it had
            return ()
        views: BufferedViews = ()
        try:
            views, told = ray.get(actor.call.remote("settle", plan.id, keep))
            notices += told
        except DIED as error:
            if notice := self.replace(Way(actor, plan.id, plan.attempt, []), first_line(error)):
                notices.append(notice)
        return views

    def drop(self, way: Way) -> None:
        """Have the slot of a plan freed, and what it has uploaded forgotten."""
        way.host.call.remote("drop", way.plan_id)
        way.host.call.remote("settle", way.plan_id, False)

    def replace(self, way: Way, why: str) -> str | None:
        """A host has died: the next plan gets another. What to tell the operator, the first time that it is noticed."""
        for number, actor in self._actors.items():
            if actor is way.host:
                del self._actors[number]
                self.lost.append(number)
                return f"partition host {number} died ({why}) and is replaced"
        return None

    def take_lost(self) -> list[int]:
        """Numbers of those that have died since the last call."""
        found, self.lost = self.lost, []
        return found

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        """Call a method of a host that lives, or, with ``arguments`` of a restore, of one that is made for it; else None."""
        if number not in self._actors and not method.startswith("restore"):
            return None
        try:
            return ray.get(self._actor(number).call.remote(method, *arguments))
        except DIED:  # what streams to it will notice
            return None

    def close(self) -> None:
        """End the hosts, and remove what they have on disk."""
        with suppress(*DIED, RayTaskError, GetTimeoutError):
            ray.get([actor.call.remote("close") for actor in self._actors.values()], timeout=5)
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors = {}

    def _actor(self, number: int) -> Any:
        """A host's actor, made when it is not there."""
        if number not in self._actors:
            actor = start_host(
                placement=self._placement,
                bundle=self._bundles[number],
                cpus=self._cpus,
                runtime_env={},
                kind=PartitionHostActor,
            )
            try:
                ray.get(
                    actor.make.remote(partial(PartitionHost, self._settings, self._replay)),
                    timeout=self._timeout_s + 120,
                )
            except (GetTimeoutError, RayTaskError, *DIED) as error:
                raise WorkerFailure(f"partition host {number} could not be started: {first_line(error)}") from error
            self._actors[number] = actor
        return self._actors[number]


@dataclass
class RayLink:
    """The way to the host, in the worker."""

    way: Way
    under_way: deque[Any] = field(default_factory=deque)
    answers: deque[Array] = field(default_factory=deque)

    def send(self, packet: Array, *, window: int) -> None:
        """Send a packet, once fewer than ``window`` are under way."""
        if self.way.begun:  # nothing may come before the slot is there
            self._wait(self.way.begun.pop())
        while len(self.under_way) >= window:
            self._taken()
        self.under_way.append(self.way.host.call.remote("take", self.way.plan_id, self.way.attempt, packet))

    def answer(self) -> Array:
        """Wait until the host has answered the oldest packet."""
        while not self.answers:
            self._taken()
        return self.answers.popleft()

    def flush(self) -> None:
        """Wait until the host has taken all."""
        while self.under_way:
            self._taken()

    def _taken(self) -> None:
        """Wait until the host has taken the oldest packet, and keep what it answers."""
        self.answers += self._wait(self.under_way.popleft())

    def _wait(self, reference: Any) -> Any:
        """What a call gave; raises ``StreamFault``."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, StreamFault) else error from None
        except DIED as error:
            raise StreamFault(f"its partition host died: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error, without Ray's advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
