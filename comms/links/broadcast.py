"""Downlink residuals that are the same for all devices: encoded once, sent to each device by reference, kept in a ring.

    broadcast.advance(model, version)     seals the residual against the model that receivers hold; adds it to the ring
    broadcast.since(version)              the packets that bring a device from ``version`` to the newest version

Receivers hold the *reconstruction*. The residual is taken between the server's model and the reconstruction, so entries that
top-k left out are part of the next residual. A device that missed rounds gets the packets that it missed. The ring holds
packets up to the size of one dense model in total, but always the newest; a device with a longer gap gets a dense model.

A sequence for other channels can grow out of another one: it starts with the newest model of that one, moved there, and a patch
leads devices that hold this model from one sequence to the other.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..codec import Array, Arrays, Codec, Context, IdentityCodec, NumBytes
from ..packet import PacketKind, Stamp, seal
from .memory import WHOLE, HeldModel, LinkMemory, Move
from .patch import seal_patch
from .predict import Residual, residuals_of, restore


@dataclass(frozen=True)
class SealedPacket:
    """A packet in the channel: its reference and size. It leads from version ``start`` to version ``end``."""

    reference: Any
    num_bytes: NumBytes
    start: int
    end: int


@dataclass(frozen=True)
class Origin:
    """The sequence that another one has grown out of, by its key, and the patch that leads from the one to the other."""

    key: str
    patch: SealedPacket


class Broadcast:
    """One sequence of broadcast residuals.

    ``held``: the newest model, as receivers hold it. ``place``: of its models. ``origin``: None if it grew out of no other.
    """

    # Saved by a checkpoint.
    SAVED: ClassVar = {
        "held": HeldModel,
        "place": bytes,
        "origin": Origin | None,
        "_ring": deque[SealedPacket],
        "_ring_bytes": NumBytes,
        "_dense": SealedPacket | None,
    }
    NOT_SAVED = ("_put",)

    def __init__(
        self, first: HeldModel, *, put: Callable[[Array], Any], place: bytes = WHOLE, origin: Origin | None = None
    ) -> None:
        """``first``: the model that both ends make without a message. ``put``: stores a packet, returns its reference."""
        self.held = first
        self.place, self.origin = place, origin
        self._put = put
        self._ring: deque[SealedPacket] = deque()
        self._ring_bytes = 0
        self._dense: SealedPacket | None = None

    def advance(
        self, model: Arrays, version: int, *, residual: Residual, codec: Codec, context: Context
    ) -> SealedPacket:
        """Seals the residual from ``held`` to ``model``, and sets ``held`` to what receivers will reconstruct."""
        names = list(model)
        packet, held = seal_model(
            model, version, memory=LinkMemory(models=[self.held]), residual=residual, codec=codec, context=context
        )
        sealed = SealedPacket(self._put(packet), packet.nbytes, self.held.version, version)
        self.held = held
        self._ring.append(sealed)
        self._ring_bytes += sealed.num_bytes
        dense_bytes = sum(model[name].nbytes for name in names)
        while len(self._ring) > 1 and self._ring_bytes > dense_bytes:
            self._ring_bytes -= self._ring.popleft().num_bytes
        return sealed

    def grow(self, key: str, place: bytes, move: Move, model: Arrays) -> "Broadcast":
        """A sequence at another place that starts with the newest model of this one, whose key is ``key``.

        ``model``: the current model there, of which elements that are new there have their values.
        """
        packet, moved = seal_patch(LinkMemory(models=[self.held]), move, model)
        version = self.held.version
        patch = SealedPacket(self._put(packet), packet.nbytes, version, version)
        return Broadcast(moved.models[-1], put=self._put, place=place, origin=Origin(key, patch))

    def since(self, version: int, *, until: int | None = None) -> list[SealedPacket] | None:
        """The packets from ``version`` to the newest one or to ``until``, oldest first; None if the ring does not hold them."""
        until = self.held.version if until is None else until
        packets = [sealed for sealed in self._ring if sealed.start >= version and sealed.end <= until]
        reached = version
        for sealed in packets:
            if sealed.start != reached:
                return None
            reached = sealed.end
        return packets if reached == until else None

    def dense(self, *, codec: Codec, context: Context) -> SealedPacket:
        """A dense packet of ``held``, for a device that the ring cannot bring there. Sealed once per version."""
        version = self.held.version
        if self._dense is None or self._dense.end != version:
            packet = seal_dense(self.held, codec=codec, context=context)
            self._dense = SealedPacket(self._put(packet), packet.nbytes, version, version)
        return self._dense


def seal_model(
    model: Arrays, version: int, *, memory: LinkMemory, residual: Residual, codec: Codec, context: Context
) -> tuple[Array, HeldModel]:
    """Seals the residual of ``model`` against the prediction of ``memory``. Returns the packet, and the receiver's model."""
    names = list(model)
    prediction = memory.predict_down(residual, names)
    stamp = Stamp(kind=PacketKind.RESIDUAL, version=version, state_hash=HeldModel.of(0, prediction).hash)
    packet, sent = seal(residuals_of(model, prediction, residual), codec=codec, context=context, stamp=stamp)
    return packet, HeldModel.of(version, restore(sent, prediction, residual))


def seal_dense(model: HeldModel, *, codec: Codec, context: Context) -> Array:
    """A packet of a dense model, which builds on no state. Its stamp holds the hash of the model."""
    stamp = Stamp(kind=PacketKind.WEIGHTS, version=model.version, state_hash=model.hash)
    packet, _ = seal(model.arrays, codec=codec, context=context, stamp=stamp)
    return packet


def seal_agreed(model: HeldModel) -> Array:
    """A packet without payload: the receiver makes the model from the seed, and checks its hash before using it."""
    stamp = Stamp(kind=PacketKind.AGREED, version=model.version, state_hash=model.hash)
    packet, _ = seal({}, codec=IdentityCodec(), context=Context(), stamp=stamp)
    return packet
