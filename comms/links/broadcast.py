"""A downlink residual that is the same for all: encoded once, sent to each device by one reference, kept in a ring.

    broadcast.advance(model, version)     residual against what every receiver holds; the packet joins the ring
    broadcast.since(version)              the packets that bring a device from ``version`` to the newest

What receivers hold is the *reconstruction*; what top-k left out is part of the next residual by itself, for the residual is
taken from the model as it is to what receivers hold. A device that missed rounds reads the packets that it missed. The ring
keeps as many as together are smaller than one dense model, which is what a device gets whose gap is longer.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..codec import Array, Arrays, Codec, Context, IdentityCodec, NumBytes
from ..packet import PacketKind, Stamp, seal
from .link import Memory, Model
from .predict import Residual, difference, restore


@dataclass(frozen=True)
class Sealed:
    """A packet in the channel: its reference and its size, and the versions between which it leads."""

    reference: Any
    num_bytes: NumBytes
    start: int
    end: int


class Broadcast:
    """One stream of residuals. ``held``: the model as every receiver has it that has followed to the end."""

    # By a checkpoint.
    SAVED: ClassVar = {"held": Model, "_ring": deque[Sealed], "_ring_bytes": NumBytes, "_dense": Sealed | None}
    NOT_SAVED = ("_put",)

    def __init__(self, first: Model, *, put: Callable[[Array], Any]) -> None:
        """``first``: agreed without a message. ``put``: hands a packet to the channel, for a reference."""
        self.held = first
        self._put = put
        self._ring: deque[Sealed] = deque()
        self._ring_bytes = 0
        self._dense: Sealed | None = None

    def advance(self, model: Arrays, version: int, *, residual: Residual, codec: Codec, context: Context) -> Sealed:
        """Seal the way from what receivers hold to ``model``; ``held`` is then what they will make of it."""
        names = list(model)
        packet, held = seal_model(
            model, version, memory=Memory(models=[self.held]), residual=residual, codec=codec, context=context
        )
        sealed = Sealed(self._put(packet), packet.nbytes, self.held.version, version)
        self.held = held
        self._ring.append(sealed)
        self._ring_bytes += sealed.num_bytes
        most = sum(model[name].nbytes for name in names)
        while len(self._ring) > 1 and self._ring_bytes > most:
            self._ring_bytes -= self._ring.popleft().num_bytes
        return sealed

    def since(self, version: int) -> list[Sealed] | None:
        """The packets from ``version`` on, oldest first; None where the ring does not reach back so far."""
        packets = [sealed for sealed in self._ring if sealed.start >= version]
        at = version
        for sealed in packets:
            if sealed.start != at:
                return None
            at = sealed.end
        return packets if at == self.held.version else None

    def dense(self, *, codec: Codec, context: Context) -> Sealed:
        """The whole of ``held``, for a device that nothing else brings there; sealed once a version."""
        version = self.held.version
        if self._dense is None or self._dense.end != version:
            packet = seal_dense(self.held, codec=codec, context=context)
            self._dense = Sealed(self._put(packet), packet.nbytes, version, version)
        return self._dense


def seal_model(
    model: Arrays, version: int, *, memory: Memory, residual: Residual, codec: Codec, context: Context
) -> tuple[Array, Model]:
    """A residual packet of ``model`` against what ``memory`` predicts, and the model that its receiver will hold."""
    names = list(model)
    prediction = memory.predict_down(residual, names)
    stamp = Stamp(kind=PacketKind.RESIDUAL, version=version, state_hash=Model.of(0, prediction).hash)
    packet, sent = seal(difference(model, prediction, residual), codec=codec, context=context, stamp=stamp)
    return packet, Model.of(version, restore(sent, prediction, residual))


def seal_dense(model: Model, *, codec: Codec, context: Context) -> Array:
    """A packet of a whole model, which builds on nothing; its stamp tells the hash of what it holds."""
    stamp = Stamp(kind=PacketKind.WEIGHTS, version=model.version, state_hash=model.hash)
    packet, _ = seal(model.arrays, codec=codec, context=context, stamp=stamp)
    return packet


def seal_agreed(model: Model) -> Array:
    """A packet without a model: the receiver makes it from the seed, and checks the hash before it is used."""
    stamp = Stamp(kind=PacketKind.AGREED, version=model.version, state_hash=model.hash)
    packet, _ = seal({}, codec=IdentityCodec(), context=Context(), stamp=stamp)
    return packet
