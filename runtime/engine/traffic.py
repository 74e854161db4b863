"""The bytes of plans, counted where they travel: in the ledger, and as what the next packets of their kind will be.

What goes down to a device is entered when its plan ends: a packet that breaks off counts for what had travelled. Until then
it is under way, and totals count all of it. So, under the virtual clock, the ledger is the sum of the figures in the plans'
reports (``virtual.up_bytes``, ``virtual.down_bytes``), but for control messages, evaluation, and what hosts are sent and send.
"""

from typing import ClassVar

from ...actors.messages.messages import Dispatch
from ...comms.codec import NumBytes
from ...comms.ledger import Direction, Ledger
from ...policies.plan import Plan
from ...policies.report import Outcome
from ..simulation.costs import Costs
from ..simulation.in_flight import Arrival

_APART = ("evaluation", "host")


class TrafficRecorder:
    """Records packets in a ledger and tells the costs of their sizes; both belong to the loop, which saves them."""

    SAVED: ClassVar = {"_under_way": dict[int, tuple[tuple[str, NumBytes], ...]]}  # by a checkpoint
    NOT_SAVED = ("_ledger", "_costs")

    def __init__(self, ledger: Ledger, costs: Costs) -> None:
        """As they are."""
        self._ledger, self._costs = ledger, costs
        self._under_way: dict[int, tuple[tuple[str, int], ...]] = {}  # by plan: kind and bytes of its packets down

    def total(self, direction: Direction) -> int:
        """Bytes of training in a direction, to or from devices.

        Evaluation is an instrument, and server and hosts are in one place: both are counted apart.
        """
        entered = self._ledger.total(direction) - sum(self._ledger.total(direction, kind=kind) for kind in _APART)
        under_way = (size for packets in self._under_way.values() for _, size in packets) if direction == "down" else ()
        return entered + sum(under_way)

    @property
    def evaluation(self) -> int:
        """Bytes of evaluation on devices, both ways."""
        return self._ledger.total(kind="evaluation")

    @property
    def hosts(self) -> int:
        """Bytes between the server and the partition hosts, both ways."""
        return self._ledger.total(kind="host")

    @property
    def both(self) -> int:
        """Bytes of training, up and down."""
        return self.total("up") + self.total("down")

    def sent(self, sent: Dispatch, *, control: int) -> None:
        """A plan went out, in ``control`` bytes beside its packets."""
        plan = sent.plan
        self._under_way[plan.id] = tuple((message.kind, message.num_bytes) for message in sent.messages)
        for message in sent.host_messages:
            self._ledger.record("down", kind="host", device=plan.device, num_bytes=message.num_bytes)
        if sent.messages and sent.messages[-1].kind == "weights":
            self._costs.observe(plan, "down", sent.messages[-1].num_bytes)
        if not plan.replays:  # of a replay the device hears nothing
            self._ledger.record("down", kind="control", device=plan.device, num_bytes=control)

    def came(self, plan: Plan, arrival: Arrival | None) -> None:
        """A plan has ended: its report, its stream, and its packets, or what of them had travelled when it was lost.

        ``arrival``: None where nothing came back, and what had travelled is not known.
        """
        self._came_down(plan, arrival.down_bytes if arrival is not None else None)
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

    def _came_down(self, plan: Plan, num_bytes: int | None) -> None:
        """So many bytes of a plan's packets are there, in their order; None: all."""
        for kind, size in self._under_way.pop(plan.id):
            travelled = size if num_bytes is None else min(size, num_bytes)
            if num_bytes is not None:
                num_bytes -= travelled
            if travelled or not size:
                self._ledger.record("down", kind=kind, device=plan.device, num_bytes=travelled)
