"""The downlink without memory: one sealed packet for each version, part and chain of codecs, sent to whoever gets the same."""

from collections.abc import Collection, Mapping
from typing import ClassVar

import torch

from ...comms.channel import Channel
from ...comms.codec import Array, Arrays
from ...comms.codecs.make_codec import make_codec
from ...comms.errors import MismatchedPacket
from ...comms.links.receive import context_for
from ...comms.packet import seal, unseal
from ...learning.parts.part import Part, down_tensors
from ...learning.parts.structure import ModelSpec
from ...learning.tensors import as_arrays, as_tensors
from ...policies.plan import Plan
from ..messages.messages import Message, array_specs, weights_stamp


class DenseDownlink:
    """Packets of versions that plans in flight started from."""

    SAVED: ClassVar = {"_sealed": dict[tuple[int, str, str], Message]}  # by a checkpoint
    NOT_SAVED = ("_channel", "_spec")

    def __init__(self, channel: Channel, spec: ModelSpec) -> None:
        """None yet."""
        self._channel, self._spec = channel, spec
        self._sealed: dict[tuple[int, str, str], Message] = {}

    def send(self, plan: Plan, model: Mapping[str, torch.Tensor]) -> Message:
        """The packet with the plan's part of ``model``."""
        key = _key(plan)
        if key not in self._sealed:
            self._sealed[key] = sealed(plan, model, self._channel, self._spec)
        return self._sealed[key]

    def sent(self, plan: Plan) -> dict[str, torch.Tensor]:
        """The tensors that ``plan`` was sent."""
        key = _key(plan)
        if key not in self._sealed:
            raise MismatchedPacket(f"the packet of version {plan.version} that plan {plan.id} started from is gone")
        return opened(self._sealed[key], plan, self._channel, self._spec)

    def keep(self, versions: Collection[int]) -> None:
        """Forget all but these versions."""
        self._sealed = {key: message for key, message in self._sealed.items() if key[0] in versions}


def sealed(plan: Plan, model: Mapping[str, torch.Tensor], channel: Channel, spec: ModelSpec) -> Message:
    """A packet with the plan's part of ``model``, where its receiver can get it."""
    expected = array_specs(down_tensors(spec, plan.part))
    packet, _ = seal(
        as_arrays({tensor.name: model[tensor.name] for tensor in expected}),
        codec=make_codec(plan.codec_down),
        context=context_for(expected, seed=plan.version),
        stamp=weights_stamp(plan.version),
    )
    return Message(channel.put(packet), packet.nbytes, "weights")


def opened(message: Message, plan: Plan, channel: Channel, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The tensors that a packet of ``sealed`` brings."""
    return as_tensors(open_weights(channel.get(message.reference), plan, plan.part, spec))


def open_weights(packet: Array, plan: Plan, part: Part, spec: ModelSpec) -> Arrays:
    """The tensors of ``part`` in the packet that a leg of the plan was sent; raises a ``PacketError``."""
    expected = array_specs(down_tensors(spec, part))
    return unseal(
        packet,
        codec=make_codec(plan.codec_down),
        expected=expected,
        context=context_for(expected, seed=plan.version),
        stamp=weights_stamp(plan.version),
    )


def _key(plan: Plan) -> tuple[int, str, str]:
    """What makes two downlink packets the same."""
    return plan.version, plan.part.key, repr(plan.codec_down)
