"""What the server asks of its partition hosts on Ray, and which of them hang.

Ray neither restarts a host nor repeats a call: what streamed to a host that died is placed again by the pool, under the next
attempt number.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from ...clusters.scratch import Scratch
from ...comms.codec import Array
from ...comms.ray_channel import store_told
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan
from ..messages.host_messages import HostAnswer, ReplaySettings
from ..pool import Task, read_answer
from ..replay.replay_index import Settlement
from ..replay.upload import ViewKey
from .faults import DIED, until
from .host_group import HostGroup
from .host_watch import HostWatch
from .ray_link import Way
from .ray_place import ActorPlacement

_BODIES_S = 60.0  # that a checkpoint waits for a host that works off a queue


def _partition_host(settings: WorkloadSettings, replay: ReplaySettings, scratch: Scratch) -> Any:
    """Make a host's object, in its process; here it would import torch before the workers have been started."""
    import torch

    from ..host.partition_host import PartitionHost

    torch.set_num_threads(1)
    return PartitionHost(settings, replay, scratch)


class RayHosts:
    """The hosts of a run, by number. ``notices``: what to tell the operator; whoever reads them empties the list."""

    def __init__(
        self,
        settings: WorkloadSettings,
        replay: ReplaySettings,
        *,
        scratch: Scratch,
        places: Sequence[ActorPlacement],
        server: ActorPlacement,
        timeout_s: float,
        stuck_after_s: float | None = None,
    ) -> None:
        """``scratch``: for temporary files. ``places``: of each host, and ``server``: the server's. Nothing is started yet.

        ``stuck_after_s``: a host that has not answered for longer is ended as one that died (None: never).
        """
        self.notices: list[str] = []
        self._crew = HostGroup(
            partial(_partition_host, settings, replay, scratch),
            places=places,
            server=server,
            timeout_s=timeout_s,
            tell=self.notices.append,
        )
        self.is_ready, self.give_up = self._crew.is_ready, self._crew.give_up
        self._watch = HostWatch(stuck_after_s)
        self._asked: dict[Any, int] = {}  # hosts by the references that ``replay`` and ``end`` gave

    def begin(self, task: Task, message: bytes) -> Way:
        """Have a slot made for a split plan; its host is ready."""
        assert task.plan.split is not None
        actor = self._crew.actors[task.plan.split.host]
        kind = "record" if task.records else "begin"
        begun = actor.call.remote(kind, message, task.num_samples, *task.host_packets)
        return Way(actor, task.plan.id, task.plan.attempt, [begun])

    def replay(self, task: Task, message: bytes) -> tuple[Any, Way]:
        """Have a plan carried out on a buffered view; its host is ready. The reference of answer and update, and where."""
        assert task.plan.split is not None
        number = task.plan.split.host
        way = Way(self._crew.actors[number], task.plan.id, task.plan.attempt, [])
        reference = way.host.call.remote("replay", message, task.num_samples, *task.host_packets)
        self._asked[reference] = number
        return reference, way

    def end(self, way: Way) -> Any:
        """Have the slot of a plan ended: the reference of answer and update."""
        reference = way.host.call.remote("end", way.plan_id, way.attempt)
        if (number := self._number(way)) is not None:
            self._asked[reference] = number
        return reference

    def ended(self, reference: Any) -> tuple[HostAnswer, Array | None]:
        """What ``replay`` or ``end`` led to. Raises one of ``DIED``."""
        number = self._asked.pop(reference, None)
        answer, update = read_answer(*ray.get(reference))
        if number in self._crew.actors:  # it may have died since
            self._watch.heard(number)
        return answer, update

    def settle(self, settlement: Settlement) -> None:
        """Have what a plan has uploaded kept or forgotten, and other views dropped; waits for nothing.

        Of a host that has died or dies, all views are gone; they are uploaded again when they are wanted.
        """
        if (actor := self._crew.actors.get(settlement.host)) is not None:
            actor.call.remote("settle", settlement.plan_id, settlement.keep, settlement.drop)

    @store_told()
    def bodies(self, host: int, keys: Sequence[ViewKey]) -> dict[ViewKey, Array]:
        """The packets of those of these views that a host has; none where it does not live, or is busy for too long."""
        if (actor := self._crew.actors.get(host)) is None:
            return {}
        reference = actor.call.remote("bodies", keys)
        try:
            found: dict[ViewKey, Array] = ray.get(reference, timeout=_BODIES_S)
        except GetTimeoutError:
            self.notices.append(
                f"partition host {host} was busy for {_BODIES_S:g} s: {len(keys)} views of it are in no checkpoint yet; where "
                "they are wanted after a resumption, they are uploaded again"
            )
            return {}
        except DIED:  # what streams to it will notice
            return {}
        return found

    @store_told()
    def put(self, host: int, key: ViewKey, lengths: Array, body: Array) -> None:
        """Give a host the packets of a view; it is made if it has to be."""
        actor = self._crew.wait_for(host)
        with suppress(*DIED):  # what streams to it will notice
            ray.get(actor.call.remote("put", key, lengths, body))

    def drop(self, way: Way) -> None:
        """Have the slot of a plan freed, and what it has uploaded forgotten."""
        way.host.call.remote("drop", way.plan_id)
        way.host.call.remote("settle", way.plan_id, False, ())

    def discard(self, plan: Plan) -> None:
        """Have the slot of a plan freed that is lost, if it has one."""
        if plan.split is not None and (actor := self._crew.actors.get(plan.split.host)) is not None:
            actor.call.remote("drop", plan.id)

    def replace(self, way: Way, why: str) -> None:
        """A host has died: the next plan gets another."""
        if (number := self._number(way)) is not None:
            self._bury(number, why)

    def node_of(self, way: Way) -> str:
        """Where a host lives."""
        number = self._number(way)
        return self._crew.nodes[number] if number is not None else ""

    def bury_node(self, node: str, why: str) -> None:
        """A node is gone, with the hosts that it had."""
        for number in [number for number, where in self._crew.nodes.items() if where == node]:
            self._bury(number, why)

    def awaited(self) -> list[Any]:
        """References of hosts that start, and of signs of life that have yet to come; ``came`` takes each."""
        return self._crew.coming + self._watch.ask(self._crew.actors)

    def came(self, reference: Any) -> bool:
        """Whether this was one of them."""
        if reference in self._crew.coming:
            self._crew.arrived(reference)
            return True
        return self._watch.came(reference)

    def left_s(self) -> float | None:
        """Seconds until ``give_up`` or ``end_stuck`` has something to do, or ``awaited`` has somebody to ask."""
        return until(self._watch.left_s(), self._crew.left_s())

    def is_silent(self, way: Way) -> bool:
        """Whether a host owes a sign of life, so that nobody can tell yet who hangs."""
        number = self._number(way)
        return number is not None and self._watch.is_silent(number)

    def end_stuck(self) -> bool:
        """End the hosts that hang; whether there were any. Who waits for them learns it from Ray."""
        stuck = self._watch.stuck()
        for number in stuck:
            ray.kill(self._crew.actors[number], no_restart=True)
            self._bury(number, self._stuck())
        return bool(stuck)

    def _stuck(self) -> str:
        return f"stuck: it did not answer for more than {self._watch.seconds:g} s"

    def _bury(self, number: int, why: str) -> None:
        """Forget a host."""
        self._crew.forget(number, why)
        self._watch.forget(number)
        self.notices.append(f"partition host {number} died ({why}) and is replaced")

    def _number(self, way: Way) -> int | None:
        """The number of a host that lives, as far as is known."""
        return next((number for number, actor in self._crew.actors.items() if actor is way.host), None)

    def close(self) -> None:
        """End the hosts, and remove what they have on disk."""
        with suppress(*DIED, RayTaskError, GetTimeoutError):
            ray.get([actor.call.remote("close") for actor in self._crew.actors.values()], timeout=5)
        self._crew.close()
