"""Downlinks without memory: one sealed packet for each version, part and codec chain, shared by all such plans."""

from collections.abc import Callable, Collection, Mapping
from typing import ClassVar

from torch import Tensor

from ...comms.channel import Channel
from ...comms.errors import MismatchedPacket
from ...learning.parts.part import Part
from ...learning.parts.submodel import SubModel
from ...learning.tensors import as_tensors
from ...policies.plan import Plan
from ..messages.dense_packets import open_weights, seal_weights
from ..messages.messages import Message

Compile = Callable[[Part], SubModel]  # of the workload


class DenseDownlink:
    """The packets of all versions from which plans in flight started."""

    SAVED: ClassVar = {"_sealed": dict[tuple[int, str, str], Message]}  # by a checkpoint
    NOT_SAVED = ("_channel", "_submodel")

    def __init__(self, channel: Channel, submodel: Compile) -> None:
        """Holds no packet yet."""
        self._channel, self._submodel = channel, submodel
        self._sealed: dict[tuple[int, str, str], Message] = {}

    def send(self, plan: Plan, model: Mapping[str, Tensor]) -> Message:
        """The packet with the plan's part of ``model``, sealed when it is first needed."""
        key = _key(plan)
        if key not in self._sealed:
            self._sealed[key] = send_weights(plan, model, self._channel, self._submodel(plan.part))
        return self._sealed[key]

    def sent(self, plan: Plan) -> dict[str, Tensor]:
        """The tensors that ``plan`` was sent; raises ``MismatchedPacket`` if its packet was dropped."""
        key = _key(plan)
        if key not in self._sealed:
            raise MismatchedPacket(f"the packet of version {plan.version} that plan {plan.id} started from is gone")
        return sent_weights(self._sealed[key], plan, self._channel, self._submodel(plan.part))

    def keep(self, versions: Collection[int]) -> None:
        """Drop the packets of all other versions."""
        self._sealed = {key: message for key, message in self._sealed.items() if key[0] in versions}


def send_weights(plan: Plan, model: Mapping[str, Tensor], channel: Channel, submodel: SubModel) -> Message:
    """Put a packet with the plan's part of ``model`` into the channel. ``submodel``: that part, compiled."""
    packet = seal_weights(plan, model, submodel)
    return Message(channel.put(packet), packet.nbytes, "weights")


def sent_weights(message: Message, plan: Plan, channel: Channel, submodel: SubModel) -> dict[str, Tensor]:
    """The tensors in a packet of ``send_weights``."""
    return as_tensors(open_weights(channel.get(message.reference), plan, submodel))


def _key(plan: Plan) -> tuple[int, str, str]:
    """Plans with equal keys share a packet."""
    return plan.version, plan.part.key, repr(plan.codec_down)
