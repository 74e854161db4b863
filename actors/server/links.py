"""The server's ends of all links with memory.

``downlinks`` seals the packets down; this file opens residual updates and advances each device's record (``peers``) by its
reports. ``comms.links.memory`` says when each end advances.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

from msgspec.structs import replace

from ...clusters.scratch import Scratch
from ...comms.channel import Channel
from ...comms.codec import Array, Arrays, ArraySpec
from ...comms.codecs.make_codec import make_codec
from ...comms.errors import MismatchedPacket, OutOfSync, PacketError
from ...comms.links.memory import FORGET, WHOLE, HeldModel, LinkMemory, SentUpdate, history_lengths
from ...comms.links.predict import Residual
from ...comms.links.receive import receive_update
from ...comms.links.state import LinkState, copy_state, models_only, named_models, settled
from ...learning.parts.part import Part
from ...policies.plan import Plan
from ...policies.report import Report
from ..messages.messages import Dispatch, Message, update_context, update_stamp
from ..messages.places import Places
from .downlinks import Downlinks, has_own_residuals
from .peers import MovedLink, Peer, Peers


class ServerLinks:
    """Downlinks and uplinks of residuals."""

    SAVED: ClassVar = {"downlinks": Downlinks, "peers": Peers, "_sent": dict[int, HeldModel]}  # by a checkpoint
    NOT_SAVED = ("_places",)

    def __init__(
        self,
        channel: Channel,
        places: Places,
        *,
        first: Mapping[str, Array],
        memory_bytes: int,
        disk_bytes: int,
        scratch: Scratch | None = None,
    ) -> None:
        """``first``: the model of version 0, which both ends build from the seed. ``scratch``: where temporary files go."""
        self._places = places
        self.downlinks = Downlinks(channel, places, first=first)
        self.peers = Peers(memory_bytes=memory_bytes, disk_bytes=disk_bytes, scratch=scratch, channel=channel)
        self._sent: dict[int, HeldModel] = {}  # by plan in flight: the model that it was sent

    def send(self, plan: Plan, model: Callable[[], Arrays], expected: tuple[ArraySpec, ...]) -> list[Message]:
        """The packets with which the plan's device reaches ``model``, which is of the plan's version."""
        peer = self.peers.get(plan.device) or Peer()
        messages, sent = self.downlinks.send(plan, peer, model, expected)
        peer.in_flight = self._sent[plan.id] = sent
        self.peers.put(plan.device, peer)
        return messages

    def track(self, plan: Plan, message: Message, base: Arrays) -> tuple[Plan, Message]:
        """Record a plan whose downlink has no memory but whose uplink has; ``message`` holds the weights ``base``.

        Returns plan and message as they must be sent. If the link is lost, the plan has its device drop its memory, and the
        message, a dense model in any case, counts as a resynchronisation.
        """
        place = self._places.of(plan.part)
        peer = self.peers.get(plan.device) or Peer(place=place)
        if peer.lost:
            peer.memory, peer.held, peer.resync_plan, peer.place = LinkMemory(), None, plan.id, place
            plan, message = replace(plan, acknowledged=FORGET), Message(message.reference, message.num_bytes, "resync")
        elif peer.place != place:
            memory = LinkMemory(sent=peer.memory.sent).moved(self._places.move(peer.place, place))
            peer.moved = MovedLink("", place, plan.part, memory)
        peer.in_flight = self._sent[plan.id] = HeldModel.of(plan.version, base)
        self.peers.put(plan.device, peer)
        return plan, message

    def advance(self, gather: Callable[[Part], Arrays], version: int) -> tuple[Part, Arrays] | None:
        """Start a version; see ``Downlinks.advance`` and ``Downlinks.keep``."""
        received = self.downlinks.advance(gather, version)
        self.downlinks.keep(self.peers.streams())
        return received

    def sent(self, plan: Plan) -> HeldModel:
        """The model that a plan in flight was sent."""
        if plan.id not in self._sent:
            raise MismatchedPacket(f"the model that plan {plan.id} of version {plan.version} was sent is gone")
        return self._sent[plan.id]

    def open_update(self, plan: Plan, packet: Array, expected: tuple[ArraySpec, ...]) -> tuple[Arrays, Arrays, bool]:
        """An update's residuals, the device's model, and whether the residuals are differences to what the device was sent.

        Raises a ``PacketError``; after ``OutOfSync`` the device is resynchronised with its next plan.
        """
        assert plan.link_up is not None
        peer, sent = self._peer(plan), self.sent(plan)
        base = sent.arrays
        names = [spec.name for spec in expected]
        memory = peer.memory if peer.moved is None else peer.moved.memory
        prediction = memory.predict_up(plan.link_up, base, names)
        anchored = all(prediction[name] is base[name] for name in names) and plan.link_up.arithmetic == "float"
        try:
            residuals, local = receive_update(
                packet,
                prediction=prediction,
                residual=plan.link_up,
                codec=make_codec(plan.codec_up),
                expected=expected,
                context=update_context(expected, plan),
                stamp=update_stamp(plan, state_hash=sent.hash_of(prediction)),
            )
        except OutOfSync:
            peer.lost, peer.resync_plan = True, 0
            raise
        return residuals, local, anchored

    def folded(self, plan: Plan, local: Arrays) -> None:
        """The update of ``plan`` was folded: acknowledge ``local``, the model that its device had trained."""
        peer = self._peer(plan)
        peer.move()
        peer.folded = plan.id
        peer.memory.trim(plan.link_down, plan.link_up)
        if history_lengths(plan.link_down, plan.link_up)[1]:
            base = self.sent(plan).arrays
            peer.memory.sent.append(SentUpdate(base={name: base[name] for name in local}, local=local))

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """Update a device's record by its report, whatever the outcome."""
        peer = self._peer(plan)
        sent, peer.in_flight = self._sent.pop(plan.id, None), None
        knows_models = state is None or self._keep_state(peer, copy_state(state), sent)
        if report.out_of_sync or not knows_models or (report.held is not None and report.held != plan.version):
            peer.lost = True
        elif report.held is not None:
            peer.move()
            peer.lost = peer.lost and peer.resync_plan != plan.id
            if plan.link_down is not None:
                peer.held = report.held
            # Only now, as at the other end: a device that never opened the plan has trimmed nothing.
            if peer.folded != plan.id:
                peer.memory.trim(plan.link_down, plan.link_up)
            assert sent is not None
            if has_own_residuals(plan) and (not peer.memory.models or peer.memory.models[-1] is not sent):
                depth, _ = history_lengths(plan.link_down, plan.link_up)
                peer.memory.models = [*peer.memory.models, sent][-depth:]
        peer.moved = None
        self.peers.put(plan.device, peer)

    def _keep_state(self, peer: Peer, state: LinkState, sent: HeldModel | None) -> bool:
        """Keep what a device must remember of the state that it returned; whether all models that the state names are known.

        One that is unknown differs from the model that the device was sent.
        """
        try:
            known = settled(state, before=peer.state, folded=peer.folded)
            names = named_models(known)
        except OutOfSync:
            peer.state = None
            return False
        own = sent if sent is not None and sent.name in names else None
        if not all(name in self.peers.shared or (own is not None and name == own.name) for name in names):
            peer.state = None
            return False
        if own is not None:
            self.peers.shared.add(own)
        peer.state = known
        return True

    def released(self, plan: Plan) -> None:
        """A plan without a result: the model that it was sent is not acknowledged."""
        if self._sent.pop(plan.id, None) is not None:
            peer = self._peer(plan)
            peer.in_flight = peer.moved = None
            self.peers.put(plan.device, peer)

    @property
    def downlinks_have_memory(self) -> bool:
        """Whether any downlink of this run has had a memory."""
        return any(self.peers.streams())

    def evaluation_of_held_model(self, plan: Plan) -> Dispatch | None:
        """The dispatch by which a device evaluates the model, or the part of it, in its downlink's memory.

        A real device has its state itself. None if the device holds no known model, or one with frozen blocks or proxies, of
        which the link's memory has a part only. It does not count as a use of the record.
        """
        peer = self.peers.read(plan.device)
        if peer is None or peer.held is None or peer.lost or not peer.stream:
            return None
        if peer.part is not None and (peer.part.cached or peer.part.auxiliaries):
            return None
        part = plan.part if peer.place == WHOLE or peer.part is None else peer.part
        plan = replace(plan, part=part, version=peer.held, link_down=Residual(rule="stationary"))
        try:
            state = None if peer.state is None else models_only(peer.state)
            return Dispatch(plan, (), state, remembered=self.peers.models(plan.device))
        except (OSError, PacketError):  # a notice follows when the record is used
            return None

    def lose(self, device: int) -> None:
        """A device has lost its memory: if it has a record, it is resynchronised with its next plan."""
        if (peer := self.peers.get(device)) is not None:
            peer.lost, peer.resync_plan = True, 0
            self.peers.put(device, peer)

    def state(self, device: int) -> LinkState | None:
        """The state of a simulated device."""
        peer = self.peers.get(device)
        return peer.state if peer is not None else None

    def models(self, device: int) -> tuple[Message, ...]:
        """The packets of the models that the state of a device in flight names."""
        return self.peers.models(device)

    def acknowledged(self, device: int) -> int:
        """The newest plan of a device whose update was folded; 0 for none."""
        peer = self.peers.get(device)
        return peer.folded if peer is not None else 0

    def estimate_bytes(self, plan: Plan, *, newest: int, expected: tuple[ArraySpec, ...]) -> int:
        """Estimated bytes down for a plan; see ``Downlinks.estimate_bytes``."""
        return self.downlinks.estimate_bytes(plan, self.peers.peek(plan.device), newest=newest, expected=expected)

    def _peer(self, plan: Plan) -> Peer:
        """The record of a plan's device, which exists since the plan was dispatched."""
        peer = self.peers.get(plan.device)
        assert peer is not None, f"device {plan.device} has no link"
        return peer
