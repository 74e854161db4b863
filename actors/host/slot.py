"""A slot: one device's copy of the host's blocks (SplitFed's first version), with its place in the stream."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace
from torch import Tensor

from ...comms.codec import Array
from ...comms.errors import MismatchedPacket, OutOfSync
from ...learning.parts.part import Part, complement, down_tensors
from ...learning.tensors import as_tensors
from ...learning.training.losses import make_loss
from ...learning.training.split import HostLeg
from ...learning.workload import Workload
from ...policies.plan import Plan, Split
from ..device.module import Module
from ..messages.dense_packets import open_weights
from ..messages.stream import ActivationStream
from ..messages.trunk import Trunk
from ..replay.upload import ViewKey, view_key
from .record_leg import RecordLeg


@dataclass
class Slot:
    """One device's copy of the host's blocks. ``module``: None where an upload is made again, and nothing is trained."""

    plan: Plan
    part: Part
    module: Module | None
    base: dict[str, Tensor]
    stream: ActivationStream
    leg: HostLeg | RecordLeg
    answers: bool  # whether gradients go back
    up_bytes: list[int] = field(default_factory=list)
    down_bytes: list[int] = field(default_factory=list)
    train_s: float = 0.0
    early: dict[int, Array] = field(default_factory=dict)  # packets that came before their turn
    view: ViewKey | None = None  # that its packets become, once they are all there


class SlotMaker:
    """Makes slots, of modules that are kept for those after them."""

    def __init__(self, workload: Workload) -> None:
        """None yet."""
        self.workload = workload
        self._free: dict[bool, list[Module]] = {}
        self._trunk = Trunk(workload)

    def open(self, plan: Plan, num_samples: int, packets: Sequence[Array]) -> Slot:
        """A slot at its start; raises a ``PacketError`` for packets that are not sound, or another trunk."""
        if plan.split is None:
            raise MismatchedPacket(f"plan {plan.id} came to a host, and is not split")
        part = self._part(plan, plan.split)
        expected = 1 if down_tensors(self.workload.spec, part) else 0
        if len(packets) != expected:
            raise MismatchedPacket(f"{len(packets)} packets came, where {expected} bring the host's blocks")
        arrays = open_weights(packets[0], plan, part, self.workload.spec) if packets else {}
        base, channels_last = as_tensors(arrays) | self._trunk.tensors(part), plan.training.channels_last
        free = self._free.setdefault(channels_last, [])
        module = free.pop() if free else Module(self.workload, channels_last=channels_last)
        module.check_frozen(replace(part, frozen=plan.split.frozen))
        module.load(base)
        stream, answers = ActivationStream(plan, self.workload), plan.split.method.returns_gradients
        leg = HostLeg(
            module.blocks,
            plan.part.blocks,
            training=plan.training,
            loss=make_loss(plan.training.loss),
            seed=plan.seed,
            num_samples=num_samples,
            crossing=stream.crossing,
            frozen=tuple(name for name in part.blocks if name not in part.trained),
            answers=answers,
        )
        view = view_key(plan, str(plan.id)) if plan.uploads_view else None
        return Slot(plan, part, module, base, stream, leg, answers, view=view)

    def record(self, plan: Plan, num_samples: int) -> Slot:
        """A slot for an upload that is made again; raises a ``PacketError`` for another trunk."""
        if plan.split is None or not plan.uploads_view:
            raise MismatchedPacket(f"plan {plan.id} came to be recorded, and uploads no view")
        part, leg = self._part(plan, plan.split), RecordLeg(num_samples, plan.training)
        view = view_key(plan, str(plan.id))
        return Slot(plan, part, None, {}, ActivationStream(plan, self.workload), leg, answers=False, view=view)

    def free(self, slot: Slot) -> None:
        """A slot is over."""
        slot.leg.close()
        if slot.module is not None:
            self._free.setdefault(slot.plan.training.channels_last, []).append(slot.module)

    def _part(self, plan: Plan, split: Split) -> Part:
        """The host's blocks of a plan; of its frozen ones it has its own, which must be the trunk of this model."""
        part = complement(self.workload.spec, plan.part, frozen_to=split.depth)
        if split.method.trains_front:
            return part
        if (found := self._trunk.hashes.trunk(split.depth)) != split.trunk:
            raise OutOfSync(f"the trunk up to {split.depth!r} is {found} here, where the plan names {split.trunk}")
        return self._trunk.hashes.cached(part)
