"""Records the bytes of plans: in the ledger, and in the costs, which estimate the next packets of the same kind by them.

Packets down to a device enter the ledger when their plan ends, since of an aborted transfer only the bytes that were
transferred count. Until then totals include all of their bytes. So, under the virtual clock, the ledger is the sum of the
figures in the plans' reports (``virtual.up_bytes``, ``virtual.down_bytes``), apart from control messages, evaluation, and
packets between the server and the partition hosts.
"""

from typing import ClassVar

from ...actors.messages.messages import Dispatch
from ...comms.codec import NumBytes
from ...comms.ledger import Direction, Ledger
from ...policies.plan import Plan
from ...policies.report import Outcome
from ..simulation.costs import Costs
from ..simulation.in_flight import Arrival

TASK_KINDS = ("public", "teacher", "student", "logits")  # between the server and the actor of its task
_SEPARATE = ("evaluation", "host", *TASK_KINDS)


class TrafficRecorder:
    """Records packets in a ledger, and their sizes in the costs. Both belong to the loop, which saves them."""

    SAVED: ClassVar = {"_down_packets": dict[int, tuple[tuple[str, NumBytes], ...]]}  # in a checkpoint
    NOT_SAVED = ("_ledger", "_costs")

    def __init__(self, ledger: Ledger, costs: Costs) -> None:
        """No plan is in flight."""
        self._ledger, self._costs = ledger, costs
        # Of the plans in flight, by id: kind and bytes of each packet to the device, in order.
        self._down_packets: dict[int, tuple[tuple[str, int], ...]] = {}

    def total(self, direction: Direction) -> int:
        """Bytes of training in one direction, to or from devices.

        Evaluation is an instrument, and the server and the hosts are in one place: both are counted separately.
        """
        recorded = self._ledger.total(direction) - sum(self._ledger.total(direction, kind=kind) for kind in _SEPARATE)
        in_flight = (
            (size for packets in self._down_packets.values() for _, size in packets) if direction == "down" else ()
        )
        return recorded + sum(in_flight)

    @property
    def evaluation_bytes(self) -> int:
        """Bytes of evaluation on devices, in both directions."""
        return self._ledger.total(kind="evaluation")

    @property
    def host_bytes(self) -> int:
        """Bytes between the server and the partition hosts, in both directions."""
        return self._ledger.total(kind="host")

    @property
    def task_bytes(self) -> int:
        """Bytes between the server and the actor of its task, in both directions, the public set among them."""
        return sum(self._ledger.total(kind=kind) for kind in TASK_KINDS)

    @property
    def training_bytes(self) -> int:
        """Bytes of training, up and down."""
        return self.total("up") + self.total("down")

    def sent(self, sent: Dispatch, *, control: int) -> None:
        """Record a plan that was dispatched. ``control``: bytes of its plan message, which its packets do not include."""
        plan = sent.plan
        self._down_packets[plan.id] = tuple((message.kind, message.num_bytes) for message in sent.messages)
        for message in sent.host_messages:
            self._ledger.record("down", kind="host", device=plan.device, num_bytes=message.num_bytes)
        if sent.messages and sent.messages[-1].kind == "weights" and sent.messages[-1].typical:
            self._costs.observe(plan, "down", sent.messages[-1].num_bytes)
        if not plan.replays:  # a replay sends nothing to the device
            self._ledger.record("down", kind="control", device=plan.device, num_bytes=control)

    def ended(self, plan: Plan, arrival: Arrival | None) -> None:
        """Record the end of a plan: its report, its stream, and its packets, or the part of them transferred before its loss.

        ``arrival``: None if there is no result and it is not known what was transferred.
        """
        self._record_down(plan, arrival.down_bytes if arrival is not None else None)
        if arrival is None:
            return
        finished, device = arrival.finished, plan.device
        self._ledger.record("up", kind="control", device=device, num_bytes=finished.control_bytes)
        for size in finished.stream.up:
            self._ledger.record("up", kind="activations", device=device, num_bytes=size)
        for size in finished.stream.down:
            self._ledger.record("down", kind="gradients", device=device, num_bytes=size)
        if finished.report.outcome != Outcome.LOST:
            self._costs.observe_stream(plan, finished.stream.up, finished.stream.down)
        if arrival.lost_up_bytes:
            self._ledger.record("up", kind="weights", device=device, num_bytes=arrival.lost_up_bytes)
        if finished.host_update is not None:
            self._ledger.record("up", kind="host", device=device, num_bytes=finished.host_update.nbytes)
        if finished.update is not None:
            self._ledger.record("up", kind="weights", device=device, num_bytes=finished.update.nbytes)
            self._costs.observe(plan, "up", finished.update.nbytes)

    def _record_down(self, plan: Plan, num_bytes: int | None) -> None:
        """Record the first ``num_bytes`` of a plan's packets to its device, in order; None: all of them."""
        for kind, size in self._down_packets.pop(plan.id):
            transferred = size if num_bytes is None else min(size, num_bytes)
            if num_bytes is not None:
                num_bytes -= transferred
            if transferred or not size:
                self._ledger.record("down", kind=kind, device=plan.device, num_bytes=transferred)
