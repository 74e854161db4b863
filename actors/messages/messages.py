"""What server and devices agree on about each message without sending it: contents, codec context and stamp."""

from dataclasses import dataclass
from typing import Any

from ...comms.codec import ArraySpec, Context, NumBytes
from ...comms.links.link import State
from ...comms.links.receive import context_for
from ...comms.packet import PacketKind, Stamp
from ...learning.parts.structure import TensorSpec
from ...policies.plan import Plan


@dataclass(frozen=True)
class Message:
    """One packet on its way down: its reference, its bytes, and what the ledger counts it as."""

    reference: Any
    num_bytes: NumBytes
    kind: str


@dataclass(frozen=True)
class Dispatch:
    """A plan ready to go: with what it acknowledges, its packets, and the state of its simulated device."""

    plan: Plan
    messages: tuple[Message, ...]
    state: State | None
    host_messages: tuple[Message, ...] = ()  # what the host of a split plan needs

    @property
    def packets(self) -> tuple[Any, ...]:
        """References of the packets, in the order in which they must be read."""
        return tuple(message.reference for message in self.messages)

    @property
    def num_bytes(self) -> int:
        """Bytes of all packets."""
        return sum(message.num_bytes for message in self.messages)


def array_specs(tensors: tuple[TensorSpec, ...]) -> tuple[ArraySpec, ...]:
    """What a packet of these tensors holds before its codec."""
    return tuple(ArraySpec(t.name, t.shape, t.dtype, role=t.role) for t in tensors)


def weights_stamp(version: int) -> Stamp:
    """What a memoryless downlink packet says of itself: the same for every device, so that it is sealed once."""
    return Stamp(kind=PacketKind.WEIGHTS, version=version)


def update_stamp(plan: Plan, *, state_hash: int = 0, leg: int = 0) -> Stamp:
    """What an update says of itself: which attempt of which plan it answers, and what it builds on (0: no memory).

    ``leg``: 0 for the device's, 1 for the host's of a split plan.
    """
    return Stamp(
        kind=PacketKind.UPDATE,
        version=plan.version,
        state_hash=state_hash,
        plan=plan.id,
        attempt=plan.attempt,
        sequence=leg,
    )


def update_context(expected: tuple[ArraySpec, ...], plan: Plan) -> Context:
    """The codec context of a plan's update."""
    return context_for(expected, seed=plan.seed)
