"""Downlinks with memory: the packets with which each device reaches a version.

There are two kinds. If the prediction depends on what came down alone ("stationary"), one residual serves all devices: a
``Broadcast`` for each setting in use. If it depends on what the device sent, each device has residuals of its own. A new device
starts from the initial model, which both ends build from the seed. A device that lost its memory, or missed more residuals than
the ring holds, is sent a dense model, counted as a resynchronisation. A broadcast whose first device is such a device starts
from the current model instead of the initial one.

Only the whole global model is made from the seed: a device whose part is narrow or of another family may be too weak for it.
The first message of such a part is the part itself, dense. When its channels change, a device is sent a patch (``comms.links``)
and follows a broadcast that has grown out of its own, if it can reach the model with which that one started. Else it is
resynchronised.

A broadcast holds a model and a ring of residuals. It ends when no device follows it. Of those that devices follow but no plan
of the last version used, only the most recently used few are kept: the others cost their devices a dense model.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping
from types import GenericAlias
from typing import Any, ClassVar

import msgspec
import numpy as np
import xxhash

from ...comms.channel import Channel
from ...comms.codec import Array, Arrays, ArraySpec, IdentityCodec, NumBytes
from ...comms.codecs.make_codec import make_codec
from ...comms.links.broadcast import Broadcast, Origin, SealedPacket, seal_agreed, seal_dense, seal_model
from ...comms.links.memory import WHOLE, HeldModel, LinkMemory
from ...comms.links.patch import patch_specs, seal_patch
from ...comms.links.predict import is_broadcast
from ...comms.links.receive import context_for
from ...comms.packet import sealed_bytes
from ...learning.parts.part import Part
from ...policies.plan import Plan
from ..messages.messages import Message
from ..messages.places import Places, family_of, kept_channels
from .peers import MovedLink, Peer

_DENSE = IdentityCodec()
_AGREED_BYTES = 64  # a packet without payload
_MAX_UNUSED = 8  # broadcasts that are kept though no plan of the last version used them

Specs = tuple[ArraySpec, ...]


class Downlinks:
    """Seals residuals of the model, for all devices or for one; what a device holds is in its ``Peer``."""

    SAVED: ClassVar[dict[str, Any]] = {  # by a checkpoint
        "_agreed": dict[str, Message],
        "_num_plans": NumBytes,
        "_use_counts": Counter[str],
        "_last_plans": dict[str, tuple[Plan, Specs]],
        "_most_used": str,
    }
    SAVED_AS: ClassVar = SAVED | {"broadcasts": GenericAlias(dict, (str, Broadcast.SAVED))}
    NOT_SAVED = ("_channel", "_places", "_first", "_broadcasts")

    def __init__(self, channel: Channel, places: Places, *, first: Mapping[str, Array]) -> None:
        """``first``: the model of version 0, which both ends build from the seed."""
        self._channel, self._places = channel, places
        self._first = dict(first)
        self._broadcasts: OrderedDict[str, Broadcast] = OrderedDict()  # most recently used last
        self._agreed: dict[str, Message] = {}
        # Numbers of plans of this version, and of those in each broadcast.
        self._num_plans = 0
        self._use_counts: Counter[str] = Counter()
        # Of broadcasts with feedback: the last plan of each with the tensors it was sent, and the key of the most used one.
        self._last_plans: dict[str, tuple[Plan, Specs]] = {}
        self._most_used = ""

    def advance(self, gather: Callable[[Part], Arrays], version: int) -> tuple[Part, Arrays] | None:
        """Seal the residual to ``version``, which has just begun, for every broadcast with feedback that is in use.

        ``gather``: the current tensors of a part. Returns the part of the most used broadcast and what its receivers will hold
        of it; the difference is sent later. None if no such broadcast exists: the model then stays as it is. (If a version had
        no plan, the version before it decides.)
        """
        used = [key for key in self._use_counts if key in self._last_plans]
        if self._num_plans:
            self._most_used = max(used, key=lambda key: self._use_counts[key], default="")
        for key in dict.fromkeys([*used, *([self._most_used] if self._most_used else [])]):
            plan, expected = self._last_plans[key]
            self._advance(key, plan, gather(plan.part), version, expected)
        self._num_plans = 0
        if not self._most_used:
            return None
        return self._last_plans[self._most_used][0].part, self._broadcasts[self._most_used].held.arrays

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint, with the state of each broadcast, in the order of use."""
        names = Broadcast.SAVED
        broadcasts = {key: {name: getattr(each, name) for name in names} for key, each in self._broadcasts.items()}
        return {"broadcasts": broadcasts} | {name: getattr(self, name) for name in self.SAVED}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self._broadcasts.clear()
        for key, values in saved["broadcasts"].items():
            self._broadcasts[key] = Broadcast(values["held"], put=self._channel.put, place=values["place"])
            for name in Broadcast.SAVED:
                setattr(self._broadcasts[key], name, values[name])
        for name in self.SAVED:
            setattr(self, name, saved[name])

    def count(self) -> None:
        """Count a plan of this version, with any kind of downlink."""
        self._num_plans += 1

    def keep(self, followed: Container[str]) -> None:
        """Close the version: end the broadcasts that no device follows, and all but a few of those that no plan used."""
        used = {self._most_used, *self._use_counts}
        unused = [key for key in self._broadcasts if key not in used]
        kept = [key for key in unused if key in followed][-_MAX_UNUSED:]
        for key in set(unused).difference(kept):
            del self._broadcasts[key]
            self._last_plans.pop(key, None)
            self._agreed.pop(key, None)
        self._use_counts.clear()

    def send(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], HeldModel]:
        """The packets with which the peer's device reaches the plan's version, and the model that it will then hold."""
        place, own = self._places.of(plan.part), has_own_residuals(plan)
        stream = stream_key(plan, place)
        if peer.stream != stream:
            if _can_move(peer, stream, place):
                move = self._move_own if own else self._move_broadcast
                if (moved := move(plan, peer, stream, place, model, expected)) is not None:
                    return moved
            peer.lost, peer.held = _left(peer, place, own=own)
            if peer.place != place:
                peer.memory = LinkMemory()
            peer.stream, peer.place, peer.part = stream, place, plan.part
        send = self._send_own if own else self._send_broadcast
        return send(plan, peer, model, expected)

    def estimate_bytes(self, plan: Plan, peer: Peer | None, *, newest: int, expected: Specs) -> int:
        """Estimated bytes of the packets with which the plan's device would reach its version.

        ``newest``: expected bytes of the residual to that version; ``expected``: the plan's tensors down.
        """
        place, own, dense = self._places.of(plan.part), has_own_residuals(plan), _dense_bytes(expected)
        key = stream_key(plan, place)
        peer = peer or Peer(stream=key, place=place)
        lost, held = peer.lost, peer.held
        if peer.stream != key:
            if _can_move(peer, key, place):
                estimate = self._estimate_own_move if own else self._estimate_move
                return estimate(plan, peer, key, place, newest, expected)
            lost, held = _left(peer, place, own=own)
        if lost or (held is None and (not _agrees(plan) or (plan.version and own))):
            return dense
        if own:
            missing = 0 if (held or 0) == plan.version else newest
        else:
            broadcast = self._broadcasts.get(key)
            # (A broadcast that has ended starts again with a dense model.)
            residuals = broadcast.since(held or 0) if broadcast is not None else None if held else []
            if residuals is None:
                return dense
            reached = broadcast.held.version if broadcast is not None else 0
            missing = sum(sealed.num_bytes for sealed in residuals) + (newest if reached < plan.version else 0)
        return min(dense, missing + (_AGREED_BYTES if held is None else 0))

    def _send_broadcast(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], HeldModel]:
        """Residuals of a broadcast."""
        agrees = _agrees(plan)
        if peer.stream not in self._broadcasts:
            from_seed = agrees and holds_initial_model(peer) and not peer.lost
            first = self._start(expected) if from_seed else _copied(model, plan.version)
            self._broadcasts[peer.stream] = Broadcast(first, put=self._channel.put, place=peer.place)
        broadcast = self._use(peer.stream, plan, model, expected)
        missed = not peer.lost and (agrees or peer.held is not None)
        residuals = broadcast.since(0 if peer.held is None else peer.held) if missed else None
        if residuals is None or _num_bytes(residuals) > _dense_bytes(expected):
            sealed = broadcast.dense(codec=_DENSE, context=context_for(expected, seed=plan.version))
            return [_dense(peer, plan, sealed.reference, sealed.num_bytes)], broadcast.held
        messages = [Message(sealed.reference, sealed.num_bytes, "weights") for sealed in residuals]
        if peer.held is None:
            messages.insert(0, self._agree(peer, expected))
        return messages, broadcast.held

    def _use(self, key: str, plan: Plan, model: Callable[[], Arrays], expected: Specs) -> Broadcast:
        """A broadcast for a plan of this version: at the plan's version, and counted."""
        assert plan.link_down is not None
        self._broadcasts.move_to_end(key)
        broadcast = self._broadcasts[key]
        if broadcast.held.version < plan.version:
            self._advance(key, plan, model(), plan.version, expected)
        self._use_counts[key] += 1
        if plan.link_down.feedback:
            self._last_plans[key] = plan, expected
        return broadcast

    def _move_broadcast(
        self, plan: Plan, peer: Peer, stream: str, place: bytes, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], HeldModel] | None:
        """The rest of the residuals that the device follows, the patch, and residuals of the broadcast at the new place.

        None if the device cannot follow that one, or if a dense model is smaller. The broadcast exists then, if there is one
        to grow out of.
        """
        if stream not in self._broadcasts and (key := self._origin(peer, stream)):
            move = self._places.move(self._broadcasts[key].place, place)
            assert move is not None
            self._broadcasts[stream] = self._broadcasts[key].grow(key, place, move, model())
        origin, before = self._path(peer, stream)
        if origin is None or before is None:
            return None
        broadcast = self._broadcasts[stream]
        if broadcast.held.version < plan.version:
            self._advance(stream, plan, model(), plan.version, expected)
        after = broadcast.since(origin.patch.end)
        if after is None or _num_bytes([*before, origin.patch, *after]) > _dense_bytes(expected):
            return None
        self._use(stream, plan, model, expected)
        move = self._places.move(peer.place, place)
        peer.moved = MovedLink(stream, place, plan.part, peer.memory.moved(move))
        messages = [Message(each.reference, each.num_bytes, "weights") for each in (*before, *after)]
        messages.insert(len(before), Message(origin.patch.reference, origin.patch.num_bytes, "patch"))
        return messages, broadcast.held

    def _path(self, peer: Peer, stream: str) -> tuple[Origin | None, list[SealedPacket] | None]:
        """The origin of a broadcast if it has grown out of the peer's, and the residuals that lead the device there."""
        origin = self._broadcasts[stream].origin if stream in self._broadcasts else None
        if origin is None or origin.key != peer.stream or peer.held is None:
            return None, None
        if peer.stream in self._broadcasts:
            return origin, self._broadcasts[peer.stream].since(peer.held, until=origin.patch.start)
        return origin, [] if peer.held == origin.patch.start else None

    def _origin(self, peer: Peer, stream: str) -> str:
        """The broadcast out of which a new one is to grow; "" for none.

        That of the peer, unless the device also changes its width: then one of the new width, whose devices will move too.
        """
        if peer.stream not in self._broadcasts:
            return ""
        if _settings(peer.stream) != (settings := _settings(stream)):
            version = self._broadcasts[peer.stream].held.version
            for key, each in reversed(self._broadcasts.items()):
                if _settings(key) == settings and each.held.version >= version:
                    return key
        return peer.stream

    def _estimate_move(self, plan: Plan, peer: Peer, stream: str, place: bytes, newest: int, expected: Specs) -> int:
        """Bytes of a move to another broadcast, or of the dense model."""
        dense = _dense_bytes(expected)
        if stream in self._broadcasts:
            target = self._broadcasts[stream]
            origin, before = self._path(peer, stream)
            after = target.since(origin.patch.end) if origin is not None else None
            if origin is None or before is None or after is None:
                return dense
            known, reached = _num_bytes([*before, origin.patch, *after]), target.held.version
        else:
            source = self._broadcasts.get(peer.stream)
            residuals = source.since(peer.held) if source is not None and peer.held is not None else None
            if source is None or residuals is None or self._origin(peer, stream) != peer.stream:
                return dense
            known, reached = _num_bytes(residuals) + self._patch_bytes(peer.place, place, expected), source.held.version
        return min(dense, known + (newest if reached < plan.version else 0))

    def _estimate_own_move(
        self, plan: Plan, peer: Peer, stream: str, place: bytes, newest: int, expected: Specs
    ) -> int:
        """Bytes of a patch for one device and of its residual."""
        return self._patch_bytes(peer.place, place, expected) + (newest if peer.held != plan.version else 0)

    def _patch_bytes(self, old: bytes, new: bytes, expected: Specs) -> int:
        """Bytes of a patch between two places."""
        types = {spec.name: np.empty(0, spec.dtype) for spec in expected}
        return sealed_bytes(_DENSE, patch_specs(self._places.new_items(old, new, expected), types))[0]

    def _move_own(
        self, plan: Plan, peer: Peer, stream: str, place: bytes, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], HeldModel] | None:
        """A patch and a residual for this device alone; None if the server does not have what the device holds."""
        move, names = self._places.move(peer.place, place), [spec.name for spec in expected]
        if move is None or not peer.memory.models or list(peer.memory.models[-1].arrays) != names:
            return None
        packet, memory = seal_patch(peer.memory, move, model())
        peer.moved = MovedLink(stream, place, plan.part, memory)
        messages, sent = [Message(self._channel.put(packet), packet.nbytes, "patch")], memory.models[-1]
        if sent.version < plan.version:
            message, sent = self._seal_own(plan, memory, model(), expected)
            messages.append(message)
        return messages, sent

    def _send_own(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], HeldModel]:
        """A residual for this device alone."""
        current = peer.memory.models[-1] if peer.memory.models else None
        if current is not None and list(current.arrays) != [spec.name for spec in expected]:
            current = None  # the initial model of another part
        if peer.lost or (current is None and (plan.version > 0 or not _agrees(plan))):
            dense = _copied(model, plan.version)
            packet = seal_dense(dense, codec=_DENSE, context=context_for(expected, seed=plan.version))
            return [_dense(peer, plan, self._channel.put(packet), packet.nbytes)], dense
        if current is None:
            return [self._agree(peer, expected)], self._start(expected)
        if current.version == plan.version:
            return [], current
        message, sent = self._seal_own(plan, peer.memory, model(), expected)
        return [message], sent

    def _seal_own(self, plan: Plan, memory: LinkMemory, model: Arrays, expected: Specs) -> tuple[Message, HeldModel]:
        """The residual of ``model`` against the prediction of one device's memory."""
        assert plan.link_down is not None
        packet, sent = seal_model(
            model,
            plan.version,
            memory=memory,
            residual=plan.link_down,
            codec=make_codec(plan.codec_down),
            context=context_for(expected, seed=plan.version),
        )
        return Message(self._channel.put(packet), packet.nbytes, "weights"), sent

    def _advance(self, key: str, plan: Plan, model: Arrays, version: int, expected: Specs) -> None:
        """Seal a broadcast's residual to ``version``, with the settings of ``plan``."""
        assert plan.link_down is not None
        self._broadcasts[key].advance(
            model,
            version,
            residual=plan.link_down,
            codec=make_codec(plan.codec_down),
            context=context_for(expected, seed=version),
        )

    def _start(self, expected: Specs) -> HeldModel:
        """The initial model."""
        return HeldModel.of(0, {spec.name: self._first[spec.name] for spec in expected})

    def _agree(self, peer: Peer, expected: Specs) -> Message:
        """The message that agrees on version 0; both ends' histories restart with it."""
        peer.memory.models, peer.memory.sent = [], []
        if peer.stream not in self._agreed:
            packet = seal_agreed(self._start(expected))
            self._agreed[peer.stream] = Message(self._channel.put(packet), packet.nbytes, "agreed")
        return self._agreed[peer.stream]


def stream_key(plan: Plan, place: bytes) -> str:
    """Plans with equal keys share a stream of residuals. ``place``: of the plan's part."""
    part = msgspec.structs.replace(
        plan.part, width=1.0, min_channels=1, channels="prefix", turn=0, scaled=False, index_map=""
    )
    channels = xxhash.xxh3_64_hexdigest(place) if place != WHOLE else "whole"
    return f"{kept_channels(place)} {channels} {part.key} {plan.link_down!r} {plan.codec_down!r}"


def _settings(stream: str) -> tuple[str, str]:
    """What a stream's key says besides which channels it is of: settings, and how many channels."""
    fields = stream.split(" ", 2)
    return fields[-1], fields[0]


def _can_move(peer: Peer, stream: str, place: bytes) -> bool:
    """Whether a device that follows a stream can move to another one: only its channels differ."""
    settled = peer.stream != "" and not peer.lost and peer.held is not None and peer.place != place
    same_family = family_of(peer.place) == family_of(place)
    return settled and same_family and _settings(peer.stream)[0] == _settings(stream)[0]


def _left(peer: Peer, place: bytes, *, own: bool) -> tuple[bool, int | None]:
    """``lost`` and ``held`` of a device that leaves its stream for another one without moving its memory.

    It may hold another part of the initial model, or none; of another family it holds nothing.
    """
    same_family = family_of(peer.place) == family_of(place)
    lost = peer.lost or (same_family and not holds_initial_model(peer))
    return lost, peer.held if own and peer.place == place else None


def holds_initial_model(peer: Peer) -> bool:
    """Whether a device holds the initial model or none yet, so that it can follow any stream."""
    return not peer.held


def has_own_residuals(plan: Plan) -> bool:
    """Whether the downlink's prediction depends on what the device sent, so that each device has residuals of its own."""
    return plan.link_down is not None and not is_broadcast(plan.link_down)


def _agrees(plan: Plan) -> bool:
    """Whether a device can make the initial tensors of a plan's part from the seed; proxies are sent to it."""
    return plan.part.width == 1 and not plan.part.model and not plan.part.auxiliaries


def _copied(model: Callable[[], Arrays], version: int) -> HeldModel:
    """A copy of the current model."""
    return HeldModel.of(version, {name: array.copy() for name, array in model().items()})


def _dense(peer: Peer, plan: Plan, reference: Any, num_bytes: int) -> Message:
    """The message of a dense model; both ends' histories restart with it once the device has acknowledged it.

    It is a resynchronisation unless it is the first message of a part that cannot be made from the seed.
    """
    peer.memory.models, peer.memory.sent = [], []
    if not (peer.lost or _agrees(plan) or peer.held is not None):
        return Message(reference, num_bytes, "weights", typical=False)
    peer.resync_plan = plan.id
    return Message(reference, num_bytes, "resync")


def _dense_bytes(expected: Specs) -> int:
    """Bytes of a packet of a dense model."""
    return sealed_bytes(_DENSE, expected)[0]


def _num_bytes(packets: Iterable[SealedPacket]) -> int:
    """Bytes of packets."""
    return sum(sealed.num_bytes for sealed in packets)
