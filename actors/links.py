"""The server's ends of all links with memory: what each device is sent to reach a version, and what its answers mean.

Two kinds of downlink. Where the prediction looks at nothing but what came down ("stationary"), one residual serves all: a
``Broadcast`` for each setting in use. Where it looks at what the device sent, each device has residuals of its own. A
device that has never been seen starts from the model that both ends make from the seed; one that lost its memory, or missed
more than the ring holds, gets a dense model, counted as a resynchronisation.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ..comms.broadcast import Broadcast, seal_agreed, seal_dense, seal_model
from ..comms.channel import Channel
from ..comms.codecs import Array, Arrays, ArraySpec, Codec, Identity
from ..comms.errors import MismatchedPacket, OutOfSync
from ..comms.link import Model, Sent, State, copy_state, depths
from ..comms.make_codec import make_codec
from ..comms.predict import HISTORY, hash_arrays
from ..comms.receive import context_for, receive_update
from ..policies.plan import Plan
from ..policies.report import Report
from .messages import Message, update_context, update_stamp
from .peers import Peer, Peers

_DENSE: Codec = Identity()
_AGREED_BYTES = 64  # a packet without payload


class ServerLinks:
    """Downlinks of residuals and uplinks of residuals; knows no clock and no loop."""

    def __init__(self, channel: Channel, *, first: Mapping[str, Array], memory_bytes: int, disk_bytes: int) -> None:
        """``first``: the model of version 0, which both ends make from the seed."""
        self._channel = channel
        self._first = dict(first)
        self._streams: dict[str, Broadcast] = {}
        # Of broadcasts with feedback: plans of this version, the last plan with what it was sent, the one most used.
        self._used: Counter[str] = Counter()
        self._last: dict[str, tuple[Plan, tuple[ArraySpec, ...]]] = {}
        self._main = ""
        self._agreed: dict[str, Message] = {}
        self._sent: dict[int, Model] = {}  # by plan in flight: what it was sent
        self.peers = Peers(memory_bytes=memory_bytes, disk_bytes=disk_bytes)

    def advance(self, model: Mapping[str, Array], version: int) -> Arrays | None:
        """Seal the way to ``version``, which has just begun, for every broadcast with feedback that is in use.

        Returns what the receivers of the one most used will hold: what is left of ``model`` is sent later. None where there
        is no such broadcast: the model is then what it is.
        """
        if self._used:
            self._main = max(self._used, key=lambda key: self._used[key])
        for key in dict.fromkeys([*self._used, *([self._main] if self._main else [])]):
            plan, expected = self._last[key]
            self._advance(key, plan, {spec.name: model[spec.name] for spec in expected}, version, expected)
        self._used.clear()
        return self._streams[self._main].held.arrays if self._main else None

    def send(self, plan: Plan, model: Callable[[], Arrays], expected: tuple[ArraySpec, ...]) -> list[Message]:
        """The packets that bring the plan's device to the current ``model`` (its version is the plan's)."""
        assert plan.link_down is not None
        stream = stream_key(plan)
        peer = self.peers.get(plan.device) or Peer(stream=stream)
        peer.lost = peer.lost or (peer.stream != stream and peer.held is not None)
        peer.stream = stream
        peer.memory.trim(plan.link_down, plan.link_up)
        send = self._send_own if _own(plan) else self._send_broadcast
        messages, sent = send(plan, peer, model, expected)
        peer.on_its_way = self._sent[plan.id] = sent
        self.peers.put(plan.device, peer)
        return messages

    def track(self, plan: Plan, base: Arrays) -> None:
        """A plan whose downlink has no memory, but whose uplink has: it was sent ``base``."""
        peer = self.peers.get(plan.device) or Peer()
        peer.memory.trim(plan.link_down, plan.link_up)
        peer.on_its_way = self._sent[plan.id] = Model(plan.version, 0, base)
        self.peers.put(plan.device, peer)

    def sent(self, plan: Plan) -> Model:
        """What a plan in flight was sent."""
        if plan.id not in self._sent:
            raise MismatchedPacket(f"what plan {plan.id} of version {plan.version} was sent is gone")
        return self._sent[plan.id]

    def open_update(self, plan: Plan, packet: Array, expected: tuple[ArraySpec, ...]) -> tuple[Arrays, Arrays, bool]:
        """An update's residuals, the device's model by them, and whether the residuals are the update itself.

        Raises a ``PacketError``; after ``OutOfSync`` the device will be resynchronised.
        """
        assert plan.link_up is not None
        peer, base = self._peer(plan), self.sent(plan).arrays
        names = [spec.name for spec in expected]
        prediction = peer.memory.predict_up(plan.link_up, base, names)
        anchored = all(prediction[name] is base[name] for name in names) and plan.link_up.arithmetic == "float"
        try:
            residuals, local = receive_update(
                packet,
                prediction=prediction,
                residual=plan.link_up,
                codec=make_codec(plan.codec_up),
                expected=expected,
                context=update_context(expected, plan),
                stamp=update_stamp(plan, state_hash=hash_arrays(prediction)),
            )
        except OutOfSync:
            peer.lost, peer.restarting = True, 0
            raise
        return residuals, local, anchored

    def folded(self, plan: Plan, local: Arrays) -> None:
        """The update of ``plan`` was folded: its device's model is acknowledged."""
        peer = self._peer(plan)
        peer.folded = plan.id
        if depths(plan.link_down, plan.link_up)[1]:
            base = self.sent(plan).arrays
            peer.memory.sent.append(Sent(base={name: base[name] for name in local}, local=local))

    def ended(self, plan: Plan, report: Report, state: State | None) -> None:
        """A plan has ended, well or not: what its device holds now."""
        peer = self._peer(plan)
        sent, peer.on_its_way = self._sent.pop(plan.id, None), None
        if state is not None:
            peer.state = copy_state(state)
        if report.out_of_sync or (report.held is not None and report.held != plan.version):
            peer.lost = True
        elif report.held is not None and plan.link_down is not None:
            peer.held = report.held
            peer.lost = peer.lost and peer.restarting != plan.id
            assert sent is not None
            if _own(plan) and (not peer.memory.models or peer.memory.models[-1] is not sent):
                peer.memory.models.append(sent)
        self.peers.put(plan.device, peer)

    def abandon(self, plan: Plan) -> None:
        """A plan that nobody waits for: what was sent is not acknowledged."""
        if self._sent.pop(plan.id, None) is not None:
            self._peer(plan).on_its_way = None

    def state(self, device: int) -> State | None:
        """What a simulated device remembers."""
        peer = self.peers.get(device)
        return peer.state if peer is not None else None

    def acknowledged(self, device: int) -> int:
        """The newest plan of a device whose update was folded; 0 for none."""
        peer = self.peers.get(device)
        return peer.folded if peer is not None else 0

    def estimate_bytes(self, plan: Plan, *, newest: int, dense: int) -> int:
        """Bytes of the packets that would bring the plan's device to its version, as things stand.

        ``newest``: what the residual to that version is expected to take; ``dense``: a whole model.
        """
        assert plan.link_down is not None
        peer, key = self.peers.peek(plan.device), stream_key(plan)
        held = peer.held if peer is not None and peer.stream == key else None
        agreed = held is None
        if (peer is not None and (peer.lost or peer.stream != key)) or (agreed and plan.version > 0 and _own(plan)):
            return dense
        stream = self._streams.get(key)
        reached = stream.held.version if stream is not None else 0
        way = [] if stream is None else stream.since(held or 0)
        if _own(plan):
            missing = 0 if (held or 0) == plan.version else newest
        elif way is None:
            return dense
        else:
            missing = sum(sealed.num_bytes for sealed in way) + (newest if reached < plan.version else 0)
        return min(dense, missing + (_AGREED_BYTES if agreed else 0))

    def _peer(self, plan: Plan) -> Peer:
        """The entry of a plan's device, which has one since its dispatch."""
        peer = self.peers.get(plan.device)
        assert peer is not None, f"device {plan.device} has no link"
        return peer

    def _send_broadcast(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: tuple[ArraySpec, ...]
    ) -> tuple[list[Message], Model]:
        """One residual for all."""
        assert plan.link_down is not None
        stream = self._stream(peer.stream, expected)
        if stream.held.version < plan.version:
            self._advance(peer.stream, plan, model(), plan.version, expected)
        if plan.link_down.feedback:
            self._used[peer.stream] += 1
            self._last[peer.stream] = plan, expected
        start = 0 if peer.held is None else peer.held
        way = None if peer.lost else stream.since(start)
        dense_bytes = sum(spec.num_bytes for spec in expected)
        if way is None or sum(sealed.num_bytes for sealed in way) > dense_bytes:
            sealed = stream.dense(codec=_DENSE, context=context_for(expected, seed=plan.version))
            return [_restart(peer, plan, sealed.reference, sealed.num_bytes)], stream.held
        messages = [Message(sealed.reference, sealed.num_bytes, "weights") for sealed in way]
        if peer.held is None:
            messages.insert(0, self._agree(peer.stream, expected))
        return messages, stream.held

    def _send_own(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: tuple[ArraySpec, ...]
    ) -> tuple[list[Message], Model]:
        """A residual for this device alone."""
        assert plan.link_down is not None
        context = context_for(expected, seed=plan.version)
        current = peer.memory.models[-1] if peer.memory.models else None
        if peer.lost or (current is None and plan.version > 0):
            whole = Model.of(plan.version, {name: array.copy() for name, array in model().items()})
            packet = seal_dense(whole, codec=_DENSE, context=context)
            return [_restart(peer, plan, self._channel.put(packet), packet.nbytes)], whole
        if current is None:
            first = Model.of(0, {spec.name: self._first[spec.name] for spec in expected})
            return [self._agree(peer.stream, expected)], first
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

    def _advance(self, key: str, plan: Plan, model: Arrays, version: int, expected: tuple[ArraySpec, ...]) -> None:
        """Seal a broadcast's way to ``version``, with the settings of ``plan``."""
        assert plan.link_down is not None
        self._stream(key, expected).advance(
            model,
            version,
            residual=plan.link_down,
            codec=make_codec(plan.codec_down),
            context=context_for(expected, seed=version),
        )

    def _stream(self, key: str, expected: tuple[ArraySpec, ...]) -> Broadcast:
        """The broadcast of these settings, which begins at version 0."""
        if key not in self._streams:
            first = Model.of(0, {spec.name: self._first[spec.name] for spec in expected})
            self._streams[key] = Broadcast(first, put=self._channel.put)
        return self._streams[key]

    def _agree(self, key: str, expected: tuple[ArraySpec, ...]) -> Message:
        """The message that agrees on version 0."""
        if key not in self._agreed:
            packet = seal_agreed(Model.of(0, {spec.name: self._first[spec.name] for spec in expected}))
            self._agreed[key] = Message(self._channel.put(packet), packet.nbytes, "control")
        return self._agreed[key]


def stream_key(plan: Plan) -> str:
    """What makes two downlinks one stream."""
    return f"{plan.part.key} {plan.link_down!r} {plan.codec_down!r}"


def _own(plan: Plan) -> bool:
    """Whether the downlink's prediction looks at what the device sent, so that each device has residuals of its own."""
    return plan.link_down is not None and HISTORY[plan.link_down.rule][1] > 0


def _restart(peer: Peer, plan: Plan, reference: Any, num_bytes: int) -> Message:
    """A dense model: both ends' histories begin anew with it, once its arrival is acknowledged."""
    peer.restarting = plan.id
    peer.memory.models, peer.memory.sent = [], []
    return Message(reference, num_bytes, "resync")
