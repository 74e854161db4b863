"""Messages down, and what both ends of a link know of a packet without sending it: contents, codec context and stamp."""

from dataclasses import dataclass
from typing import Any

from ...comms.codec import Arrays, ArraySpec, Codec, Context, NumBytes, needs_reference
from ...comms.links.receive import context_for
from ...comms.links.state import LinkState
from ...comms.packet import PacketKind, Stamp
from ...learning.parts.structure import TensorSpec
from ...learning.parts.submodel import SubModel
from ...policies.plan import Plan


@dataclass(frozen=True)
class Message:
    """One packet down: its reference in the channel, its size, and the kind under which the ledger counts it.

    ``typical``: whether it is of the format of the plan's later packets, so that their sizes are estimated by it.
    """

    reference: Any
    num_bytes: NumBytes
    kind: str
    typical: bool = True


@dataclass(frozen=True)
class Dispatch:
    """A plan as it is dispatched: the plan with all fields filled in, its packets, and the state of its simulated device.

    ``held``: packets that the device has from earlier plans, such as an index map. They are not sent; workers of simulated
    devices, which keep nothing, read them again. ``remembered``: packets of the models that ``state`` names.
    """

    plan: Plan
    messages: tuple[Message, ...]
    state: LinkState | None
    host_messages: tuple[Message, ...] = ()  # packets for the host of a split plan
    held: tuple[Message, ...] = ()
    remembered: tuple[Message, ...] = ()

    @property
    def packets(self) -> tuple[Any, ...]:
        """References of the packets that are sent to the device, in the order in which they must be read."""
        return tuple(message.reference for message in self.messages)

    def packets_for(self, *, simulated: bool) -> tuple[Any, ...]:
        """References of the packets that the device's worker reads: those of its state first.

        The worker of a ``simulated`` device reads held ones too.
        """
        before = (*self.remembered, *self.held) if simulated else self.remembered
        return (*(message.reference for message in before), *self.packets)

    @property
    def num_bytes(self) -> int:
        """Bytes that are sent to the device."""
        return sum(message.num_bytes for message in self.messages)


def array_specs(tensors: tuple[TensorSpec, ...]) -> tuple[ArraySpec, ...]:
    """The arrays in a packet of these tensors, before its codec."""
    return tuple(ArraySpec(t.name, t.shape, t.dtype, role=t.role) for t in tensors)


def update_tensors(plan: Plan, submodel: SubModel) -> tuple[TensorSpec, ...]:
    """The tensors in a plan's update. ``submodel``: the part of one leg of the plan, compiled."""
    if plan.objective.kind == "collect":
        return submodel.statistics
    return submodel.up(statistics=plan.upload.statistics)


def weights_stamp(version: int) -> Stamp:
    """The stamp of a weights packet: the same for every device, so that the packet is sealed once."""
    return Stamp(kind=PacketKind.WEIGHTS, version=version)


def update_stamp(plan: Plan, *, state_hash: int = 0, leg: int = 0) -> Stamp:
    """The stamp of an update: the attempt of the plan, and the hash of the state that it builds on (0: no memory).

    ``leg``: 0 for the device's leg, 1 for the host's leg of a split plan.
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
    """The codec context of a plan's update, at the receiver."""
    return context_for(expected, seed=plan.seed)


def sealing_context(expected: tuple[ArraySpec, ...], plan: Plan, codec: Codec, *, trained: Arrays) -> Context:
    """The codec context of a plan's update, at the sender.

    ``trained``: the trained weights, the reference of a ``codec`` that needs one.
    """
    return context_for(expected, seed=plan.seed, reference=trained if needs_reference(codec) else {})
