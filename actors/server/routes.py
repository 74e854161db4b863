"""How a plan travels between the server, its device and its host: whole and dense, over links with memory, or split.

    send ── the device carries the plan out ── open ── fold

A plan takes the first of the server's routes that carries it. Only ``open`` may fail for what came over a link: it checks all
of an update and changes nothing. A route that remembers something of plans in flight forgets it when they end.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import msgspec
from torch import Tensor

from ...comms.codec import Array, Arrays, ArraySpec
from ...comms.errors import MismatchedPacket
from ...comms.links.link import State
from ...comms.links.predict import hash_arrays
from ...learning.aggregation import Fold
from ...learning.parts.part import down_tensors, up_tensors
from ...learning.parts.structure import ModelSpec
from ...learning.store import Store
from ...learning.tensors import as_arrays, as_tensors, minus, widened
from ...policies.plan import Plan
from ...policies.report import Report
from ..messages.messages import Dispatch, Message, array_specs
from ..messages.trunk import BlockHashes
from ..messages.update import open_update
from .dense_downlink import DenseDownlink
from .links import ServerLinks
from .shared_heads import SharedHeads
from .split_plans import hosted


@dataclass(frozen=True)
class Opened:
    """A sound update: differences to what the plan was sent; behind an uplink with memory also its device's model."""

    differences: dict[str, Tensor]
    local: Arrays | None = None


class Route(Protocol):
    """One way of travelling."""

    def carries(self, plan: Plan) -> bool:
        """Whether plans such as this one take it."""
        ...

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Raise ``PlanRefused`` where the plan cannot be sent while these are in flight."""
        ...

    def send(self, plan: Plan) -> Dispatch:
        """The packets that bring the plan's device, and its host, to the current version."""
        ...

    def open(self, plan: Plan, packet: Array | None, host: Array | None) -> Opened:
        """What an update brings; raises a ``PacketError`` where it is not sound. ``packet``: None where nothing is trained."""
        ...

    def fold(self, plan: Plan, update: Opened, into: Fold, *, weight: float, scale: float) -> None:
        """Add an update that was opened."""
        ...

    def ended(self, plan: Plan, report: Report, state: State | None) -> None:
        """The plan is over."""
        ...

    def released(self, plan: Plan) -> None:
        """The plan is over without a result."""
        ...


class DenseRoute:
    """The whole model, by memoryless chains of codecs: every plan that no other route carries."""

    def __init__(self, downlink: DenseDownlink, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """``tensors``: what plans are sent, always of the current version."""
        self.downlink, self._tensors, self._spec = downlink, tensors, spec

    def carries(self, plan: Plan) -> bool:
        """Any."""
        return True

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Any can be sent."""

    def send(self, plan: Plan) -> Dispatch:
        """One packet, or none where the part has nothing to send."""
        return Dispatch(plan, self.messages(plan), None)

    def messages(self, plan: Plan) -> tuple[Message, ...]:
        """The packet of a leg of the plan."""
        return (self.downlink.send(plan, self._tensors),) if down_tensors(self._spec, plan.part) else ()

    def open(self, plan: Plan, packet: Array | None, host: Array | None) -> Opened:
        """The differences in the device's update."""
        return Opened(self.differences(plan, packet, self.downlink.sent) if packet is not None else {})

    def differences(
        self, plan: Plan, packet: Array, start: Callable[[Plan], dict[str, Tensor]], *, leg: int = 0
    ) -> dict[str, Tensor]:
        """The differences in the update of a leg. ``start``: gives the tensors that the leg was sent."""
        update = as_tensors(open_update(packet, plan, self._spec, leg=leg))
        if plan.upload.payload == "weights":
            sent = start(plan)
            update = {name: tensor - sent[name] for name, tensor in update.items()}
        return update

    def fold(self, plan: Plan, update: Opened, into: Fold, *, weight: float, scale: float) -> None:
        """All of it."""
        into.add(update.differences, weight=weight, scale=scale)

    def ended(self, plan: Plan, report: Report, state: State | None) -> None:
        """Nothing is remembered of single plans."""

    def released(self, plan: Plan) -> None:
        """Nothing is remembered of single plans."""


class OwnHeads:
    """Each device has the host's blocks to itself: they travel like the device's own."""

    def __init__(self, dense: DenseRoute) -> None:
        """``dense``: by which they travel."""
        self._dense = dense

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Any can be sent."""

    def send(self, of_host: Plan) -> tuple[Message, ...]:
        """The packet of the host's blocks. ``of_host``: the plan as its host has it."""
        return self._dense.messages(of_host)

    def sent(self, of_host: Plan) -> dict[str, Tensor]:
        """The tensors that the host's leg was sent."""
        return self._dense.downlink.sent(of_host)

    def check_open(self, plan: Plan) -> None:
        """Any update may be opened."""

    def add(self, plan: Plan, update: dict[str, Tensor], *, weight: float) -> dict[str, Tensor]:
        """What of an update is to be folded: all."""
        return update

    def ended(self, plan: Plan) -> None:
        """Nothing is remembered."""


class SplitRoute:
    """A model cut between device and host: two legs, whose updates are folded as one."""

    def __init__(self, dense: DenseRoute, shared: SharedHeads, spec: ModelSpec, hashes: BlockHashes) -> None:
        """``shared``: the heads of hosts whose devices train one copy."""
        self._dense, self._spec, self._hashes = dense, spec, hashes
        self._heads: dict[str, OwnHeads | SharedHeads] = {"slots": OwnHeads(dense), "shared": shared}

    def carries(self, plan: Plan) -> bool:
        """Plans that name a cut."""
        return plan.split is not None

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """See ``SharedHeads.check``."""
        self._head(plan).check(plan, in_flight)

    def send(self, plan: Plan) -> Dispatch:
        """The packets of both legs."""
        of_host = hosted(plan, self._spec, self._hashes)
        return Dispatch(plan, self._dense.messages(plan), None, self._head(plan).send(of_host))

    def open(self, plan: Plan, packet: Array | None, host: Array | None) -> Opened:
        """The differences of both legs."""
        head = self._head(plan)
        head.check_open(plan)
        update = self._dense.open(plan, packet, None).differences
        if host is None:
            raise MismatchedPacket(f"plan {plan.id} is split, and came without its host's update")
        of_host = hosted(plan, self._spec, self._hashes)
        return Opened(update | self._dense.differences(of_host, host, head.sent, leg=1))

    def fold(self, plan: Plan, update: Opened, into: Fold, *, weight: float, scale: float) -> None:
        """What of it is the device's own; a shared head keeps the rest until the version closes."""
        own = self._head(plan).add(plan, update.differences, weight=weight)
        into.add(own, weight=weight, scale=scale)

    def ended(self, plan: Plan, report: Report, state: State | None) -> None:
        """The host's blocks are free for the next device."""
        self._head(plan).ended(plan)

    def released(self, plan: Plan) -> None:
        """The host's blocks are free for the next device."""
        self._head(plan).ended(plan)

    def _head(self, plan: Plan) -> OwnHeads | SharedHeads:
        assert plan.split is not None
        return self._heads[plan.split.head]


class ResidualRoute:
    """Links with memory, in one direction or both (ResFed)."""

    SAVED: ClassVar = {"_starts": dict[tuple[int, str], tuple[int, dict[str, Array]]]}  # by a checkpoint
    NOT_SAVED = ("_dense", "_links", "_store", "_spec")

    def __init__(self, dense: DenseRoute, links: ServerLinks, store: Store, spec: ModelSpec) -> None:
        """``dense``: for a direction without memory."""
        self._dense, self._links, self._store, self._spec = dense, links, store, spec
        self._starts: dict[tuple[int, str], tuple[int, Arrays]] = {}  # by version and part: the hash, and the model

    def carries(self, plan: Plan) -> bool:
        """Plans that say how a direction remembers."""
        return plan.link_down is not None or plan.link_up is not None

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Any can be sent."""

    def send(self, plan: Plan) -> Dispatch:
        """The residuals that the device lacks, or a dense model, and what the device is known to remember."""
        plan = msgspec.structs.replace(plan, acknowledged=self._links.acknowledged(plan.device))
        if plan.link_down is None:
            (message,) = self._dense.messages(plan)
            plan, message = self._links.track(plan, message, as_arrays(self._dense.downlink.sent(plan)))
            messages = [message]
        else:
            expected = array_specs(down_tensors(self._spec, plan.part))
            messages = self._links.send(plan, lambda: self._target(expected), expected)
            start = plan.version, plan.part.key
            if not plan.link_down.feedback and start not in self._starts:
                model = self._target(expected)
                self._starts[start] = hash_arrays(model), {name: a.copy() for name, a in model.items()}
        return Dispatch(plan, tuple(messages), self._links.state(plan.device))

    def open(self, plan: Plan, packet: Array | None, host: Array | None) -> Opened:
        """The residuals as differences, and the device's model by them; a dense update where the uplink has no memory."""
        if packet is None or plan.link_up is None:
            return self._dense.open(plan, packet, host)
        specs = array_specs(up_tensors(self._spec, plan.part, statistics=plan.upload.statistics))
        residuals, local, whole = self._links.open_update(plan, packet, specs)
        return Opened(as_tensors(residuals) if whole else minus(local, self._links.sent(plan).arrays), local)

    def fold(self, plan: Plan, update: Opened, into: Fold, *, weight: float, scale: float) -> None:
        """The update as the difference to the version that it started from; the device's model is acknowledged."""
        into.add(self._from_start(plan, update.differences), weight=weight, scale=scale)
        if update.local is not None:
            self._links.folded(plan, update.local)

    def ended(self, plan: Plan, report: Report, state: State | None) -> None:
        """See ``ServerLinks.ended``."""
        self._links.ended(plan, report, state)

    def released(self, plan: Plan) -> None:
        """What was sent is not acknowledged."""
        self._links.abandon(plan)

    def keep(self, versions: Collection[int]) -> None:
        """Forget where plans of other versions started."""
        self._starts = {start: value for start, value in self._starts.items() if start[0] in versions}

    def _from_start(self, plan: Plan, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """An update as the difference to the version that it started from.

        What a downlink without feedback left out is forgotten, as in ResFed: the mean is then over the recovered models.
        """
        if plan.link_down is None or plan.link_down.feedback:
            return update
        held = self._links.sent(plan)
        start_hash, start = self._starts[plan.version, plan.part.key]
        if held.hash == start_hash:
            return update
        offsets = minus({name: held.arrays[name] for name in update}, start)
        return {name: widened(tensor) + offsets[name] for name, tensor in update.items()}

    def _target(self, expected: tuple[ArraySpec, ...]) -> Arrays:
        """Where the downlinks lead: the model, with what of it has yet to be sent."""
        model, pending = self._store["model"], self._store["pending"]
        target = {s.name: model[s.name] + pending[s.name] if s.name in pending else model[s.name] for s in expected}
        return as_arrays({name: tensor.to(model[name].dtype) for name, tensor in target.items()})
