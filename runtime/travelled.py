"""The bytes of plans, counted where they travel: in the ledger, and as what the next packets of their kind will be."""

from ..actors.messages import Dispatch
from ..comms.ledger import Direction, Ledger
from ..policies.plan import Plan
from ..policies.report import Outcome
from .costs import Costs
from .journey import Arrival

_APART = ("evaluation", "host")


class Travelled:
    """Records packets in a ledger and tells the costs of their sizes; both are their owner's, who saves them."""

    def __init__(self, ledger: Ledger, costs: Costs) -> None:
        """As they are."""
        self._ledger, self._costs = ledger, costs

    def total(self, direction: Direction) -> int:
        """Bytes of training in a direction, to or from devices.

        Evaluation is an instrument, and server and hosts are in one place: both are counted apart.
        """
        return self._ledger.total(direction) - sum(self._ledger.total(direction, kind=kind) for kind in _APART)

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
        for message in sent.messages:
            self._ledger.record("down", kind=message.kind, device=plan.device, num_bytes=message.num_bytes)
        for message in sent.host_messages:
            self._ledger.record("down", kind="host", device=plan.device, num_bytes=message.num_bytes)
        if sent.messages and sent.messages[-1].kind == "weights":
            self._costs.observe(plan, "down", sent.messages[-1].num_bytes)
        if plan.split is None or plan.split.view is None:  # of a replay the device hears nothing
            self._ledger.record("down", kind="control", device=plan.device, num_bytes=control)

    def came(self, plan: Plan, arrival: Arrival) -> None:
        """A plan has ended: its report, its stream, and its update or what of that had travelled when it was lost."""
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
