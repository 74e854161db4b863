"""The actor of a partition host on Ray, and the link from a device to its slot there."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError

from ...clusters.allocator import importing
from ...clusters.scratch import Scratch
from ...comms.codec import Array
from ...comms.ray_channel import raising_store_full
from ...learning.workload_settings import WorkloadSettings
from ..messages.host_messages import ReplaySettings, StreamFault
from ..replay.upload import ViewKey
from .actor import prepare_process, remote_method
from .actor_placement import ActorPlacement
from .failures import ACTOR_DIED, first_line

if TYPE_CHECKING:
    from ..host.partition_host import PartitionHost


class PartitionHostActor:
    """A ``PartitionHost`` in a process of its own. The methods are those of ``PartitionHost``, but for three."""

    _host: "PartitionHost"

    def __init__(self) -> None:
        """The host is made by ``make``, which can raise errors to its caller; an error here would look like a death."""
        prepare_process()

    @remote_method
    def make(self, settings: WorkloadSettings, replay: ReplaySettings, scratch: Scratch) -> str:
        """Make the host; the id of the node."""
        with importing():  # here, because the server starts workers before it imports torch
            import torch

            from ...learning.workload import Workload
            from ..host.partition_host import PartitionHost

        torch.set_num_threads(settings.threads)
        self._host = PartitionHost(Workload(settings), replay, scratch)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @remote_method
    def heartbeat(self) -> None:
        """Answer that the actor does not hang."""

    @remote_method
    def begin(self, plan: bytes, num_samples: int, *packets: Array) -> None:
        """Make the slot of a plan."""
        self._host.begin(plan, num_samples, *packets)

    @remote_method
    def record(self, plan: bytes, num_samples: int) -> None:
        """Make the slot of a plan that uploads its view again."""
        self._host.record(plan, num_samples)

    @remote_method
    def take(self, plan_id: int, attempt: int, packet: Array) -> list[Array]:
        """Take a packet of activations; the packets that can be answered now. Raises ``StreamFault``."""
        return self._host.take(plan_id, attempt, packet)

    @remote_method
    def end(self, plan_id: int, attempt: int) -> tuple[bytes, Array | None]:
        """End a slot: the answer and the update."""
        return self._host.end(plan_id, attempt)

    @remote_method
    def replay(self, plan: bytes, num_samples: int, *packets: Array) -> tuple[bytes, Array | None]:
        """Carry out a plan on a buffered view: the answer and the update."""
        return self._host.replay(plan, num_samples, *packets)

    @remote_method
    def drop(self, plan_id: int) -> None:
        """Free the slot of a plan, if there is one."""
        self._host.drop(plan_id)

    @remote_method
    def settle(self, plan_id: int, keep: bool, drop: Collection[ViewKey]) -> None:
        """Keep or forget what a plan has uploaded; ``drop``: other views that are no longer needed."""
        self._host.settle(plan_id, keep, drop)

    @remote_method
    def bodies(self, keys: Collection[ViewKey]) -> dict[ViewKey, Array]:
        """The packets of those of the views that are here, each view as one array."""
        return self._host.bodies(keys)

    @remote_method
    def put(self, key: ViewKey, lengths: Array, body: Array) -> None:
        """Store the packets of a view, as ``bodies`` gave them; ``lengths`` of each."""
        self._host.put(key, lengths, body)

    @remote_method
    def close(self) -> None:
        """Remove what is on disk."""
        self._host.close()


def start_partition_host(placement: ActorPlacement) -> PartitionHostActor:
    """Start the actor of a partition host; its handle."""
    handle: PartitionHostActor = ray.remote(PartitionHostActor).options(**placement.options()).remote()
    return handle


@dataclass(frozen=True)
class HostSlot:
    """The slot of one attempt of a plan at its partition host, as it travels to the worker.

    ``begun``: the reference of the call that makes the slot, in a list, since Ray would wait for a bare reference before it
    starts the plan.
    """

    host: PartitionHostActor
    plan_id: int
    attempt: int
    begun: list[Any]


@dataclass
class RayLink:
    """The link to a slot, in the worker's process. ``in_flight``: references of packets that the host has not taken yet."""

    slot: HostSlot
    in_flight: deque[Any] = field(default_factory=deque)
    answers: deque[Array] = field(default_factory=deque)

    @raising_store_full()
    def send(self, packet: Array, *, window: int) -> None:
        """Send a packet when fewer than ``window`` are in flight."""
        if self.slot.begun:  # the slot must exist before the first packet
            self._get(self.slot.begun.pop())
        while len(self.in_flight) >= window:
            self._receive()
        self.in_flight.append(self.slot.host.take.remote(self.slot.plan_id, self.slot.attempt, packet))

    def answer(self) -> Array:
        """Wait for the answer to the oldest packet."""
        while not self.answers:
            self._receive()
        return self.answers.popleft()

    def flush(self) -> None:
        """Wait until the host has taken all packets."""
        while self.in_flight:
            self._receive()

    def _receive(self) -> None:
        """Wait until the host has taken the oldest packet, and keep its answers."""
        self.answers += self._get(self.in_flight.popleft())

    @raising_store_full()
    def _get(self, reference: Any) -> Any:
        """The result of a call; raises ``StreamFault``."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, StreamFault) else error from None
        except ACTOR_DIED as error:
            raise StreamFault(f"its partition host died: {first_line(error)}") from error
