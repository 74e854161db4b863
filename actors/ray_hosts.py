"""Partition hosts on Ray: an actor in a bundle of its own for each, started when the first split plan needs it.

Ray neither restarts a host nor repeats a call: what streamed to a host that died is placed again by the pool, under the next
attempt number.
"""

from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ..comms.codecs import Array
from ..comms.ray_channel import store_told
from ..learning.workload import WorkloadSettings
from ..policies.plan import Plan
from .host_messages import ReplaySettings
from .host_watch import HostWatch
from .partition_host import BufferedViews, PartitionHost
from .pool import Task, WorkerFailure
from .ray_faults import DIED, MOST_STARTS, await_made, first_line
from .ray_host import Host, start_host
from .ray_link import Way


class PartitionHostActor(Host):
    """The actor of a partition host. Ray names a process after the class in which the method that runs is written."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the partition host."""
        return super().call(method, *arguments)

    def sign(self) -> None:
        """A sign of life."""


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
        stuck_after_s: float | None = None,
    ) -> None:
        """``bundles``: index of each host's bundle. Nothing is started yet.

        ``stuck_after_s``: a host that has not answered for longer is ended as one that died (None: never).
        """
        self._settings, self._replay, self._placement, self._bundles = settings, replay, placement, bundles
        self._cpus, self._timeout_s = cpus, timeout_s
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._watch = HostWatch(stuck_after_s)
        self._asked: dict[Any, int] = {}  # hosts by the references that ``replay`` and ``end`` gave
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
        number = task.plan.split.host
        way = Way(self._actor(number), task.plan.id, task.plan.attempt, [])
        reference = way.host.call.remote("replay", message, task.num_samples, *task.host_packets)
        self._asked[reference] = number
        return reference, way

    def end(self, way: Way) -> Any:
        """Have the slot of a plan ended: the reference of answer and update."""
        reference = way.host.call.remote("end", way.plan_id, way.attempt)
        if (number := self._number(way)) is not None:
            self._asked[reference] = number
        return reference

    def ended(self, reference: Any) -> tuple[bytes, Array | None]:
        """What ``replay`` or ``end`` led to. Raises one of ``DIED``."""
        number = self._asked.pop(reference, None)
        answer: tuple[bytes, Array | None] = ray.get(reference)
        if number is not None:
            self._watch.heard(number)
        return answer

    def settle(self, plan: Plan, *, keep: bool, notices: list[str]) -> BufferedViews:
        """Have what a plan has uploaded kept or forgotten: what its host has buffered then. ``notices`` grows."""
        assert plan.split is not None
        actor = self._actors.get(plan.split.host)
        if actor is None:  # it has died, with all that it had
            return ()
        views: BufferedViews = ()
        try:
            views, told = self._answer(plan.split.host, actor.call.remote("settle", plan.id, keep))
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
        number = self._number(way)
        return self._bury(number, why) if number is not None else None

    def node_of(self, way: Way) -> str:
        """Where a host lives."""
        number = self._number(way)
        return self._nodes[number] if number is not None else ""

    def bury_node(self, node: str, why: str) -> list[str]:
        """A node is gone, with the hosts that it had; what to tell the operator."""
        return [self._bury(number, why) for number in list(self._actors) if self._nodes[number] == node]

    def signs(self) -> list[Any]:
        """References of signs of life that have yet to come; ``came`` takes each."""
        return self._watch.ask(self._actors)

    def came(self, reference: Any) -> bool:
        """Whether this was a sign of life."""
        return self._watch.came(reference)

    def left_s(self) -> float | None:
        """Seconds until ``end_stuck`` has something to do, or ``signs``."""
        return self._watch.left_s()

    def is_silent(self, way: Way) -> bool:
        """Whether a host owes a sign of life, so that nobody can tell yet who hangs."""
        number = self._number(way)
        return number is not None and self._watch.is_silent(number)

    def end_stuck(self) -> list[str]:
        """End the hosts that hang; what to tell the operator. Who waits for them learns it from Ray."""
        return [self._end(number) for number in self._watch.stuck()]

    def _end(self, number: int) -> str:
        ray.kill(self._actors[number], no_restart=True)
        return self._bury(number, self._stuck())

    def _stuck(self) -> str:
        return f"stuck: it did not answer for more than {self._watch.seconds:g} s"

    def _bury(self, number: int, why: str) -> str:
        """Forget a host."""
        del self._actors[number], self._nodes[number]
        self._watch.forget(number)
        self.lost.append(number)
        return f"partition host {number} died ({why}) and is replaced"

    def _number(self, way: Way) -> int | None:
        """The number of a host that lives, as far as is known."""
        return next((number for number, actor in self._actors.items() if actor is way.host), None)

    @store_told()
    def _answer(self, number: int, reference: Any) -> Any:
        """Wait for a host's answer. Raises one of ``DIED``, also where it hangs: nothing comes from it in time."""
        waited = [reference, *(asked for asked, host in self._asked.items() if host == number)]
        while self._watch.seconds is not None:
            ready, waited = ray.wait(waited, num_returns=1, timeout=self._watch.seconds)
            if not ready:
                ray.kill(self._actors[number], no_restart=True)
                raise RayActorError(error_msg=self._stuck())
            if reference in ready:
                break
        return ray.get(reference)

    def take_lost(self) -> list[int]:
        """Numbers of those that have died since the last call."""
        found, self.lost = self.lost, []
        return found

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        """Call a method of a host that lives, or, with ``arguments`` of a restore, of one that is made for it; else None."""
        if number not in self._actors and not method.startswith("restore"):
            return None
        actor = self._actor(number)
        try:
            return self._answer(number, actor.call.remote(method, *arguments))
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
        for start in range(MOST_STARTS):
            if number in self._actors:
                break
            actor = start_host(
                placement=self._placement,
                bundle=self._bundles[number],
                cpus=self._cpus,
                runtime_env={},
                kind=PartitionHostActor,
            )
            made = actor.make.remote(partial(PartitionHost, self._settings, self._replay))
            try:
                node = await_made(made, placement=self._placement, timeout_s=self._timeout_s)
            except (TimeoutError, RayTaskError, *DIED) as error:
                ray.kill(actor, no_restart=True)
                if isinstance(error, DIED) and start + 1 < MOST_STARTS:
                    continue
                raise WorkerFailure(f"partition host {number} could not be started: {first_line(error)}") from error
            self._actors[number], self._nodes[number] = actor, node
        return self._actors[number]
