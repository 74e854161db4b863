"""The Server: the global model, the packets of each plan, and the fold of updates. A plain class, in process and on Ray.

It makes no decisions and has no clock: the runtime's loop calls ``send`` when a plan is dispatched, ``open`` and ``fold`` when
its update arrives, ``ended`` or ``released`` when the plan is over, and ``close_version`` when the round ends. ``routes``
encode and decode a plan's weights.

Only ``open`` may fail on the contents of an update: it checks the whole update and changes nothing. ``fold`` takes opened
updates only, so an error in it is a bug of this program and ends the run.
"""

import math
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from ...clusters.scratch import Scratch
from ...comms.channel import Channel
from ...comms.codec import Array, Arrays
from ...comms.errors import MismatchedPacket
from ...comms.links.state import LinkState
from ...learning.aggregation import NEGATIVE_ZERO, Fold
from ...learning.data.types import Samples
from ...learning.parts.blocks import Blocks, cut_like
from ...learning.parts.part import Part
from ...learning.parts.slices import gather, put
from ...learning.parts.structure import Role
from ...learning.parts.submodel import SubModel
from ...learning.sparse.thresholds import evaluated
from ...learning.spec import CountOrZero, ServerOptimiser, Training
from ...learning.store import Store, model_hash
from ...learning.tensors import as_arrays, as_tensors, at_least_float32
from ...learning.training.evaluation import evaluate
from ...learning.training.losses import make_loss
from ...learning.training.optimisers import server_step
from ...learning.workload import Workload
from ...policies.plan import Plan
from ...policies.report import Report
from ..messages.messages import Dispatch
from ..messages.places import Places
from ..messages.trunk import BlockHashes
from ..plan_listener import PlanListener
from .dense_downlink import DenseDownlink
from .frozen_blocks import FrozenBlocks
from .index_maps import IndexMaps
from .links import ServerLinks
from .prepare_plan import add_auxiliaries, add_hashes, normal
from .routes import DenseRoute, Opened, ResidualRoute, Route, SplitRoute
from .shared_heads import SharedHeads

_PLAIN = ServerOptimiser()


class NotFinite(Exception):
    """A version would hold values that are not finite. One sentence says which tensor."""


class Server(PlanListener):
    """Holds the store. One version of the model is current; packets of older versions stay while plans in flight need them."""

    SAVED: ClassVar = {"version": CountOrZero, "store": Store, "links": ServerLinks, "_fold": Fold, "_dense": DenseDownlink,
                       "_shared_heads": SharedHeads, "_hashes": BlockHashes, "_roles": dict[str, Role],
                       "_residual": ResidualRoute, "maps": IndexMaps, "blocks": FrozenBlocks}  # fmt: skip
    NOT_SAVED = ("workload", "_optimiser", "_models", "tensors", "_test", "_routes", "_blocks")

    def __init__(
        self,
        workload: Workload,
        *,
        channel: Channel,
        optimiser: ServerOptimiser,
        link_memory_bytes: int = 2 * 10**9,
        link_disk_bytes: int = 20 * 10**9,
        scratch: Scratch | None = None,
    ) -> None:
        """Version 0 is the workload's initial model. ``link_...``: budgets for the memory of links, see ``peers``.

        ``scratch``: where temporary files go. Raises ``ValueError`` for an initial model that is not finite.
        """
        self.workload = workload
        self.version = 0
        self._optimiser = optimiser
        model = workload.new_model()
        self.store = Store(model.state_dict())
        if unfit := next((name for name, tensor in self.store["model"].items() if not _finite(tensor)), None):
            raise ValueError(
                f"model: {unfit!r} holds values that are not finite before the first round, so every update would be refused; "
                "a constant that must (a mask) is to be registered with persistent=False"
            )
        # The modules for evaluation share the store's tensors, so they always hold the current version.
        model.load_state_dict(self.store["model"], assign=True)
        self._models = {"": model}
        self._roles = {t.name: t.role for block in workload.spec.blocks for t in block.tensors}
        for family in workload.families[1:]:
            self._add_family(family)
        # The tensors that plans are sent and updates change: the models', and those of the auxiliaries that plans have named.
        self.tensors = ChainMap(self.store["model"], self.store["auxiliaries"], self.store["families"])
        self._fold = Fold()
        self._hashes = BlockHashes(workload.spec, self.store["model"])
        self.links = ServerLinks(
            channel,
            Places(workload, choose=lambda part: self.maps.channels(part)),
            first={name: array.copy() for name, array in as_arrays(self.store["model"]).items()},
            memory_bytes=link_memory_bytes,
            disk_bytes=link_disk_bytes,
            scratch=scratch,
        )
        self._dense = DenseDownlink(channel, workload.submodel)
        self._shared_heads = SharedHeads(channel, workload.submodel, self.tensors)
        self.maps = IndexMaps(channel, workload, self.tensors)
        self.blocks = FrozenBlocks(channel, workload, self.store["model"], self._hashes)
        dense = DenseRoute(self._dense, self.tensors, workload.submodel)
        self._residual = ResidualRoute(dense, self.links, self.store)
        split = SplitRoute(dense, self._shared_heads, self._hashes)
        self._routes: tuple[Route, ...] = (split, self._residual, dense)  # a plan takes the first that carries it

    @property
    def parts(self) -> tuple[PlanListener, ...]:
        """The records of what devices hold beside weights: index maps and frozen blocks."""
        return self.maps, self.blocks

    def _add_family(self, family: str) -> None:
        """Add the initial tensors of a family of models, under its prefix."""
        architecture = self.workload.family(family)
        if architecture.spec.frozen_parameters:
            raise ValueError(
                f"models.{family} has parameters that are frozen (requires_grad is False); only the global model may have some"
            )
        roles = {t.name: t.role for block in architecture.spec.blocks for t in block.tensors}
        model = self._models[family] = architecture.new_model()
        state = Store(model.state_dict())["model"]
        for name, tensor in state.items():
            if not _finite(tensor):
                raise ValueError(f"models.{family}: {name!r} holds values that are not finite before the first round")
            self.store["families"][f"{family}:{name}"] = tensor
            self._roles[f"{family}:{name}"] = roles.get(name, "counter")
        model.load_state_dict(state, assign=True)

    def send(self, plan: Plan) -> Dispatch:
        """The packets with which the plan's device reaches the current version. Plans of equal part and codecs share one."""
        if plan.version != self.version:
            raise AssertionError(f"a plan of version {plan.version} cannot start at version {self.version}")
        if plan.objective.kind != "evaluate":
            self.links.downlinks.count()
        add_auxiliaries(plan.part, self.workload, tensors=self.store["auxiliaries"], roles=self._roles)
        plan = self.maps.named(normal(plan))
        plan = self.blocks.named(add_hashes(plan, self.workload.submodel(plan.part), self._hashes))
        return self.blocks.attached(self.maps.attached(self._route(plan).send(plan)))

    def send_to_evaluate(self, plan: Plan) -> Dispatch | None:
        """The packets of a plan that evaluates; no state of the run changes.

        The device evaluates the current model. If downlinks have a memory, it evaluates the version that it has acknowledged,
        of the part that it holds, and nothing is sent; None if it holds no version.
        """
        plan = add_hashes(plan, self.workload.submodel(plan.part), self._hashes)
        if not self.links.downlinks_have_memory:
            return self._routes[-1].send(plan)
        evaluation = self.links.evaluation_of_held_model(plan)
        return self.maps.to_evaluate(evaluation) if evaluation is not None else None

    def open(self, plan: Plan, packet: Array | None, *, host: Array | None = None) -> Opened:
        """Open and check an update; raises a ``PacketError`` if it is not valid.

        ``packet``: None if the device trains nothing. ``host``: the update of the host's leg of a split plan.
        """
        if (packet is None) != (not plan.sends_update):
            problem = (
                "its device's update is missing" if packet is None else "its device sent an update, and trains nothing"
            )
            raise MismatchedPacket(f"plan {plan.id}: {problem}")
        return self._route(plan).open(plan, packet, host)

    def trained_model(self, plan: Plan, update: Opened) -> tuple[SubModel, dict[str, Tensor]]:
        """The whole model of a device after the plan whose update was opened: its part, and its tensors by the part's names.

        Called before ``fold``. Blocks that the plan does not train are those of the current version.
        """
        names = self.workload.family(plan.part.model).spec.block_names
        part = msgspec.structs.replace(
            plan.part, blocks=names, trained=names, cached=(), frozen="", head="", auxiliaries=(), untrained=()
        )
        submodel = self.workload.submodel(part)
        tensors, start = submodel.gather(self.tensors), self._route(plan).start(plan)
        for name in tensors:
            tensors[name] = start.get(name, tensors[name])
            if name in update.differences:
                tensors[name] = (tensors[name] + update.differences[name]).to(tensors[name].dtype)
        return submodel, tensors

    def fold(self, plan: Plan, update: Opened, *, weight: float, scale: float = 1.0) -> None:
        """Fold an opened update. ``scale``: its factor by staleness, see ``Fold.add``."""
        self._route(plan).fold(plan, update, self._fold, weight=weight, scale=scale)

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Raise ``PlanRefused`` if the plan's route cannot take it while these are in flight."""
        self._route(plan).check(plan, in_flight)

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """Pass the end of a plan, whatever its outcome, to its route."""
        self._route(plan).ended(plan, report, state)

    def released(self, plan: Plan) -> None:
        """Pass the release of a plan to its route."""
        self._route(plan).released(plan)

    def view_fields(self, version: int) -> Mapping[str, Any]:
        """``links``: by device, the version that it has acknowledged."""
        return {"links": MappingProxyType(self.links.peers.held)}

    def device_reset(self, device: int) -> None:
        """The link of the device is resynchronised with its next plan."""
        self.links.lose(device)

    def notices(self) -> list[str]:
        """Notices about the memory of links, since the last call."""
        notices, self.links.peers.notices = self.links.peers.notices, []
        return notices

    def close(self) -> None:
        """Remove the files of the links' memory."""
        self.links.peers.close()

    def _route(self, plan: Plan) -> Route:
        return next(route for route in self._routes if route.carries(plan))

    @property
    def folded(self) -> int:
        """Number of updates folded into the open version."""
        return self._fold.updates

    def close_version(self, *, in_flight: Collection[int], refine: Callable[[], Mapping[str, Tensor]] = dict) -> None:
        """Apply the mean update. ``in_flight``: versions whose packets are still needed.

        ``refine``: called after the update; the tensors that it returns, by name, replace those of the new version.

        Behind a lossy downlink with feedback the model is the one that its receivers hold; the rest is pending and sent later.
        Where their part is narrow, that applies to the elements of the part.
        Raises ``NotFinite`` if the next version would hold NaN or infinity: the version stays open, and the model unchanged.
        """
        pending = self.store["pending"]
        self._shared_heads.close(self._fold)
        with torch.no_grad():
            for name, value in self._stepped().items():
                self._set(name, value)
        refined = refine()
        with torch.no_grad():
            for name, value in refined.items():
                self._set(name, value)
        self.version += 1
        received = self.links.advance(self._gather, self.version)
        pending.clear()
        if received is not None:
            self._set_received(*received)
        self.maps.version_closed()
        keep = set(in_flight)
        self._dense.keep(keep)
        self._residual.keep(keep)

    def _gather(self, part: Part) -> Arrays:
        """The current tensors of a part."""
        return as_arrays(self.workload.submodel(part).gather(self.tensors))

    def _set_received(self, part: Part, arrays: Arrays) -> None:
        """Set the elements of a part to what its receivers hold; the differences are pending."""
        submodel = self.workload.submodel(part)
        for name, tensor in as_tensors(arrays).items():
            server_name, where = submodel.prefix + name, submodel.slices.get(name, ())
            full = self.tensors[server_name]
            current = gather(full, where) if where else full
            if not torch.equal(current, tensor):
                rest = at_least_float32(full).new_full(full.shape, NEGATIVE_ZERO)
                put(rest, where, at_least_float32(current) - tensor)
                self.store["pending"][server_name] = rest
                self._hashes.changed(server_name)
                put(full, where, tensor)

    def _set(self, name: str, value: Tensor) -> None:
        """Change a tensor of the current version."""
        self._hashes.changed(name)
        self.tensors[name].copy_(value)

    def _stepped(self) -> dict[str, Tensor]:
        """The tensors of the next version that differ from this version's. Raises ``NotFinite``."""
        pending, state = self.store["pending"], self.store["optimiser"]
        stepped = {name: self.tensors[name] + rest for name, rest in pending.items()}
        for name, mean in self._fold.close().items():
            settings = _PLAIN if self._roles[name] == "statistic" else self._optimiser
            largest = _largest(mean)
            start = stepped.get(name, self.tensors[name])
            moved = server_step(settings, name=name, value=start, mean=mean, state=state)
            stepped[name] = moved.to(self.tensors[name].dtype)  # in float16 this may overflow
            if not _finite(stepped[name]):
                raise NotFinite(
                    f"version {self.version + 1} would hold values that are not finite in {name!r}, so it is not closed, and "
                    f"the model of version {self.version} is kept; the largest value of its mean update is {largest:g}, and "
                    f"server.optimiser.learning_rate is {settings.learning_rate:g}"
                )
        return stepped

    def evaluate(
        self, training: Training, *, batch_size: int, family: str = "", path: Part | None = None
    ) -> dict[str, float]:
        """Metrics of the current model on the server's test set; empty if the server has none. The model is unchanged.

        ``family``: of the model; "" is the global one. ``path``: the part that stands for it (None: all of it).
        """
        samples = self._test
        if samples is None:
            return {}
        return evaluate(
            self._model(family, path),
            samples,
            loss=make_loss(training.loss),
            metrics=self.workload.metrics,
            transform=self.workload.data.test_transform,
            batch_size=batch_size,
            layout=training.layout,
            precision=training.precision,
        )

    def _model(self, family: str, path: Part | None) -> nn.Module:
        """A module that shares the store's tensors: a family's model, or the stages of a part of the global one."""
        if path is None or path.blocks == self.workload.spec.block_names:
            return self._models[family]
        add_auxiliaries(path, self.workload, tensors=self.store["auxiliaries"], roles=self._roles)
        modules = []
        for stage in self.workload.submodel(path).stages:
            if not stage.auxiliary:
                modules.append(self._blocks.modules[stage.name])
                continue
            module = self.workload.family("").empty_auxiliary(stage.name)
            names = {name: f"{stage.name}.{name}" for name in module.state_dict()}
            module.load_state_dict({own: self.store["auxiliaries"][name] for own, name in names.items()}, assign=True)
            modules.append(module)
        return nn.Sequential(*modules)

    @cached_property
    def _blocks(self) -> Blocks:
        """The global model for evaluation, in blocks that share its tensors."""
        return cut_like(self.workload.blocks, self._models[""])

    @cached_property
    def _test(self) -> Samples | None:
        """The server's test set, read once."""
        return self.workload.data.server_test()

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the current model, counters included, and of the families' models, whose names have their prefix."""
        tensors = {**self.store["model"], **self.store["families"]}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def evaluated_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ``weights`` of some version as evaluation uses them: of sparse layers without the entries that are left out."""
        sparsity = self.workload.settings.sparsity
        share = sparsity.weights if sparsity is not None else 0.0
        return {
            name: evaluated(tensor, share) if self._roles.get(name) == "sparse" else tensor
            for name, tensor in tensors.items()
        }

    def model_hash(self) -> str:
        """The hash of the current model, and of the families' models if there are any."""
        return model_hash({**self.store["model"], **self.store["families"]})


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN where one is NaN, 0 of an empty tensor."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return float(torch.maximum(-low, high))


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite; in one pass, without a temporary tensor."""
    return not tensor.is_floating_point() or math.isfinite(_largest(tensor))
