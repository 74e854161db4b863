"""What plans cost: the table behind ``view.estimate``, the figures that the clock charges, and how much of a plan fits.

The table holds one row for each part and training setting that a plan has named. A row is computed when it is first named, by
dry runs on a few samples; an estimate itself is arithmetic.

A plan with a deadline, or whose device must stop early (``Disruption.steps``), is shortened to the most training steps that
fit, one at least; these are the first steps of the whole plan, bit for bit. The weight of its update, its samples, is
multiplied by the share of the steps that were made: half of a training counts half as much as a whole one in the mean of
their version. (Alone in its version it is the mean, as ever. FedProx, Li et al., MLSys 2020, arXiv 1812.06127, gives partial
work its full weight.) How long steps take is estimated for the device with its current rates and jitter, alone on its links:
the other transfers on a shared link are not known in advance, so on a contended one an update may still be late.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from ...actors.messages.messages import array_specs
from ...actors.server.frozen_blocks import with_cached
from ...actors.server.server import Server
from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile
from ...comms.ledger import Direction
from ...learning.costs.cost import PartProfile, profile
from ...learning.costs.dry_run import DryRun
from ...learning.data.batches import num_steps, processed_samples
from ...learning.parts.part import Part
from ...learning.spec import PartCost, Training
from ...learning.training.losses import make_loss
from ...learning.workload import Workload
from ...policies.estimate import Estimate, charge, transfer_s
from ...policies.plan import Plan
from ...policies.report import Report
from .network_links import uncontended_rate
from .packet_sizes import PacketSizes
from .process_memory import ProcessMemory
from .stream_costs import StreamCosts
from .stream_load import Work


class Costs:
    """Costs by part and training setting, and packet sizes. Parts and settings that are equal share a row."""

    SAVED: ClassVar = {"_packets": PacketSizes, "_streams": StreamCosts}  # in a checkpoint
    NOT_SAVED = ("_workload", "_fleet", "_profiles", "_samples", "_rows", "_parts", "_server", "_memory")

    def __init__(
        self, workload: Workload, fleet: Fleet, server: Server | None = None, *, memory: ProcessMemory | None = None
    ) -> None:
        """An empty table.

        ``server``: its records state what devices lack (versions behind links with memory, maps, frozen blocks). None: nothing.
        ``memory``: predicts the memory of processes (None: peaks are those of tensors alone).
        """
        self._workload = workload
        self._fleet = fleet
        self._profiles = fleet.profiles()
        self._samples = [workload.data.num_samples(device) for device in range(fleet.num_devices)]
        self._rows: dict[tuple[Any, ...], PartCost] = {}
        self._parts: dict[tuple[Any, ...], PartProfile] = {}
        self._server, self._memory = server, memory
        self._packets = PacketSizes(workload.submodel)
        self._streams = StreamCosts(workload, fleet, row=self.row)

    def row(
        self,
        part: Part,
        training: Training,
        *,
        entering_gradient: bool = True,
        ahead: int = 1,
        objective: str = "train",
    ) -> PartCost:
        """Cost of a part under a training setting, per sample and at its peak.

        ``entering_gradient``, ``ahead``, ``objective``: as in ``DryRun``. Raises ``ValueError`` where the model does not fit
        the data.
        """
        optimiser = training.optimiser
        part = msgspec.structs.replace(part.shape, cached=())  # cached blocks do not change what training costs
        micro_batches = training.accumulation if ahead > 1 else min(training.accumulation, 2)
        profiled = (part.key, micro_batches, training.precision, training.frozen_precision,
                    training.layout, training.sparsity, entering_gradient, ahead,
                    training.checkpointing, optimiser.name, optimiser.momentum > 0, optimiser.proximal > 0,
                    repr(training.loss), objective)  # fmt: skip
        key = (*profiled, training.batch_size, training.accumulation)
        if key not in self._rows:
            if profiled not in self._parts:  # one dry run serves all batch sizes
                architecture = self._workload.architecture(part)
                proxies = [name for name in part.auxiliaries if name != part.head]
                self._parts[profiled] = profile(
                    DryRun(
                        self._workload.submodel(part),
                        example=self._workload.example(),
                        training=training,
                        loss=make_loss(training.loss),
                        entering_gradient=entering_gradient,
                        head=architecture.empty_head(part.head) if part.head else None,
                        ahead=ahead,
                        proxies={name: architecture.empty_auxiliary(name) for name in proxies},
                        objective=objective,
                    )
                )
            self._rows[key] = self._parts[profiled].cost(training)
        return self._rows[key]

    def flops(self, plan: Plan, *, device: int | None = None) -> int:
        """FLOPs of a plan on its device, or on another one.

        0 for an evaluation, which takes no simulated time, and for a replay, which runs on its host alone.
        """
        if plan.objective.kind == "evaluate" or plan.replays:
            return 0
        samples = self._samples[plan.device if device is None else device]
        row = self.row(plan.part, plan.training, objective=_objective(plan))
        return row.training_flops * processed_samples(samples, plan.training)

    def peak_memory_bytes(self, plan: Plan, *, device: int | None = None) -> int:
        """Peak memory of a plan on its device, or on another one."""
        ahead = self._streams.ahead(plan, self._samples[plan.device if device is None else device])
        row = self.row(plan.part, plan.training, ahead=ahead, objective=_objective(plan))
        if self._memory is None:
            return row.peak_memory_bytes
        return self._memory.needed_bytes(plan, row, self._workload.submodel(plan.part.shape))

    def use_measured(self, probed: Mapping[str, int]) -> None:
        """Take measured figures in place of predictions, by ``process_memory.key``."""
        assert self._memory is not None, "without enforcement and probe nothing is measured"
        self._memory.probed = probed

    @property
    def memory_margin(self) -> float:
        """Factor on predicted peaks at admission."""
        return self._memory.margin if self._memory is not None else 1.0

    def parameters(self, plan: Plan) -> int:
        """Parameters of the blocks that a plan's device holds; 0 for a replay, which its host carries out alone."""
        return 0 if plan.replays else self._workload.submodel(plan.part.shape).parameters

    def work(self, plan: Plan) -> Work | None:
        """What a split plan's device and host compute; None for a plan that is not split."""
        return self._streams.work(plan, self._samples[plan.device])

    def packet_bytes(self, plan: Plan) -> tuple[int, int]:
        """Bytes of one packet down and of the one up; exact for codecs of fixed size."""
        return self._packets.num_bytes(plan, "down"), self._packets.num_bytes(plan, "up")

    def observe(self, plan: Plan, direction: Direction, num_bytes: int) -> None:
        """Record the size of a plan's packet, for estimates of similar ones."""
        self._packets.observe(plan, direction, num_bytes)

    def observe_stream(self, plan: Plan, up: Sequence[int], down: Sequence[int]) -> None:
        """Record the packet sizes of a plan's stream, for estimates of similar ones."""
        self._streams.observe(plan, self._samples[plan.device], up, down)

    def stop_early(self, plan: Plan, profile: DeviceProfile, *, device: int | None = None, share: float = 1.0) -> Plan:
        """The plan shortened to what its device, or another one, has time for with this profile; see ``stop_early``."""
        on = plan.device if device is None else device
        return stop_early(
            plan,
            num_samples=self._samples[on],
            estimate=lambda shorter: self._estimate(on, shorter, profile),
            share=share,
        )

    def estimate(self, device: int, plan: Plan) -> Estimate:
        """Cost of a plan on a device that is alone on its links; a plan with a deadline is shortened to it first.

        No packet goes up for an evaluation, nor where the device trains nothing. A replay costs its device nothing.
        """
        profile = self._profiles[device]
        return self._estimate(device, self.stop_early(plan, profile, device=device), profile)

    def _estimate(self, device: int, plan: Plan, profile: DeviceProfile) -> Estimate:
        """Cost of a plan that is not shortened any more."""
        down_bytes, up_bytes = self._down_bytes(device, plan), self._packets.num_bytes(plan, "up")
        sends = plan.objective.kind != "evaluate" and plan.trains_on_device
        shared = self._fleet.shared_links.get(profile.shared_link) if profile.shared_link else None
        server = self._fleet.server

        def seconds(size: int, direction: str) -> float:
            name = f"{direction}_bytes_per_s"
            link: Any = getattr(shared, name) if shared else None
            rate = uncontended_rate(getattr(profile, name), link, getattr(server, name))
            return transfer_s(size, bytes_per_s=rate, latency_s=profile.latency_s)

        return charge(
            profile,
            down_bytes=down_bytes,
            flops=self.flops(plan, device=device),
            up_bytes=up_bytes if sends else 0,
            peak_memory_bytes=self.peak_memory_bytes(plan, device=device),
            parameters=self.parameters(plan),
            down_s=0.0 if plan.replays else seconds(down_bytes, "down"),
            up_s=seconds(up_bytes, "up") if sends else 0.0,
            crossing=self._streams.crossing(plan, self._samples[device], profile),
        )

    def _down_bytes(self, device: int, plan: Plan) -> int:
        """Bytes that bring a device to the plan's version: with what it lacks of versions, index maps and frozen blocks."""
        plan, server = with_cached(msgspec.structs.replace(plan, device=device)), self._server
        newest = self._packets.num_bytes(plan, "down")
        if server is None:
            return newest
        rest = server.maps.num_bytes(plan.part, device) + server.blocks.num_bytes(plan)
        if plan.link_down is None:
            return newest + rest
        expected = array_specs(self._workload.submodel(plan.part.shape).down)
        return server.links.estimate_bytes(plan, newest=newest, expected=expected) + rest


def _objective(plan: Plan) -> str:
    """The kind of step that a plan's costs are those of; an evaluation has those of training, which bound its memory."""
    return "train" if plan.objective.kind == "evaluate" else plan.objective.kind


def stop_early(plan: Plan, *, num_samples: int, estimate: Callable[[Plan], Estimate], share: float = 1.0) -> Plan:
    """The plan shortened to the steps that fit its deadline, and to ``share`` of all; unchanged where all fit.

    ``estimate``: cost of a shortened plan on its device.
    """
    whole = num_steps(num_samples, plan.training)
    unlimited = plan.whole_steps or whole <= 1 or (plan.deadline_s is None and share >= 1)
    if unlimited or plan.objective.kind == "evaluate":
        return plan

    def shortened(steps: int) -> Plan:
        return msgspec.structs.replace(
            plan, training=msgspec.structs.replace(plan.training, steps=steps), whole_steps=whole
        )

    def fits(steps: int) -> bool:
        # The deadline may itself have been computed from such an estimate: tolerate rounding.
        return plan.deadline_s is None or estimate(shortened(steps)).seconds <= plan.deadline_s * (1 + 1e-9)

    fewest, most = 1, max(1, int(whole * share))
    if most < whole or not fits(whole):
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fewest, most = (middle, most) if fits(middle) else (fewest, middle - 1)
        return shortened(fewest)
    return plan


def share_done(report: Report, *, num_samples: int) -> float:
    """The share of a whole plan's steps that a device made, at most those that it was asked for: its update's factor."""
    plan = report.plan
    if plan.whole_steps:
        assert plan.training.steps is not None
        return min(report.steps, plan.training.steps) / plan.whole_steps
    whole = num_steps(num_samples, plan.training) if plan.train_s is not None else 0
    return min(report.steps, whole) / whole if whole else 1.0
