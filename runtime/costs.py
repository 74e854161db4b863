"""What plans cost: the table behind ``view.estimate``, and the figures that the clock charges.

The table holds one row for each part and training setting that a plan has named, computed when it is first named, by a
dry run that allocates nothing; an estimate itself is arithmetic.
"""

from typing import Any

from ..actors.messages import array_specs
from ..clusters.fleet import Fleet
from ..comms.make_codec import make_codec
from ..comms.packet import sealed_bytes
from ..learning.amount import processed_samples
from ..learning.cost import part_cost
from ..learning.losses import make_loss
from ..learning.part import Part, down_tensors, up_tensors
from ..learning.spec import PartCost, Training
from ..learning.workload import Workload
from ..policies.estimate import charge, transfer_s
from ..policies.plan import Plan
from ..policies.report import Estimate
from .clock import own_rate


class Costs:
    """Rows by part and training; packet sizes by part and codecs. Equal objects of one experiment share a row."""

    def __init__(self, workload: Workload, fleet: Fleet) -> None:
        """An empty table."""
        self._workload = workload
        self._fleet = fleet
        self._profiles = fleet.profiles()
        self._samples = [workload.data.num_samples(device) for device in range(fleet.num_devices)]
        self._rows: dict[tuple[Any, ...], PartCost] = {}
        self._sizes: dict[tuple[Any, ...], tuple[int, int]] = {}

    def row(self, part: Part, training: Training) -> PartCost:
        """Cost of a part under a training setting, per sample and at its peak."""
        optimiser = training.optimiser
        key = (part.key, training.batch_size, training.accumulation, training.precision, training.channels_last,
               training.checkpointing, optimiser.name, optimiser.momentum > 0, optimiser.proximal > 0,
               repr(training.loss))  # fmt: skip
        if key not in self._rows:
            self._rows[key] = part_cost(
                self._workload.blocks.model,
                self._workload.blocks,
                part,
                example=self._workload.example(),
                training=training,
                loss=make_loss(training.loss),
            )
        return self._rows[key]

    def flops(self, plan: Plan, *, device: int | None = None) -> int:
        """FLOPs that a plan takes on its device, or on another one. Evaluation is an instrument: it takes none."""
        if plan.objective.kind == "evaluate":
            return 0
        samples = self._samples[plan.device if device is None else device]
        return self.row(plan.part, plan.training).training_flops * processed_samples(samples, plan.training)

    def packet_bytes(self, plan: Plan) -> tuple[int, int]:
        """Bytes of the packets down and up: exact for codecs of fixed size, an upper bound for others."""
        key = plan.part.key, repr(plan.codec_down), repr(plan.codec_up), plan.upload.statistics
        if key not in self._sizes:
            spec = self._workload.spec
            down = array_specs(down_tensors(spec, plan.part))
            up = array_specs(up_tensors(spec, plan.part, statistics=plan.upload.statistics))
            self._sizes[key] = (
                sealed_bytes(make_codec(plan.codec_down), down)[0],
                sealed_bytes(make_codec(plan.codec_up), up)[0],
            )
        return self._sizes[key]

    def estimate(self, device: int, plan: Plan) -> Estimate:
        """What the plan costs on a device that is alone on its links. A plan that only evaluates sends no packet up."""
        profile = self._profiles[device]
        down_bytes, up_bytes = self.packet_bytes(plan)
        sends = plan.objective.kind != "evaluate"
        shared = self._fleet.shared_links.get(profile.shared_link) if profile.shared_link else None
        server = self._fleet.server

        def seconds(size: int, direction: str) -> float:
            name = f"{direction}_bytes_per_s"
            link: Any = getattr(shared, name) if shared else None
            rate = own_rate(getattr(profile, name), link, getattr(server, name))
            return transfer_s(size, bytes_per_s=rate, latency_s=profile.latency_s)

        return charge(
            profile,
            down_bytes=down_bytes,
            flops=self.flops(plan, device=device),
            up_bytes=up_bytes if sends else 0,
            peak_memory_bytes=self.row(plan.part, plan.training).peak_memory_bytes,
            down_s=seconds(down_bytes, "down"),
            up_s=seconds(up_bytes, "up") if sends else 0.0,
        )
