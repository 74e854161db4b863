"""What plans cost: the table behind ``view.estimate``, and the figures that the clock charges.

The table holds one row for each part and training setting that a plan has named, computed when it is first named, by dry runs
on a few samples; an estimate itself is arithmetic. Packets of codecs whose output depends on the data are
estimated at the size of the last one of their kind, and before the first one at that of random numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from ...actors.messages.messages import array_specs
from ...actors.server.links import ServerLinks
from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile
from ...comms.codec import ArraySpec, Codec, NumBytes
from ...comms.codecs.make_codec import make_codec
from ...comms.ledger import Direction
from ...comms.links.predict import carried
from ...comms.packet import sealed_bytes
from ...learning.costs.amount import processed_samples
from ...learning.costs.cost import PartProfile, profile
from ...learning.costs.dry_run import DryRun
from ...learning.parts.part import Part, down_tensors, up_tensors
from ...learning.spec import PartCost, Training
from ...learning.training.losses import make_loss
from ...learning.workload import Workload
from ...policies.estimate import Estimate, charge, transfer_s
from ...policies.plan import Plan
from .links import own_rate
from .packet_size_prior import typical_bytes
from .partial_work import stop_early
from .stream_costs import StreamCosts
from .stream_load import Work


@dataclass
class _Packets:
    """One kind of packets: what they hold before their codec, and their size. ``num_bytes`` None: it depends on the data."""

    codec: Codec
    expected: tuple[ArraySpec, ...]
    num_bytes: int | None


class Costs:
    """Rows by part and training; packet sizes by part and codecs. Equal objects of one experiment share a row."""

    # By a checkpoint: what was seen decides estimates.
    SAVED: ClassVar = {"_observed": dict[tuple[Any, ...], NumBytes], "_streams": StreamCosts}
    NOT_SAVED = ("_workload", "_fleet", "_profiles", "_samples", "_rows", "_parts", "_links", "_packets")

    def __init__(self, workload: Workload, fleet: Fleet, links: ServerLinks | None = None) -> None:
        """An empty table. ``links``: tells what a device with a memory has missed (None: no link has one)."""
        self._workload = workload
        self._fleet = fleet
        self._profiles = fleet.profiles()
        self._samples = [workload.data.num_samples(device) for device in range(fleet.num_devices)]
        self._rows: dict[tuple[Any, ...], PartCost] = {}
        self._parts: dict[tuple[Any, ...], PartProfile] = {}
        self._links = links
        self._packets: dict[tuple[Any, ...], _Packets] = {}
        self._observed: dict[tuple[Any, ...], int] = {}  # of those whose size depends on the data
        self._streams = StreamCosts(workload, fleet, row=self.row)

    def row(self, part: Part, training: Training, *, entering_gradient: bool = True, ahead: int = 1) -> PartCost:
        """Cost of a part under a training setting, per sample and at its peak. The last two: as in ``part_cost``."""
        optimiser = training.optimiser
        part = msgspec.structs.replace(part, cached=())  # what it has already costs the same
        micro_batches = training.accumulation if ahead > 1 else min(training.accumulation, 2)
        kind = (part.key, micro_batches, training.precision, training.channels_last, entering_gradient, ahead,
                training.checkpointing, optimiser.name, optimiser.momentum > 0, optimiser.proximal > 0,
                repr(training.loss))  # fmt: skip
        key = (*kind, training.batch_size, training.accumulation)
        if key not in self._rows:
            if kind not in self._parts:  # one for batches of all sizes
                self._parts[kind] = profile(
                    DryRun(
                        self._workload.blocks,
                        part,
                        example=self._workload.example(),
                        training=training,
                        loss=make_loss(training.loss),
                        entering_gradient=entering_gradient,
                        head=self._workload.empty_auxiliary(part.head) if part.head else None,
                        ahead=ahead,
                    )
                )
            self._rows[key] = self._parts[kind].cost(training)
        return self._rows[key]

    def flops(self, plan: Plan, *, device: int | None = None) -> int:
        """FLOPs that a plan takes on its device, or on another one. Evaluation is an instrument: it takes none.

        Nor does a replay, which is its host's alone.
        """
        if plan.objective.kind == "evaluate" or plan.replays:
            return 0
        samples = self._samples[plan.device if device is None else device]
        return self.row(plan.part, plan.training).training_flops * processed_samples(samples, plan.training)

    def peak_memory_bytes(self, plan: Plan, *, device: int | None = None) -> int:
        """What a plan needs on its device, or on another one, at its peak."""
        ahead = self._streams.ahead(plan, self._samples[plan.device if device is None else device])
        return self.row(plan.part, plan.training, ahead=ahead).peak_memory_bytes

    def work(self, plan: Plan) -> Work | None:
        """What a split plan makes its device and its host compute; None for a plan that is not split."""
        return self._streams.work(plan, self._samples[plan.device])

    def packet_bytes(self, plan: Plan) -> tuple[int, int]:
        """Bytes of one packet down and of the one up: exact for codecs of fixed size."""
        return self._size(plan, "down"), self._size(plan, "up")

    def observe(self, plan: Plan, direction: Direction, num_bytes: int) -> None:
        """A packet of ``plan`` was that large: the next ones of its kind will be about as large."""
        key, packets = self._kind(plan, direction)
        if packets.num_bytes is None:
            self._observed[key] = num_bytes

    def observe_stream(self, plan: Plan, up: Sequence[int], down: Sequence[int]) -> None:
        """The packets of the plan's stream were that large."""
        self._streams.observe(plan, self._samples[plan.device], up, down)

    def _size(self, plan: Plan, direction: Direction) -> int:
        """The size of a packet; 0 where none is sent: a device has its part of a frozen trunk already, or all is frozen."""
        if not plan.trains_on_device:
            return 0
        key, packets = self._kind(plan, direction)
        if direction == "down" and not packets.expected:
            return 0
        if packets.num_bytes is not None:
            return packets.num_bytes
        if key not in self._observed:
            self._observed[key] = typical_bytes(packets.codec, packets.expected)
        return self._observed[key]

    def _kind(self, plan: Plan, direction: Direction) -> tuple[tuple[Any, ...], _Packets]:
        """The packets of a direction that are like those of ``plan``: by which rule they are predicted changes little."""
        down = direction == "down"
        codec, link = (plan.codec_down, plan.link_down) if down else (plan.codec_up, plan.link_up)
        arithmetic = link.arithmetic if link else "float"
        key = direction, plan.part.key, repr(codec), arithmetic, down or plan.upload.statistics
        if key not in self._packets:
            spec = self._workload.spec
            tensors = (
                down_tensors(spec, plan.part)
                if down
                else up_tensors(spec, plan.part, statistics=plan.upload.statistics)
            )
            expected = array_specs(tensors)
            expected = carried(expected, link) if link else expected
            made = make_codec(codec)
            num_bytes, exact = sealed_bytes(made, expected)
            self._packets[key] = _Packets(made, expected, num_bytes if exact else None)
        return key, self._packets[key]

    def _down_bytes(self, device: int, plan: Plan) -> int:
        """Bytes that bring a device to the plan's version, what it missed included."""
        newest = self._size(plan, "down")
        if plan.link_down is None or self._links is None:
            return newest
        dense = sum(spec.num_bytes for spec in array_specs(down_tensors(self._workload.spec, plan.part)))
        return self._links.estimate_bytes(msgspec.structs.replace(plan, device=device), newest=newest, dense=dense)

    def stop_early(self, plan: Plan, profile: DeviceProfile, *, device: int | None = None, share: float = 1.0) -> Plan:
        """The plan as far as its device, or another one, gets with it that is as ``profile`` says.

        See ``stop_early.stop_early``.
        """
        on = plan.device if device is None else device
        return stop_early(
            plan,
            num_samples=self._samples[on],
            estimate=lambda shorter: self._estimate(on, shorter, profile),
            share=share,
        )

    def estimate(self, device: int, plan: Plan) -> Estimate:
        """What the plan costs on a device that is alone on its links; one with a deadline, as far as it gets.

        A plan that only evaluates sends no packet up, nor does one whose device trains nothing. Of a replay the device does
        not hear.
        """
        profile = self._profiles[device]
        return self._estimate(device, self.stop_early(plan, profile, device=device), profile)

    def _estimate(self, device: int, plan: Plan, profile: DeviceProfile) -> Estimate:
        """The plan as it stands."""
        down_bytes, up_bytes = self._down_bytes(device, plan), self._size(plan, "up")
        sends = plan.objective.kind != "evaluate" and plan.trains_on_device
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
            peak_memory_bytes=self.peak_memory_bytes(plan, device=device),
            down_s=0.0 if plan.replays else seconds(down_bytes, "down"),
            up_s=seconds(up_bytes, "up") if sends else 0.0,
            crossing=self._streams.crossing(plan, self._samples[device], profile),
        )
