"""What each device is sent to reach a version, where downlinks have memory.

Two kinds. Where the prediction looks at nothing but what came down ("stationary"), one residual serves all: a ``Broadcast``
for each setting in use. Where it looks at what the device sent, each device has residuals of its own. A device that has
never been seen starts from the model that both ends make from the seed; one that lost its memory, or missed more than the
ring holds, gets a dense model, counted as a resynchronisation. A broadcast that begins with such a device begins with the
model as it is, and not with that of the seed.

A broadcast takes a model and a ring. It ends when no device follows it any more; of those that are followed and not in use,
only the few used last are kept, for a device that comes back to another is as well served by a dense model.
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
_MOST_IDLE = 8  # broadcasts that are kept though no plan of the last version used them

Specs = tuple[ArraySpec, ...]


class Downlinks:
    """Seals residuals of the model, for all or for one; what devices hold is in their ``Peer``."""

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
        """``first``: the model of version 0, which both ends make from the seed."""
        self._channel = channel
        self._first = dict(first)
        self._streams: OrderedDict[str, Broadcast] = OrderedDict()  # used last at the end
        self._agreed: dict[str, Message] = {}
        # Of this version: its plans, and those of each broadcast, with feedback or not.
        self._plans = 0
        self._used: Counter[str] = Counter()
        # Of broadcasts with feedback: the last plan with what it was sent, and the one most used.
        self._last: dict[str, tuple[Plan, Specs]] = {}
        self._main = ""

    def advance(self, model: Mapping[str, Array], version: int) -> Arrays | None:
        """Seal the way to ``version``, which has just begun, for every broadcast with feedback that is in use.

        Returns what the receivers of the one most used will hold: what is left of ``model`` is sent later. None where there
        is no such broadcast: the model is then what it is. (Where a version had no plan at all, the one before it decides.)
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
        """What a checkpoint must hold: of each broadcast what is its own, in the order of use."""
        names = Broadcast.SAVED
        streams = {key: {name: getattr(each, name) for name in names} for key, each in self._streams.items()}
        return {"streams": streams} | {name: getattr(self, name) for name in self.SAVED}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put in what was saved."""
        self._streams.clear()
        for key, values in saved["streams"].items():
            self._streams[key] = Broadcast(values["held"], put=self._channel.put)
            for name in Broadcast.SAVED:
                setattr(self._streams[key], name, values[name])
        for name in self.SAVED:
            setattr(self, name, saved[name])

    def count(self) -> None:
        """One more plan of this version, whatever its downlink is like."""
        self._plans += 1

    def keep(self, followed: Container[str]) -> None:
        """The version is over: end the broadcasts that no device follows, and of those that no plan used all but a few."""
        spared = {self._main, *self._used}
        idle = [key for key in self._streams if key not in spared]
        kept = [key for key in idle if key in followed][-_MOST_IDLE:]
        for key in set(idle).difference(kept):
            del self._streams[key]
            self._last.pop(key, None)
            self._agreed.pop(key, None)
        self._used.clear()

    def send(self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs) -> tuple[list[Message], Model]:
        """The packets that bring the peer's device to the plan's version, and the model that it will then hold."""
        return (self._send_own if has_own(plan) else self._send_broadcast)(plan, peer, model, expected)

    def estimate_bytes(self, plan: Plan, peer: Peer | None, *, newest: int, dense: int) -> int:
        """Bytes of the packets that would bring the plan's device to its version, as things stand.

        ``newest``: what the residual to that version is expected to take; ``dense``: a whole model.
        """
        key = stream_key(plan)
        held = peer.held if peer is not None else None
        elsewhere = peer is not None and (peer.lost or (peer.stream != key and not at_start(peer)))
        if elsewhere or (held is None and plan.version and has_own(plan)):
            return dense
        agrees = held is None or (peer is not None and peer.stream != key and not has_own(plan))
        if has_own(plan):
            missing = 0 if (held or 0) == plan.version else newest
        else:
            stream = self._streams.get(key)
            # (A broadcast that has ended begins anew with a dense model.)
            way = stream.since(held or 0) if stream is not None else None if held else []
            if way is None:
                return dense
            reached = stream.held.version if stream is not None else 0
            missing = sum(sealed.num_bytes for sealed in way) + (newest if reached < plan.version else 0)
        return min(dense, missing + (_AGREED_BYTES if agrees else 0))

    def _send_broadcast(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], Model]:
        """One residual for all."""
        assert plan.link_down is not None
        if peer.stream not in self._streams:
            seeded = at_start(peer) and not peer.lost
            first = self._start(expected) if seeded else _whole(model, plan.version)
            self._streams[peer.stream] = Broadcast(first, put=self._channel.put)
        self._streams.move_to_end(peer.stream)
        stream = self._streams[peer.stream]
        if stream.held.version < plan.version:
            self._advance(peer.stream, plan, model(), plan.version, expected)
        self._used[peer.stream] += 1
        if plan.link_down.feedback:
            self._last[peer.stream] = plan, expected
        way = None if peer.lost else stream.since(0 if peer.held is None else peer.held)
        dense_bytes = sum(spec.num_bytes for spec in expected)
        if way is None or sum(sealed.num_bytes for sealed in way) > dense_bytes:
            sealed = stream.dense(codec=_DENSE, context=context_for(expected, seed=plan.version))
            return [_restart(peer, plan, sealed.reference, sealed.num_bytes)], stream.held
        messages = [Message(sealed.reference, sealed.num_bytes, "weights") for sealed in way]
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
            current = None  # the seed's model of another part
        if peer.lost or (current is None and plan.version > 0):
            whole = _whole(model, plan.version)
            packet = seal_dense(whole, codec=_DENSE, context=context)
            return [_restart(peer, plan, self._channel.put(packet), packet.nbytes)], whole
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
        """Seal a broadcast's way to ``version``, with the settings of ``plan``."""
        assert plan.link_down is not None
        self._streams[key].advance(
            model,
            version,
            residual=plan.link_down,
            codec=make_codec(plan.codec_down),
            context=context_for(expected, seed=version),
        )

    def _start(self, expected: Specs) -> Model:
        """The model of version 0."""
        return Model.of(0, {spec.name: self._first[spec.name] for spec in expected})

    def _agree(self, peer: Peer, expected: Specs) -> Message:
        """The message that agrees on version 0; both ends' histories begin anew with it."""
        peer.memory.models, peer.memory.sent = [], []
        if peer.stream not in self._agreed:
            packet = seal_agreed(self._start(expected))
            self._agreed[peer.stream] = Message(self._channel.put(packet), packet.nbytes, "agreed")
        return self._agreed[peer.stream]


def stream_key(plan: Plan) -> str:
    """What makes two downlinks one stream."""
    return f"{plan.part.key} {plan.link_down!r} {plan.codec_down!r}"


def at_start(peer: Peer) -> bool:
    """Whether a device holds nothing but the model of the seed, from which any stream can go on."""
    return not peer.held


def has_own(plan: Plan) -> bool:
    """Whether the downlink's prediction looks at what the device sent, so that each device has residuals of its own."""
    return plan.link_down is not None and HISTORY[plan.link_down.rule][1] > 0


def _whole(model: Callable[[], Arrays], version: int) -> Model:
    """The model as it is, in memory of its own."""
    return Model.of(version, {name: array.copy() for name, array in model().items()})


def _restart(peer: Peer, plan: Plan, reference: Any, num_bytes: int) -> Message:
    """A dense model: both ends' histories begin anew with it, once its arrival is acknowledged."""
    peer.restarting = plan.id
    peer.memory.models, peer.memory.sent = [], []
    return Message(reference, num_bytes, "resync")
