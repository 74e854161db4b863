"""Routes: how a plan's weights are sent and its update is opened: dense, as residuals over links with memory, or split.

    send ── the device carries the plan out ── open ── fold

A plan takes the first of the server's routes that carries it. Only ``open`` may fail on the contents of a packet: it checks
the whole update and changes nothing. A route with state about plans in flight drops it when they end or are released.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import msgspec
from torch import Tensor

from ...comms.codec import Array, Arrays, sparsifies
from ...comms.codecs.make_codec import make_codec
from ...comms.errors import MismatchedPacket
from ...comms.links.predict import hash_arrays
from ...comms.links.state import LinkState
from ...learning.aggregation import Fold
from ...learning.parts.submodel import SubModel
from ...learning.store import Store
from ...learning.tensors import as_arrays, as_tensors, at_least_float32, subtract
from ...policies.plan import Plan
from ...policies.report import Report
from ..messages.dense_packets import open_update
from ..messages.messages import Dispatch, Message, array_specs, update_tensors
from ..messages.trunk import BlockHashes
from .dense_downlink import Compile, DenseDownlink
from .links import ServerLinks
from .prepare_plan import plan_for_host
from .shared_heads import SharedHeads


@dataclass(frozen=True)
class Opened:
    """A valid update: differences to the weights that the plan was sent; on an uplink with memory also the device's model."""

    differences: dict[str, Tensor]
    local: Arrays | None = None


class Route(Protocol):
    """The server's side of one kind of plan."""

    def carries(self, plan: Plan) -> bool:
        """Whether this route can take the plan."""
        ...

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Raise ``PlanRefused`` if the plan cannot be sent while these are in flight."""
        ...

    def send(self, plan: Plan) -> Dispatch:
        """The packets with which the plan's device, and its host, reach the current version."""
        ...

    def open(self, plan: Plan, packet: Array | None, host: Array | None) -> Opened:
        """Open and check an update; raises a ``PacketError``.

        ``packet``: None if the device trains nothing. ``host``: the update of the host's leg of a split plan.
        """
        ...

    def start(self, plan: Plan) -> Mapping[str, Tensor]:
        """The tensors that the legs of a plan started from, by the names of its part."""
        ...

    def fold(self, plan: Plan, update: Opened, into: Fold, *, weight: float, scale: float) -> None:
        """Add an opened update to the mean."""
        ...

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """The plan has ended with a report."""
        ...

    def released(self, plan: Plan) -> None:
        """The plan is released: its result is not wanted any more."""
        ...


class DenseRoute:
    """Dense weights by codec chains without memory: every plan that no other route carries."""

    def __init__(self, downlink: DenseDownlink, tensors: Mapping[str, Tensor], submodel: Compile) -> None:
        """``tensors``: those that plans are sent, of the current version; they change in place."""
        self.downlink, self.tensors, self.submodel = downlink, tensors, submodel

    def carries(self, plan: Plan) -> bool:
        """Every plan."""
        return True

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Every plan can be sent."""

    def send(self, plan: Plan) -> Dispatch:
        """At most one packet; see ``messages``."""
        return Dispatch(plan, self.messages(plan), None)

    def messages(self, plan: Plan) -> tuple[Message, ...]:
        """The packet of one leg of the plan, or none if its part has nothing to send."""
        return (self.downlink.send(plan, self.tensors),) if self.submodel(plan.part).down else ()

    def open(self, plan: Plan, packet: Array | None, host: Array | None) -> Opened:
        """The differences in the device's update."""
        return Opened(self.differences(plan, packet, self.downlink.sent) if packet is not None else {})

    def differences(
        self, plan: Plan, packet: Array, start: Callable[[Plan], dict[str, Tensor]], *, leg: int = 0
    ) -> dict[str, Tensor]:
        """The differences in the update of one leg. ``start``: returns the tensors that the leg was sent."""
        update = as_tensors(open_update(packet, plan, self.submodel(plan.part), leg=leg))
        if plan.upload.payload == "weights":
            sent = start(plan)
            update = {name: tensor - sent[name] for name, tensor in update.items()}
        return update

    def start(self, plan: Plan) -> Mapping[str, Tensor]:
        """The tensors that were sent."""
        return self.downlink.sent(plan) if self.submodel(plan.part).down else {}

    def fold(self, plan: Plan, update: Opened, into: Fold, *, weight: float, scale: float) -> None:
        """Add all differences."""
        self.add(plan, update.differences, into, weight=weight, scale=scale)

    def add(self, plan: Plan, update: Mapping[str, Tensor], into: Fold, *, weight: float, scale: float) -> None:
        """Add differences at the places that they have in the server's tensors."""
        submodel = self.submodel(plan.part)
        into.add(
            submodel.server_names(update),
            weight=weight,
            scale=scale,
            slices=submodel.server_slices,
            tensors=self.tensors,
            exact=plan.upload.payload == "weights" and sparsifies(make_codec(plan.codec_up)),
        )

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """There is no state of single plans."""

    def released(self, plan: Plan) -> None:
        """There is no state of single plans."""


class OwnHeads:
    """A copy of the host's blocks for each device (``head: slots``): sent and folded like the device's own blocks."""

    def __init__(self, dense: DenseRoute) -> None:
        """``dense``: sends them."""
        self._dense = dense

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Every plan can be sent."""

    def send(self, for_host: Plan) -> tuple[Message, ...]:
        """The packet of the host's blocks. ``for_host``: the plan with the host's part."""
        return self._dense.messages(for_host)

    def sent(self, for_host: Plan) -> dict[str, Tensor]:
        """The tensors that the host's leg was sent."""
        return self._dense.downlink.sent(for_host)

    def check_open(self, plan: Plan) -> None:
        """Every update may be opened."""

    def add(self, plan: Plan, update: dict[str, Tensor], *, weight: float) -> dict[str, Tensor]:
        """The differences to fold: all of them."""
        return update

    def ended(self, plan: Plan) -> None:
        """There is no state of single plans."""


class SplitRoute:
    """Plans that cut the model: a device's leg and a host's leg, whose updates are folded as one."""

    def __init__(self, dense: DenseRoute, shared: SharedHeads, hashes: BlockHashes) -> None:
        """``shared``: the host's blocks of plans with ``head: shared``."""
        self._dense, self._hashes = dense, hashes
        self._heads: dict[str, OwnHeads | SharedHeads] = {"slots": OwnHeads(dense), "shared": shared}

    def carries(self, plan: Plan) -> bool:
        """Plans that name a cut."""
        return plan.split is not None

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """See ``SharedHeads.check``."""
        self._head(plan).check(plan, in_flight)

    def send(self, plan: Plan) -> Dispatch:
        """The packets of both legs."""
        for_host = plan_for_host(plan, self._dense.submodel(plan.part), self._hashes)
        return Dispatch(plan, self._dense.messages(plan), None, self._head(plan).send(for_host))

    def open(self, plan: Plan, packet: Array | None, host: Array | None) -> Opened:
        """The differences of both legs."""
        head = self._head(plan)
        head.check_open(plan)
        update = self._dense.open(plan, packet, None).differences
        if host is None:
            raise MismatchedPacket(f"plan {plan.id} is split, and its host's update is missing")
        for_host = plan_for_host(plan, self._dense.submodel(plan.part), self._hashes)
        return Opened(update | self._dense.differences(for_host, host, head.sent, leg=1))

    def start(self, plan: Plan) -> Mapping[str, Tensor]:
        """The tensors that both legs were sent."""
        for_host = plan_for_host(plan, self._dense.submodel(plan.part), self._hashes)
        has_packet = bool(self._dense.submodel(for_host.part).down)
        return {**self._dense.start(plan), **(self._head(plan).sent(for_host) if has_packet else {})}

    def fold(self, plan: Plan, update: Opened, into: Fold, *, weight: float, scale: float) -> None:
        """Add the differences; a shared head keeps those of the host's blocks until the version closes."""
        own = self._head(plan).add(plan, update.differences, weight=weight)
        self._dense.add(plan, own, into, weight=weight, scale=scale)

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """Frees a shared head for the next device."""
        self._head(plan).ended(plan)

    def released(self, plan: Plan) -> None:
        """Frees a shared head for the next device."""
        self._head(plan).ended(plan)

    def _head(self, plan: Plan) -> OwnHeads | SharedHeads:
        assert plan.split is not None
        return self._heads[plan.split.head]


class ResidualRoute:
    """Links with memory, in one direction or both (ResFed)."""

    SAVED: ClassVar = {"_starts": dict[tuple[int, str], tuple[int, dict[str, Array]]]}  # by a checkpoint
    NOT_SAVED = ("_dense", "_links", "_store")

    def __init__(self, dense: DenseRoute, links: ServerLinks, store: Store) -> None:
        """``dense``: serves a direction without memory."""
        self._dense, self._links, self._store = dense, links, store
        self._starts: dict[tuple[int, str], tuple[int, Arrays]] = {}  # by version and part: hash and model

    def carries(self, plan: Plan) -> bool:
        """Plans with a memory in one direction (``link_down``, ``link_up``)."""
        return plan.link_down is not None or plan.link_up is not None

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Every plan can be sent."""

    def send(self, plan: Plan) -> Dispatch:
        """Residuals or a dense model, with the plan that the device's uplink has acknowledged and the device's state."""
        plan = msgspec.structs.replace(plan, acknowledged=self._links.acknowledged(plan.device))
        if plan.link_down is None:
            (message,) = self._dense.messages(plan)
            plan, message = self._links.track(plan, message, as_arrays(self._dense.downlink.sent(plan)))
            messages = [message]
        else:
            submodel = self._dense.submodel(plan.part)
            messages = self._links.send(plan, lambda: self._target(submodel), array_specs(submodel.down))
            start = plan.version, plan.part.key
            if not plan.link_down.feedback and start not in self._starts:
                model = self._target(submodel)
                self._starts[start] = hash_arrays(model), {name: a.copy() for name, a in model.items()}
        state, models = self._links.state(plan.device), self._links.models(plan.device)
        return Dispatch(plan, tuple(messages), state, remembered=models)

    def open(self, plan: Plan, packet: Array | None, host: Array | None) -> Opened:
        """The residuals as differences, and the device's model; a dense update if the uplink has no memory."""
        if packet is None or plan.link_up is None:
            return self._dense.open(plan, packet, host)
        specs = array_specs(update_tensors(plan, self._dense.submodel(plan.part)))
        residuals, local, residuals_are_update = self._links.open_update(plan, packet, specs)
        return Opened(
            as_tensors(residuals) if residuals_are_update else subtract(local, self._links.sent(plan).arrays), local
        )

    def start(self, plan: Plan) -> Mapping[str, Tensor]:
        """The model that the device held."""
        return as_tensors(self._links.sent(plan).arrays)

    def fold(self, plan: Plan, update: Opened, into: Fold, *, weight: float, scale: float) -> None:
        """Add the update as the difference to the plan's version, and acknowledge the device's model."""
        self._dense.add(plan, self._from_start(plan, update.differences), into, weight=weight, scale=scale)
        if update.local is not None:
            self._links.folded(plan, update.local)

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """See ``ServerLinks.ended``."""
        self._links.ended(plan, report, state)

    def released(self, plan: Plan) -> None:
        """The device need not hold what it was sent: nothing is acknowledged."""
        self._links.released(plan)

    def keep(self, versions: Collection[int]) -> None:
        """Drop the models of all other versions."""
        self._starts = {start: value for start, value in self._starts.items() if start[0] in versions}

    def _from_start(self, plan: Plan, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The update as the difference to the plan's version instead of to the model that its device holds.

        Without feedback the downlink's coding error is dropped, as in ResFed: the mean is then over the recovered models.
        """
        if plan.link_down is None or plan.link_down.feedback:
            return update
        sent = self._links.sent(plan)
        start_hash, start = self._starts[plan.version, plan.part.key]
        if sent.hash == start_hash:
            return update
        offsets = subtract({name: sent.arrays[name] for name in update}, start)
        return {name: at_least_float32(tensor) + offsets[name] for name, tensor in update.items()}

    def _target(self, submodel: SubModel) -> Arrays:
        """The part of the model that downlinks encode: the current one plus its pending difference."""
        model, pending = submodel.gather(self._dense.tensors), self._store["pending"]
        for spec in submodel.down:
            if submodel.prefix + spec.name in pending:
                (rest,) = submodel.gather(pending, [spec]).values()
                model[spec.name] = (model[spec.name] + rest).to(model[spec.name].dtype)
        return as_arrays(model)
