"""Slots: one device's copy of the host's blocks (SplitFed's first version), and the state of its stream."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...comms.codec import Array
from ...comms.errors import MismatchedPacket, OutOfSync
from ...learning.architecture import Architecture
from ...learning.parts.submodel import SubModel
from ...learning.spec import Layout, Training
from ...learning.tensors import as_tensors
from ...learning.training.losses import make_loss
from ...learning.training.split import HostLeg, MicroBatch, micro_batch_schedule
from ...learning.workload import Workload
from ...policies.plan import Plan, Split
from ..device.module import Module
from ..messages.dense_packets import open_weights
from ..messages.stream import ActivationStream
from ..messages.trunk import Trunk
from ..replay.upload import ViewKey, view_key


class RecordLeg:
    """The host's leg of a repeated upload: follows the schedule of ``learning.training.split.HostLeg`` without training."""

    steps, loss, loss_square, between_steps = 0, None, None, True

    def __init__(self, num_samples: int, training: Training) -> None:
        """Starts at the first micro-batch."""
        self._schedule = micro_batch_schedule(num_samples, training)
        self.next: MicroBatch | None = next(self._schedule, None)

    def micro_batch(self, activations: Tensor, targets: Tensor) -> Tensor:
        """Advance by one micro-batch. No gradient is sent back, so the result is not read."""
        self.next = next(self._schedule, None)
        return activations

    def close(self) -> None:
        """Holds no resources."""


@dataclass
class Slot:
    """One device's copy of the host's blocks. ``module``: None if an upload is repeated, and nothing is trained.

    ``early``: packets received ahead of their order, by number. ``view``: key of the view that the packets form, if any.
    """

    plan: Plan
    submodel: SubModel  # of the host's part
    module: Module | None
    base: dict[str, Tensor]
    stream: ActivationStream
    leg: HostLeg | RecordLeg
    answers: bool  # whether gradients are sent back
    up_bytes: list[int] = field(default_factory=list)
    down_bytes: list[int] = field(default_factory=list)
    train_s: float = 0.0
    early: dict[int, Array] = field(default_factory=dict)
    view: ViewKey | None = None


class SlotMaker:
    """Makes slots. Their modules are reused, so a host has as many as it ever had slots at once."""

    def __init__(self, workload: Workload) -> None:
        """Builds no module before the first slot."""
        self.workload = workload
        self._free: dict[tuple[Architecture, Layout], list[Module]] = {}
        self._trunk = Trunk(workload)

    def open(self, plan: Plan, num_samples: int, packets: Sequence[Array]) -> Slot:
        """A slot that trains; raises a ``PacketError`` for invalid packets, or for another trunk than the host's."""
        if plan.split is None:
            raise MismatchedPacket(f"plan {plan.id} was sent to a host, and is not split")
        submodel = self._submodel(plan, plan.split)
        expected = 1 if submodel.down else 0
        if len(packets) != expected:
            raise MismatchedPacket(f"{len(packets)} packets with the host's blocks were received; {expected} expected")
        arrays = open_weights(packets[0], plan, submodel) if packets else {}
        base = as_tensors(arrays) | self._trunk.tensors(submodel.part.cached)
        architecture = self.workload.architecture(submodel.part)
        layout = plan.training.layout
        free = self._free.setdefault((architecture, layout), [])
        module = free.pop() if free else Module(architecture, layout=layout)
        module.check_frozen(submodel, plan.split.frozen)
        module.load(base)
        stream, answers = ActivationStream(plan, self.workload), plan.split.method.returns_gradients
        leg = HostLeg(
            module.blocks,
            submodel.part,
            training=plan.training,
            loss=make_loss(plan.training.loss),
            seed=plan.seed,
            num_samples=num_samples,
            crossing=stream.crossing,
            answers=answers,
        )
        view = view_key(plan, str(plan.id)) if plan.uploads_view else None
        return Slot(plan, submodel, module, base, stream, leg, answers, view=view)

    def record(self, plan: Plan, num_samples: int) -> Slot:
        """A slot for a repeated upload; raises a ``PacketError`` for another trunk than the host's."""
        if plan.split is None or not plan.uploads_view:
            raise MismatchedPacket(f"plan {plan.id} is to repeat an upload, and uploads no view")
        submodel, leg = self._submodel(plan, plan.split), RecordLeg(num_samples, plan.training)
        view = view_key(plan, str(plan.id))
        return Slot(plan, submodel, None, {}, ActivationStream(plan, self.workload), leg, answers=False, view=view)

    def free(self, slot: Slot) -> None:
        """Take back the module of a slot."""
        slot.leg.close()
        if slot.module is not None:
            architecture = self.workload.architecture(slot.submodel.part)
            self._free.setdefault((architecture, slot.plan.training.layout), []).append(slot.module)

    def _submodel(self, plan: Plan, split: Split) -> SubModel:
        """The host's part of a plan. The host builds its frozen blocks itself; raises ``OutOfSync`` if the trunk differs."""
        part = self.workload.submodel(plan.part).rest(frozen_to=split.depth)
        if split.method.trains_front:
            return self.workload.submodel(part)
        if (own := self._trunk.hashes.trunk(split.depth)) != split.trunk:
            raise OutOfSync(f"the trunk up to {split.depth!r} is {own} here, where the plan names {split.trunk}")
        return self.workload.submodel(self._trunk.hashes.cached(part))
