"""The PartitionHost: trains the blocks behind the cut for the devices that stream to it. A plain class, here and on Ray.

A slot is one device's copy of these blocks (SplitFed's first version). It exists from ``begin`` until ``end`` or ``drop``;
modules are kept for the slots after it, so a host has as many as ever streamed to it at once.
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
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan
from ..messages.dense_packets import seal_update
from ..messages.host_messages import HostAnswer, ReplaySettings, StreamFault
from ..messages.plan_message import read_plan
from ..replay.buffer import ReplayBuffer, ViewGone
from ..replay.upload import ViewKey, view_key
from .slot import Slot, SlotMaker

T = TypeVar("T")


class PartitionHost:
    """Slots by plan. What goes wrong with one plan is told to its device and in its answer, and harms no other."""

    def __init__(
        self, settings: WorkloadSettings, replay: ReplaySettings | None = None, scratch: Scratch | None = None
    ) -> None:
        """Nothing is loaded before the first plan. ``scratch``: for temporary files."""
        self.workload, replay = Workload(settings), replay or ReplaySettings()
        self._replay = ReplayBuffer(memory_bytes=replay.memory_bytes, disk_bytes=replay.disk_bytes, scratch=scratch)
        self._slots: dict[int, Slot] = {}
        self._faults: dict[int, str] = {}
        self._broken: dict[int, Slot] = {}  # whose streams broke off: what they took counts all the same
        self._sealed: dict[int, tuple[ViewKey, int]] = {}  # uploads that are complete, and packets, by plan
        self._makes = SlotMaker(self.workload)

    @property
    def num_slots(self) -> int:
        """Slots that exist now."""
        return len(self._slots)

    def begin(self, plan_bytes: bytes, num_samples: int, *packets: Array) -> None:
        """Make the slot of a plan from the packet of its blocks; ``num_samples`` of the device tell what will come."""
        self._begin(plan_bytes, lambda plan: self._makes.open(plan, num_samples, packets))

    def record(self, plan_bytes: bytes, num_samples: int) -> None:
        """Make the slot of a plan that uploads its view again; the view is here when that has ended, and nothing is trained."""
        self._begin(plan_bytes, lambda plan: self._makes.record(plan, num_samples))

    def take(self, plan_id: int, attempt: int, packet: Array) -> list[Array]:
        """One micro-batch of activations. One before its turn waits for those that are to come before it.

        The packets of the gradients that could be computed now, in order; none where nothing is answered. So the answers to
        packets 0, 1, ..., one list after another, are those of the stream in order. Raises ``StreamFault``; the slot is then
        gone.
        """
        return self._in_slot(plan_id, attempt, lambda slot: self._put_in_order(slot, packet))

    def end(self, plan_id: int, attempt: int) -> tuple[bytes, Array | None]:
        """The device has sent all: the answer, and the update of the host's blocks where all went well; the slot is freed.

        What it has uploaded is no view before the plan is settled, but for one that is uploaded again.
        """
        return self._end(plan_id, attempt)

    def settle(self, plan_id: int, keep: bool, drop: Collection[ViewKey]) -> None:
        """A plan is over for the run too, whatever it was: what it has uploaded is a view now, or forgotten.

        ``drop``: views that go. Nobody waits for this, so what fails is told with the next answer.
        """
        try:
            self._replay.drop(drop)
            self._settle(plan_id, keep=keep)
        except Exception as error:  # the view is uploaded again when it is wanted
            self._replay.notices.append(
                f"the upload of plan {plan_id} could not be kept: {type(error).__name__}: {error}"
            )

    def replay(self, plan_bytes: bytes, num_samples: int, *packets: Array) -> tuple[bytes, Array | None]:
        """A whole plan whose device has nothing to do: training on a view that it uploaded before; as ``end``."""
        plan, gone = read_plan(plan_bytes), False
        self.begin(plan_bytes, num_samples, *packets)
        try:
            self._train_again(self._slot(plan.id, plan.attempt))
        except Exception as error:  # as in _in_slot
            gone = isinstance(error, ViewGone)
            self._give_up(plan.id, str(error) if gone else f"{type(error).__name__}: {error}")
        return self._end(plan.id, plan.attempt, gone=gone)

    def bodies(self, keys: Collection[ViewKey]) -> dict[ViewKey, Array]:
        """The packets of those of the views that are here, each view as one array."""
        return self._replay.bodies(keys)

    def put(self, key: ViewKey, lengths: Array, body: Array) -> None:
        """A view's packets, as ``bodies`` gave them; ``lengths`` of each."""
        self._replay.put(key, lengths, np.array(body))

    def close(self) -> None:
        """Remove what is on disk."""
        self._replay.close()

    def drop(self, plan_id: int) -> None:
        """Free a plan's slot, if there is one."""
        self._give_up(plan_id, "")
        del self._faults[plan_id]
        self._broken.pop(plan_id, None)

    def _begin(self, plan_bytes: bytes, make: Callable[[Plan], Slot]) -> None:
        plan = read_plan(plan_bytes)
        self.drop(plan.id)  # an attempt before this one may have been left behind
        self._settle(plan.id, keep=False)
        try:
            self._slots[plan.id] = slot = make(plan)
            if slot.view is not None:
                self._replay.begin(slot.view)
        except Exception as error:  # a packet's, or the model's: this plan's fault, told when its device asks
            self._faults[plan.id] = f"{type(error).__name__}: {error}"

    def _end(self, plan_id: int, attempt: int, *, gone: bool = False) -> tuple[bytes, Array | None]:
        """See ``end``. ``gone``: the view that was to be replayed is not here."""
        update: Array | None = None
        try:
            slot = self._slot(plan_id, attempt)
            may_stop = slot.plan.train_s is not None and slot.leg.steps and slot.leg.between_steps
            if slot.leg.next is not None and not may_stop:
                raise StreamFault(f"the stream ended after {len(slot.up_bytes)} packets; more were to come")
            if slot.view is not None:
                self._replay.check(slot.view, len(slot.up_bytes))
                self._sealed[plan_id] = slot.view, len(slot.up_bytes)
                slot.view = None
            if slot.module is None:
                self._settle(plan_id, keep=True)
            else:
                update = seal_update(
                    slot.module.state(), slot.base, slot.plan, part=slot.part, spec=self.workload.spec, leg=1
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
            over = self._slots.get(plan_id) or self._broken.get(plan_id)
            took = (over.up_bytes, over.down_bytes) if over is not None and over.plan.attempt == attempt else ([], [])
            answer = HostAnswer(error=text[:2000], gone=gone, up_bytes=took[0], down_bytes=took[1])
        self.drop(plan_id)
        notices, self._replay.notices = self._replay.notices, []
        return msgspec.msgpack.encode(msgspec.structs.replace(answer, notices=notices)), update

    def _settle(self, plan_id: int, *, keep: bool) -> None:
        sealed = self._sealed.pop(plan_id, None)
        if sealed is not None and keep:
            self._replay.commit(*sealed)
        elif sealed is not None:
            self._replay.abort(sealed[0])

    def _give_up(self, plan_id: int, why: str) -> None:
        """A slot is over; its module is free for another."""
        self._faults[plan_id] = why
        slot = self._slots.pop(plan_id, None)
        if slot is not None:
            if slot.view is not None:  # the views that were there before stay
                self._replay.abort(slot.view)
            self._makes.free(slot)
            self._broken[plan_id] = slot

    def _in_slot(self, plan_id: int, attempt: int, work: Callable[[Slot], T]) -> T:
        """What ``work`` makes of the slot of a plan, which is gone where it fails. Raises ``StreamFault``."""
        slot = self._slot(plan_id, attempt)
        started = time.perf_counter()
        try:
            made = work(slot)
        except Exception as error:  # a packet that is not sound, or what the model or the loss raises
            self._give_up(plan_id, f"{type(error).__name__}: {error}")
            raise StreamFault(self._faults[plan_id]) from error
        slot.train_s += time.perf_counter() - started
        return made

    def _slot(self, plan_id: int, attempt: int) -> Slot:
        slot = self._slots.get(plan_id)
        if slot is None or slot.plan.attempt != attempt:
            raise StreamFault(self._faults.get(plan_id) or f"attempt {attempt} of plan {plan_id} has no slot here")
        return slot

    def _put_in_order(self, slot: Slot, packet: Array) -> list[Array]:
        """Train on what comes in its turn, and on those that have waited for it; their answers."""
        number, turn = read_stamp(packet).sequence, len(slot.up_bytes)
        window = slot.plan.split.window if slot.plan.split is not None else 1
        if not turn <= number < turn + window or number in slot.early:
            raise StreamFault(f"packet {number} came where {turn} is next and {window} may be under way")
        slot.early[number], answers = packet, []
        while (packet_now := slot.early.pop(len(slot.up_bytes), None)) is not None:
            number, gradient = self._train(slot, packet_now)
            if slot.view is not None:
                self._replay.add(slot.view, number, packet_now)
            slot.up_bytes.append(packet_now.nbytes)
            if slot.answers:
                answers.append(slot.stream.seal_gradient(number, gradient))
                slot.down_bytes.append(answers[-1].nbytes)
        return answers

    def _train_again(self, slot: Slot) -> None:
        """Train on the view that the slot's plan names."""
        split = slot.plan.split
        if split is None or split.view is None:
            raise StreamFault(f"plan {slot.plan.id} is to be trained again, and names no view")
        for number, packet in enumerate(self._replay.read(view_key(slot.plan, split.view))):
            coming = slot.leg.next
            if coming is None:
                raise StreamFault(f"view {split.view} holds more than a plan of this training takes")
            opened = slot.stream.open_activations(number, packet, coming.samples, of_this_plan=False)
            slot.leg.micro_batch(*opened)

    def _train(self, slot: Slot, packet: Array) -> tuple[int, Tensor]:
        """One micro-batch in its turn: its number, and the gradient of its activations."""
        coming, number = slot.leg.next, len(slot.up_bytes)
        if coming is None:
            raise StreamFault(f"packet {number} came after the end of the stream")
        activations, targets = slot.stream.open_activations(number, packet, coming.samples)
        return number, slot.leg.micro_batch(activations, targets)
