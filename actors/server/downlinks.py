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
from ...comms.links.memory import HeldModel
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
        "_num_plans": NumBytes,
        "_use_counts": Counter[str],
        "_last_plans": dict[str, tuple[Plan, Specs]],
        "_most_used": str,
    }
    SAVED_AS: ClassVar = SAVED | {"broadcasts": GenericAlias(dict, (str, Broadcast.SAVED))}
    NOT_SAVED = ("_channel", "_first", "_broadcasts")

    def __init__(self, channel: Channel, *, first: Mapping[str, Array]) -> None:
        """``first``: the model of version 0, which both ends build from the seed."""
        self._channel = channel
        self._first = dict(first)
        self._broadcasts: OrderedDict[str, Broadcast] = OrderedDict()  # most recently used last
        self._agreed: dict[str, Message] = {}
        # Numbers of plans of this version, and of those in each broadcast.
        self._num_plans = 0
        self._use_counts: Counter[str] = Counter()
        # Of broadcasts with feedback: the last plan of each with the tensors it was sent, and the key of the most used one.
        self._last_plans: dict[str, tuple[Plan, Specs]] = {}
        self._most_used = ""

    def advance(self, model: Mapping[str, Array], version: int) -> Arrays | None:
        """Seal the residual to ``version``, which has just begun, for every broadcast with feedback that is in use.

        Returns the model that receivers of the most used one will hold; the difference to ``model`` is sent later. None if no
        such broadcast exists: ``model`` then stays as it is. (If a version had no plan, the version before it decides.)
        """
        used = [key for key in self._use_counts if key in self._last_plans]
        if self._num_plans:
            self._most_used = max(used, key=lambda key: self._use_counts[key], default="")
        for key in dict.fromkeys([*used, *([self._most_used] if self._most_used else [])]):
            plan, expected = self._last_plans[key]
            self._advance(key, plan, {spec.name: model[spec.name] for spec in expected}, version, expected)
        self._num_plans = 0
        return self._broadcasts[self._most_used].held.arrays if self._most_used else None

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint, with the state of each broadcast, in the order of use."""
        names = Broadcast.SAVED
        broadcasts = {key: {name: getattr(each, name) for name in names} for key, each in self._broadcasts.items()}
        return {"broadcasts": broadcasts} | {name: getattr(self, name) for name in self.SAVED}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self._broadcasts.clear()
        for key, values in saved["broadcasts"].items():
            self._broadcasts[key] = Broadcast(values["held"], put=self._channel.put)
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
            broadcast = self._broadcasts.get(key)
            # (A broadcast that has ended starts again with a dense model.)
            residuals = broadcast.since(held or 0) if broadcast is not None else None if held else []
            if residuals is None:
                return dense
            reached = broadcast.held.version if broadcast is not None else 0
            missing = sum(sealed.num_bytes for sealed in residuals) + (newest if reached < plan.version else 0)
        return min(dense, missing + (_AGREED_BYTES if needs_agreement else 0))

    def _send_broadcast(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], HeldModel]:
        """Residuals of a broadcast."""
        assert plan.link_down is not None
        if peer.stream not in self._broadcasts:
            from_seed = holds_initial_model(peer) and not peer.lost
            first = self._start(expected) if from_seed else _copied(model, plan.version)
            self._broadcasts[peer.stream] = Broadcast(first, put=self._channel.put)
        self._broadcasts.move_to_end(peer.stream)
        broadcast = self._broadcasts[peer.stream]
        if broadcast.held.version < plan.version:
            self._advance(peer.stream, plan, model(), plan.version, expected)
        self._use_counts[peer.stream] += 1
        if plan.link_down.feedback:
            self._last_plans[peer.stream] = plan, expected
        residuals = None if peer.lost else broadcast.since(0 if peer.held is None else peer.held)
        dense_bytes = sum(spec.num_bytes for spec in expected)
        if residuals is None or sum(sealed.num_bytes for sealed in residuals) > dense_bytes:
            sealed = broadcast.dense(codec=_DENSE, context=context_for(expected, seed=plan.version))
            return [_resync(peer, plan, sealed.reference, sealed.num_bytes)], broadcast.held
        messages = [Message(sealed.reference, sealed.num_bytes, "weights") for sealed in residuals]
        if peer.held is None:
            messages.insert(0, self._agree(peer, expected))
        return messages, broadcast.held

    def _send_own(
        self, plan: Plan, peer: Peer, model: Callable[[], Arrays], expected: Specs
    ) -> tuple[list[Message], HeldModel]:
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


def stream_key(plan: Plan) -> str:
    """Plans with equal keys share a stream of residuals."""
    return f"{plan.part.key} {plan.link_down!r} {plan.codec_down!r}"


def holds_initial_model(peer: Peer) -> bool:
    """Whether a device holds the initial model or none yet, so that it can follow any stream."""
    return not peer.held


def has_own_residuals(plan: Plan) -> bool:
    """Whether the downlink's prediction depends on what the device sent, so that each device has residuals of its own."""
    return plan.link_down is not None and HISTORY[plan.link_down.rule][1] > 0


def _copied(model: Callable[[], Arrays], version: int) -> HeldModel:
    """A copy of the current model."""
    return HeldModel.of(version, {name: array.copy() for name, array in model().items()})


def _resync(peer: Peer, plan: Plan, reference: Any, num_bytes: int) -> Message:
    """The message of a dense model; both ends' histories restart with it once the device has acknowledged it."""
    peer.resync_plan = plan.id
    peer.memory.models, peer.memory.sent = [], []
    return Message(reference, num_bytes, "resync")
