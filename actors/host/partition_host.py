"""The PartitionHost: trains the blocks behind the cut for the devices that stream to it. A plain class, in process and on Ray.

A slot (``slot``) is one device's copy of these blocks. It exists from ``begin`` until ``end`` or ``drop``:

    begin ── take, take, ... ── end ── settle      training on a stream; with a frozen trunk the packets become a view
    record ── take, take, ... ── end               a view is uploaded again, without training
    replay ── settle                               training on a view, without the device
"""

import time
from collections.abc import Callable, Collection
from typing import TypeVar

import msgspec
import numpy as np
from torch import Tensor

from ...clusters.scratch import Scratch
from ...comms.codec import Array
from ...comms.packet import read_stamp
from ...learning.workload import Workload
from ...policies.plan import Plan
from ..messages.dense_packets import seal_update
from ..messages.host_messages import HostAnswer, ReplaySettings, StreamFault
from ..messages.plan_message import read_plan
from ..replay.buffer import ReplayBuffer, ViewGone
from ..replay.upload import ViewKey, view_key
from .slot import Slot, SlotMaker

T = TypeVar("T")


class PartitionHost:
    """Slots by plan. An error in one plan is raised to its device, is part of the plan's answer, and affects no other plan."""

    def __init__(
        self, workload: Workload, replay: ReplaySettings | None = None, scratch: Scratch | None = None
    ) -> None:
        """Loads nothing before the first plan. ``scratch``: where temporary files go."""
        self.workload, replay = workload, replay or ReplaySettings()
        self._replay = ReplayBuffer(memory_bytes=replay.memory_bytes, disk_bytes=replay.disk_bytes, scratch=scratch)
        self._slots: dict[int, Slot] = {}
        self._faults: dict[int, str] = {}  # by plan, why its slot does not exist
        self._failed: dict[int, Slot] = {}  # slots of streams that failed: the bytes that they received are reported
        self._complete: dict[int, tuple[ViewKey, int]] = {}  # by plan, an unsettled upload and its number of packets
        self._slot_maker = SlotMaker(self.workload)

    @property
    def num_slots(self) -> int:
        """Number of slots."""
        return len(self._slots)

    def begin(self, plan_bytes: bytes, num_samples: int, *packets: Array) -> None:
        """Make the slot of a plan from the packet of its blocks. ``num_samples``: of the device; the stream follows from it."""
        self._begin(plan_bytes, lambda plan: self._slot_maker.open(plan, num_samples, packets))

    def record(self, plan_bytes: bytes, num_samples: int) -> None:
        """Make the slot of a plan that uploads its view again, without training; ``end`` stores the view."""
        self._begin(plan_bytes, lambda plan: self._slot_maker.record(plan, num_samples))

    def take(self, plan_id: int, attempt: int, packet: Array) -> list[Array]:
        """Receive a packet of activations. One ahead of its order, within the window, is kept until those before it arrive.

        Returns the packets of the gradients that could be computed now, in order; none if the method returns no gradients. So
        the answers to packets 0, 1, ..., concatenated, are in the order of the stream. Raises ``StreamFault``, and drops the
        slot.
        """
        return self._in_slot(plan_id, attempt, lambda slot: self._process_in_order(slot, packet))

    def end(self, plan_id: int, attempt: int) -> tuple[bytes, Array | None]:
        """End a stream and free its slot: the encoded ``HostAnswer``, and the update of the host's blocks if the plan is done.

        An upload becomes a view when its plan is settled; a repeated upload does so at once.
        """
        return self._end(plan_id, attempt)

    def settle(self, plan_id: int, keep: bool, drop: Collection[ViewKey]) -> None:
        """End a plan for the run, whatever it was. ``keep``: whether its upload becomes a view; ``drop``: views to drop.

        The caller does not wait for the result, so an error becomes a notice in the next answer.
        """
        try:
            self._replay.drop(drop)
            self._settle(plan_id, keep=keep)
        except Exception as error:  # the view is uploaded again when a replay needs it
            self._replay.notices.append(
                f"the upload of plan {plan_id} could not be kept: {type(error).__name__}: {error}"
            )

    def replay(self, plan_bytes: bytes, num_samples: int, *packets: Array) -> tuple[bytes, Array | None]:
        """Carry out a plan that trains on a view, without its device; returns what ``end`` does."""
        plan, view_missing = read_plan(plan_bytes), False
        self.begin(plan_bytes, num_samples, *packets)
        try:
            self._train_on_view(self._slot(plan.id, plan.attempt))
        except Exception as error:  # as in _in_slot
            view_missing = isinstance(error, ViewGone)
            self._fail(plan.id, str(error) if view_missing else f"{type(error).__name__}: {error}")
        return self._end(plan.id, plan.attempt, view_missing=view_missing)

    def bodies(self, keys: Collection[ViewKey]) -> dict[ViewKey, Array]:
        """The packets of these views, as far as the host has them, each view as one array."""
        return self._replay.bodies(keys)

    def put(self, key: ViewKey, lengths: Array, body: Array) -> None:
        """Store a view's packets as returned by ``bodies``. ``lengths``: [packet] bytes."""
        self._replay.put(key, lengths, np.array(body))

    def close(self) -> None:
        """Remove the files."""
        self._replay.close()

    def drop(self, plan_id: int) -> None:
        """Free a plan's slot, if it has one."""
        self._fail(plan_id, "")
        del self._faults[plan_id]
        self._failed.pop(plan_id, None)

    def _begin(self, plan_bytes: bytes, make: Callable[[Plan], Slot]) -> None:
        plan = read_plan(plan_bytes)
        self.drop(plan.id)  # the slot of an earlier attempt may be left
        self._settle(plan.id, keep=False)
        try:
            self._slots[plan.id] = slot = make(plan)
            if slot.view is not None:
                self._replay.begin(slot.view)
        except Exception as error:  # of a packet or of the model: raised when the device sends
            self._faults[plan.id] = f"{type(error).__name__}: {error}"

    def _end(self, plan_id: int, attempt: int, *, view_missing: bool = False) -> tuple[bytes, Array | None]:
        """See ``end``. ``view_missing``: the host does not have the view to be replayed."""
        update: Array | None = None
        try:
            slot = self._slot(plan_id, attempt)
            may_stop = slot.plan.train_s is not None and slot.leg.steps and slot.leg.between_steps
            if slot.leg.next is not None and not may_stop:
                raise StreamFault(f"the stream ended after {len(slot.up_bytes)} packets; more were expected")
            if slot.view is not None:
                self._replay.check(slot.view, len(slot.up_bytes))
                self._complete[plan_id] = slot.view, len(slot.up_bytes)
                slot.view = None
            if slot.module is None:
                self._settle(plan_id, keep=True)
            else:
                update = seal_update(slot.module.state(), slot.base, slot.plan, submodel=slot.submodel, leg=1)
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
            failed = self._slots.get(plan_id) or self._failed.get(plan_id)
            answer = HostAnswer(error=text[:2000], gone=view_missing)
            if failed is not None and failed.plan.attempt == attempt:
                answer = msgspec.structs.replace(answer, up_bytes=failed.up_bytes, down_bytes=failed.down_bytes)
        self.drop(plan_id)
        notices, self._replay.notices = self._replay.notices, []
        return msgspec.msgpack.encode(msgspec.structs.replace(answer, notices=notices)), update

    def _settle(self, plan_id: int, *, keep: bool) -> None:
        """Make the complete upload of a plan a view, or drop it."""
        upload = self._complete.pop(plan_id, None)
        if upload is not None and keep:
            self._replay.commit(*upload)
        elif upload is not None:
            self._replay.abort(upload[0])

    def _fail(self, plan_id: int, why: str) -> None:
        """Free a plan's slot, and record why."""
        self._faults[plan_id] = why
        slot = self._slots.pop(plan_id, None)
        if slot is not None:
            if slot.view is not None:
                self._replay.abort(slot.view)
            self._slot_maker.free(slot)
            self._failed[plan_id] = slot

    def _in_slot(self, plan_id: int, attempt: int, work: Callable[[Slot], T]) -> T:
        """Apply ``work`` to a plan's slot; if it fails, free the slot and raise ``StreamFault``."""
        slot = self._slot(plan_id, attempt)
        started = time.perf_counter()
        try:
            result = work(slot)
        except Exception as error:  # of an invalid packet, the model or the loss
            self._fail(plan_id, f"{type(error).__name__}: {error}")
            raise StreamFault(self._faults[plan_id]) from error
        slot.train_s += time.perf_counter() - started
        return result

    def _slot(self, plan_id: int, attempt: int) -> Slot:
        slot = self._slots.get(plan_id)
        if slot is None or slot.plan.attempt != attempt:
            raise StreamFault(self._faults.get(plan_id) or f"attempt {attempt} of plan {plan_id} has no slot here")
        return slot

    def _process_in_order(self, slot: Slot, packet: Array) -> list[Array]:
        """Train on a packet if it is the next one, and on the early packets that follow it; returns their answers."""
        number, expected = read_stamp(packet).sequence, len(slot.up_bytes)
        window = slot.plan.split.window if slot.plan.split is not None else 1
        if not expected <= number < expected + window or number in slot.early:
            raise StreamFault(f"packet {number} was received where {expected} is next and the window is {window}")
        slot.early[number], answers = packet, []
        while (next_packet := slot.early.pop(len(slot.up_bytes), None)) is not None:
            number, gradient = self._train(slot, next_packet)
            if slot.view is not None:
                self._replay.add(slot.view, number, next_packet)
            slot.up_bytes.append(next_packet.nbytes)
            if slot.answers:
                answers.append(slot.stream.seal_gradient(number, gradient))
                slot.down_bytes.append(answers[-1].nbytes)
        return answers

    def _train_on_view(self, slot: Slot) -> None:
        """Train on all packets of the view that the slot's plan names."""
        split = slot.plan.split
        if split is None or split.view is None:
            raise StreamFault(f"plan {slot.plan.id} is to replay a view, and names none")
        for number, packet in enumerate(self._replay.read(view_key(slot.plan, split.view))):
            micro_batch = slot.leg.next
            if micro_batch is None:
                raise StreamFault(f"view {split.view} has more packets than a plan with these training settings takes")
            opened = slot.stream.open_activations(number, packet, micro_batch.samples, of_this_plan=False)
            slot.leg.micro_batch(*opened)

    def _train(self, slot: Slot, packet: Array) -> tuple[int, Tensor]:
        """Train on the next packet: its number, and the gradient of its activations."""
        micro_batch, number = slot.leg.next, len(slot.up_bytes)
        if micro_batch is None:
            raise StreamFault(f"packet {number} was received after the end of the stream")
        activations, targets = slot.stream.open_activations(number, packet, micro_batch.samples)
        return number, slot.leg.micro_batch(activations, targets)
