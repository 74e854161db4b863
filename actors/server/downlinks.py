"""Downlinks with memory: the packets with which each device reaches a version.

There are two kinds. If the prediction depends on what came down alone ("stationary"), one residual serves all devices: a
``Broadcast`` for each setting in use. If it depends on what the device sent, each device has residuals of its own. A new device
starts from the initial model, which both ends build from the seed. A device that lost its memory, or missed more residuals than
the ring holds, is sent a dense model, counted as a resynchronisation. A broadcast whose first device is such a device starts
from the current model instead of the initial one.

A broadcast holds a model and a ring of residuals. It ends when no device follows it. Of those that devices follow but no plan
of the last version used, only the most recently used few are kept: the others cost their devices a dense model.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Mapping
from types import GenericAlias
from typing import Any, ClassVar

from ...comms.channel import Channel
from ...comms.codec import Array, Arrays, ArraySpec, IdentityCodec, NumBytes
from ...comms.codecs.make_codec import make_codec
from ...comms.links.broadcast import Broadcast, seal_agreed, seal_dense, seal_model
from ...comms.links.link import Model
from ...comms.links.predict import HISTORY
from ...comms.links.receive import context_for
from ...policies.plan import Plan
from ..messages.messages import Message
from .peers import Peer

_DENSE = IdentityCodec()
_AGREED_BYTES = 64  # a packet without payload
_MAX_UNUSED = 8  # broadcasts that are kept though no plan of the last version used them

Specs = tuple[ArraySpec, ...]


class Downlinks:
    """Seals residuals of the model, for all devices or for one; what a device holds is in its ``Peer``."""

    SAVED: ClassVar[dict[str, Any]] = {  # by a checkpoint
        "_agreed": dict[str, Message],
        "_plans": NumBytes,
        "_used": Counter[str],
        "_last": dict[str, tuple[Plan, Specs]],
        "_main": str,
    }
    SAVED_AS: ClassVar = SAVED | {"streams": GenericAlias(dict, (str, Broadcast.SAVED))}
    NOT_SAVED = ("_channel", "_first", "_streams")

    def __init__(self, channel: Channel, *, first: Mapping[str, Array]) -> None:
        """``first``: the model of version 0, which both ends build from the seed."""
        self._channel = channel
        self._first = dict(first)
        self._streams: OrderedDict[str, Broadcast] = OrderedDict()  # most recently used last
        self._agreed: dict[str, Message] = {}
        # Numbers of plans of this version: of all, and of each broadcast.
        self._plans = 0
        self._used: Counter[str] = Counter()
        # Of broadcasts with feedback: the last plan of each with the tensors it was sent, and the key of the most used one.
        self._last: dict[str, tuple[Plan, Specs]] = {}
        self._main = ""

    def advance(self, model: Mapping[str, Array], version: int) -> Arrays | None:
        """Seal the residual to ``version``, which has just begun, for every broadcast with feedback that is in use.

        Returns the model that receivers of the most used one will hold; the difference to ``model`` is sent later. None if no
        such broadcast exists: ``model`` then stays as it is. (If a version had no plan, the version before it decides.)
        """
        used = [key for key in self._used if key in self._last]
        if self._plans:
            self._main = max(used, key=lambda key: self._used[key], default="")
        for key in dict.fromkeys([*used, *([self._main] if self._main else [])]):
            plan, expected = self._last[key]
            self._advance(key, plan, {spec.name: model[spec.name] for spec in expected}, version, expected)
        self._plans = 0
        return self._streams[self._main].held.arrays if self._main else None

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint, with the state of each broadcast, in the order of use."""
        names = Broadcast.SAVED
        streams = {key: {name: getattr(stream, name) for name in names} for key, stream in self._streams.items()}
        return {"streams": streams} | {name: getattr(self, name) for name in self.SAVED}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self._streams.clear()
        for key, values in saved["streams"].items():
            self._streams[key] = Broadcast(values["held"], put=self._channel.put)
            for name in Broadcast.SAVED:
                setattr(self._streams[key], name, values[name])
        for name in self.SAVED:
            setattr(self, name, saved[name])

    def count(self) -> None:
        """Count a plan of this version, with any kind of downlink."""
        self._plans += 1

    def keep(self, followed: Container[str]) -> None:
        """Close the version: end the broadcasts that no device follows, and all but a few of those that no plan used."""
        used = {self._main, *self._used}
        unused = [key for key in self._streams if key not in used]
        kept = [key for key in unused if key in followed][-_MAX_UNUSED:]
        for key in set(unused).difference(kept):
            del self._streams[key]
            self._last.pop(key, None)
            self._agreed.pop(key, None)
        self._used.clear()

    def send(self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs) -> tuple[list[Message], Model]:
        """The packets with which the peer's device reaches the plan's version, and the model that it will then hold."""
        send = self._send_own if has_own_residuals(plan) else self._send_broadcast
        return send(plan, peer, model, expected)

    def estimate_bytes(self, plan: Plan, peer: Peer | None, *, newest: int, dense: int) -> int:
        """Estimated bytes of the packets with which the plan's device would reach its version.

        ``newest``: expected bytes of the residual to that version; ``dense``: bytes of a dense model.
        """
        key = stream_key(plan)
        held = peer.held if peer is not None else None
        unusable = peer is not None and (peer.lost or (peer.stream != key and not holds_initial_model(peer)))
        if unusable or (held is None and plan.version and has_own_residuals(plan)):
            return dense
        needs_agreement = held is None or (peer is not None and peer.stream != key and not has_own_residuals(plan))
        if has_own_residuals(plan):
            missing = 0 if (held or 0) == plan.version else newest
        else:
            stream = self._streams.get(key)
            # (A broadcast that has ended starts again with a dense model.)
            residuals = stream.since(held or 0) if stream is not None else None if held else []
            if residuals is None:
                return dense
            reached = stream.held.version if stream is not None else 0
            missing = sum(sealed.num_bytes for sealed in residuals) + (newest if reached < plan.version else 0)
        return min(dense, missing + (_AGREED_BYTES if needs_agreement else 0))

    def _send_broadcast(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], Model]:
        """Residuals of a broadcast."""
        assert plan.link_down is not None
        if peer.stream not in self._streams:
            from_seed = holds_initial_model(peer) and not peer.lost
            first = self._start(expected) if from_seed else _copied(model, plan.version)
            self._streams[peer.stream] = Broadcast(first, put=self._channel.put)
        self._streams.move_to_end(peer.stream)
        stream = self._streams[peer.stream]
        if stream.held.version < plan.version:
            self._advance(peer.stream, plan, model(), plan.version, expected)
        self._used[peer.stream] += 1
        if plan.link_down.feedback:
            self._last[peer.stream] = plan, expected
        residuals = None if peer.lost else stream.since(0 if peer.held is None else peer.held)
        dense_bytes = sum(spec.num_bytes for spec in expected)
        if residuals is None or sum(sealed.num_bytes for sealed in residuals) > dense_bytes:
            sealed = stream.dense(codec=_DENSE, context=context_for(expected, seed=plan.version))
            return [_resync(peer, plan, sealed.reference, sealed.num_bytes)], stream.held
        messages = [Message(sealed.reference, sealed.num_bytes, "weights") for sealed in residuals]
        if peer.held is None:
            messages.insert(0, self._agree(peer, expected))
        return messages, stream.held

    def _send_own(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], Model]:
        """A residual for this device alone."""
        assert plan.link_down is not None
        context = context_for(expected, seed=plan.version)
        current = peer.memory.models[-1] if peer.memory.models else None
        if current is not None and list(current.arrays) != [spec.name for spec in expected]:
            current = None  # the initial model of another part
        if peer.lost or (current is None and plan.version > 0):
            dense = _copied(model, plan.version)
            packet = seal_dense(dense, codec=_DENSE, context=context)
            return [_resync(peer, plan, self._channel.put(packet), packet.nbytes)], dense
        if current is None:
            return [self._agree(peer, expected)], self._start(expected)
        if current.version == plan.version:
            return [], current
        packet, sent = seal_model(
            model(),
            plan.version,
            memory=peer.memory,
            residual=plan.link_down,
            codec=make_codec(plan.codec_down),
            context=context,
        )
        return [Message(self._channel.put(packet), packet.nbytes, "weights")], sent

    def _advance(self, key: str, plan: Plan, model: Arrays, version: int, expected: Specs) -> None:
        """Seal a broadcast's residual to ``version``, with the settings of ``plan``."""
        assert plan.link_down is not None
        self._streams[key].advance(
            model,
            version,
            residual=plan.link_down,
            codec=make_codec(plan.codec_down),
            context=context_for(expected, seed=version),
        )

    def _start(self, expected: Specs) -> Model:
        """The initial model."""
        return Model.of(0, {spec.name: self._first[spec.name] for spec in expected})

    def _agree(self, peer: Peer, expected: Specs) -> Message:
        """The message that agrees on version 0; both ends' histories restart with it."""
        peer.memory.models, peer.memory.sent = [], []
        if peer.stream not in self._agreed:
            packet = seal_agreed(self._start(expected))
            self._agreed[peer.stream] = Message(self._channel.put(packet), packet.nbytes, "agreed")
        return self._agreed[peer.stream]


def stream_key(plan: Plan) -> str:
    """Plans with equal keys share a stream of residuals."""
    return f"{plan.part.key} {plan.link_down!r} {plan.codec_down!r}"


def holds_initial_model(peer: Peer) -> bool:
    """Whether a device holds the initial model or none yet, so that it can follow any stream."""
    return not peer.held


def has_own_residuals(plan: Plan) -> bool:
    """Whether the downlink's prediction depends on what the device sent, so that each device has residuals of its own."""
    return plan.link_down is not None and HISTORY[plan.link_down.rule][1] > 0


def _copied(model: Callable[[], Arrays], version: int) -> Model:
    """A copy of the current model."""
    return Model.of(version, {name: array.copy() for name, array in model().items()})


def _resync(peer: Peer, plan: Plan, reference: Any, num_bytes: int) -> Message:
    """The message of a dense model; both ends' histories restart with it once the device has acknowledged it."""
    peer.resync_plan = plan.id
    peer.memory.models, peer.memory.sent = [], []
    return Message(reference, num_bytes, "resync")
