"""The PartitionHost: trains the blocks behind the cut for the devices that stream to it. A plain class, here and on Ray.

A slot is one device's copy of these blocks (SplitFed's first version). It exists from ``begin`` until ``end`` or ``drop``;
modules are kept for the slots after it, so a host has as many as ever streamed to it at once.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from torch import Tensor

from ..comms.codecs import Array
from ..comms.errors import OutOfSync
from ..comms.make_codec import make_codec
from ..comms.packet import read_stamp, unseal
from ..comms.receive import context_for
from ..learning.losses import make_loss
from ..learning.part import Part, down_tensors, rest
from ..learning.split import HostLeg
from ..learning.tensors import as_tensors
from ..learning.workload import Workload, WorkloadSettings
from ..policies.plan import Plan
from .messages import array_specs, weights_stamp
from .module import Module
from .plan_message import read_plan
from .stream import Stream, StreamFault
from .trunk import Trunk
from .update import seal_update


class HostAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the host's leg of a split plan came to.

    ``steps``, ``loss``, ``loss_square``: as in a report. ``up_bytes``, ``down_bytes``: of each packet of the stream, in order.
    ``error``: why it did not end well. ``train_s``: wall seconds of computing.
    """

    steps: int = 0
    loss: float | None = None
    loss_square: float | None = None
    up_bytes: list[int] = []
    down_bytes: list[int] = []
    train_s: float = 0.0
    error: str = ""


@dataclass
class _Slot:
    """One device's copy of the host's blocks."""

    plan: Plan
    part: Part
    module: Module
    base: dict[str, Tensor]
    stream: Stream
    leg: HostLeg
    up_bytes: list[int] = field(default_factory=list)
    down_bytes: list[int] = field(default_factory=list)
    train_s: float = 0.0
    early: dict[int, Array] = field(default_factory=dict)  # packets that came before their turn


class PartitionHost:
    """Slots by plan. What goes wrong with one plan is told to its device and in its answer, and harms no other."""

    def __init__(self, settings: WorkloadSettings) -> None:
        """Nothing is loaded before the first plan."""
        self.workload = Workload(settings)
        self._slots: dict[int, _Slot] = {}
        self._faults: dict[int, str] = {}
        self._free: dict[bool, list[Module]] = {}
        self._trunk = Trunk(self.workload)

    @property
    def num_slots(self) -> int:
        """Slots that exist now."""
        return len(self._slots)

    def begin(self, plan_bytes: bytes, num_samples: int, *packets: Array) -> None:
        """Make the slot of a plan from the packet of its blocks; ``num_samples`` of the device tell what will come."""
        plan = read_plan(plan_bytes)
        self.drop(plan.id)  # an attempt before this one may have been left behind
        try:
            self._slots[plan.id] = self._open(plan, num_samples, packets)
        except Exception as error:  # a packet's, or the model's: this plan's fault, told when its device asks
            self._faults[plan.id] = f"{type(error).__name__}: {error}"

    def exchange(self, plan_id: int, attempt: int, packet: Array) -> Array:
        """One micro-batch of activations; the packet of its gradient. Raises ``StreamFault``; the slot is then gone."""
        slot = self._slot(plan_id, attempt)
        started = time.perf_counter()
        try:
            answer = self._step(slot, packet)
        except Exception as error:  # a packet that is not sound, or what the model or the loss raises
            self._give_up(plan_id, f"{type(error).__name__}: {error}")
            raise StreamFault(self._faults[plan_id]) from error
        slot.train_s += time.perf_counter() - started
        return answer

    def take(self, plan_id: int, attempt: int, packet: Array) -> None:
        """One micro-batch of activations that nothing answers. Those before their turn wait. Raises ``StreamFault``."""
        slot = self._slot(plan_id, attempt)
        started = time.perf_counter()
        try:
            self._put_in_order(slot, packet)
        except Exception as error:  # as in exchange
            self._give_up(plan_id, f"{type(error).__name__}: {error}")
            raise StreamFault(self._faults[plan_id]) from error
        slot.train_s += time.perf_counter() - started

    def end(self, plan_id: int, attempt: int) -> tuple[bytes, Array | None]:
        """The device has sent all: the answer, and the update of the host's blocks where all went well; the slot is freed."""
        update: Array | None = None
        try:
            slot = self._slot(plan_id, attempt)
            if slot.leg.next is not None:
                raise StreamFault(f"the stream ended after {len(slot.up_bytes)} packets; more were to come")
            update = seal_update(
                slot.module.model, slot.base, slot.plan, part=slot.part, spec=self.workload.spec, leg=1
            )
            answer = HostAnswer(
                steps=slot.leg.steps,
                loss=slot.leg.loss,
                loss_square=slot.leg.loss_square,
                up_bytes=slot.up_bytes,
                down_bytes=slot.down_bytes,
                train_s=slot.train_s,
            )
        except Exception as error:
            text = str(error) if isinstance(error, StreamFault) else f"{type(error).__name__}: {error}"
            answer = HostAnswer(error=text[:2000])
        self.drop(plan_id)
        return msgspec.msgpack.encode(answer), update

    def drop(self, plan_id: int) -> None:
        """Free a plan's slot, if there is one."""
        self._give_up(plan_id, "")
        del self._faults[plan_id]

    def _give_up(self, plan_id: int, why: str) -> None:
        """A slot is over; its module is free for another."""
        self._faults[plan_id] = why
        slot = self._slots.pop(plan_id, None)
        if slot is not None:
            slot.leg.close()
            self._free.setdefault(slot.plan.training.channels_last, []).append(slot.module)

    def _slot(self, plan_id: int, attempt: int) -> _Slot:
        slot = self._slots.get(plan_id)
        if slot is None or slot.plan.attempt != attempt:
            raise StreamFault(self._faults.get(plan_id) or f"attempt {attempt} of plan {plan_id} has no slot here")
        return slot

    def _open(self, plan: Plan, num_samples: int, packets: Sequence[Array]) -> _Slot:
        """A slot at its start."""
        assert plan.split is not None
        part = self._part(plan)
        expected = array_specs(down_tensors(self.workload.spec, part))
        (packet,) = packets
        arrays = unseal(
            packet,
            codec=make_codec(plan.codec_down),
            expected=expected,
            context=context_for(expected, seed=plan.version),
            stamp=weights_stamp(plan.version),
        )
        base, channels_last = as_tensors(arrays) | self._trunk.tensors(part), plan.training.channels_last
        free = self._free.setdefault(channels_last, [])
        module = free.pop() if free else Module(self.workload, channels_last=channels_last)
        module.load(base)
        stream = Stream(plan, self.workload)
        leg = HostLeg(
            module.blocks,
            plan.part.blocks,
            training=plan.training,
            loss=make_loss(plan.training.loss),
            seed=plan.seed,
            num_samples=num_samples,
            crossing=stream.crossing,
            frozen=tuple(name for name in part.blocks if name not in part.trained),
            answers=plan.split.mode == "splitfed",
        )
        return _Slot(plan, part, module, base, stream, leg)

    def _put_in_order(self, slot: _Slot, packet: Array) -> None:
        """Train on what comes in its turn, and on those that have waited for it."""
        number, turn = read_stamp(packet).sequence, len(slot.up_bytes)
        window = slot.plan.split.window if slot.plan.split is not None else 1
        if not turn <= number < turn + window or number in slot.early:
            raise StreamFault(f"packet {number} came where {turn} is next and {window} may be under way")
        slot.early[number] = packet
        while (packet_now := slot.early.pop(len(slot.up_bytes), None)) is not None:
            self._train(slot, packet_now)
            slot.up_bytes.append(packet_now.nbytes)

    def _train(self, slot: _Slot, packet: Array) -> tuple[int, Tensor]:
        """One micro-batch in its turn: its number, and the gradient of its activations."""
        coming, number = slot.leg.next, len(slot.up_bytes)
        if coming is None:
            raise StreamFault(f"packet {number} came after the end of the stream")
        activations, targets = slot.stream.open_activations(number, packet, coming.samples)
        return number, slot.leg.micro_batch(activations, targets)

    def _part(self, plan: Plan) -> Part:
        """The host's blocks of a plan; of its frozen ones it has its own, which must be the trunk of this model."""
        assert plan.split is not None
        part = rest(self.workload.spec, plan.part, frozen_to=plan.split.depth)
        if plan.split.mode != "ecofed":
            return part
        if (found := self._trunk.key(plan.split.depth)) != plan.split.trunk:
            raise OutOfSync(
                f"the trunk up to {plan.split.depth!r} is {found} here, where the plan names {plan.split.trunk}"
            )
        return self._trunk.named(part)

    def _step(self, slot: _Slot, packet: Array) -> Array:
        """Open, train, answer."""
        number, gradient = self._train(slot, packet)
        answer = slot.stream.seal_gradient(number, gradient)
        slot.up_bytes.append(packet.nbytes)
        slot.down_bytes.append(answer.nbytes)
        return answer
