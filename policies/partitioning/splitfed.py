"""Split learning as a policy: the model is cut, the device trains the first blocks and a partition host trains the rest.

SplitFed (Thapa et al., AAAI 2022, arXiv 2004.12088): its first version, or with a shared head its second. It changes the plans
of the policies before it in a chain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from msgspec.structs import replace

from ...learning.spec import Count, Training
from ..checks.fields import check_fields
from ..decision import Decision
from ..plan import Plan, Split
from ..policy import NEEDS_PLANS, State
from ..view import View
from .cuts import AUTO, ONE_CUT, WHOLE_GRADIENT, allowed_cuts, choose_cuts
from .shared_head import in_turn

_IN_TURN = {"deadline_s": "which sends the plans of a round one after another; allowed: one of the two"}
_ONE_WIDTH = {
    "part.width": "whose devices train one copy of a host's blocks, which has one width; allowed: head: slots, or one of the "
    "two"
}
_ONE_TURN = {
    "plans": "which sends plans one after another, so that only those of one turn could be chosen from; "
    "allowed: a selection before it"
}


@dataclass(frozen=True)
class SplitFed:
    """A cut behind block ``cut`` of the model ("": the shallowest allowed one), or "auto": for each device the fastest.

    ``first``: last block of the shallowest cut allowed ("": the model's first block). ``whole``: a device that is estimated
    to be faster with the whole model, and has the memory, keeps it ("auto" only). ``head``: every device has a copy of the
    host's blocks to itself (``slots``), or all devices of a host train one copy, one device after another in an order drawn
    from the seed (``shared``). ``window``: micro-batches that a device may have sent without having processed their gradients;
    with more than 1 gradients are late, and the model differs from FedAvg's.
    """

    cut: str = ""
    first: str = ""
    whole: bool = False
    head: Literal["slots", "shared"] = "slots"
    window: Count = 1

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    forbids_settings: ClassVar[Mapping[str, str]] = WHOLE_GRADIENT
    fits_plans: ClassVar[bool] = True
    needs_kinds: ClassVar[tuple[str, ...]] = ("activations", "labels", "weights")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        if self.whole and self.cut != AUTO:
            raise ValueError(f"whole is true and cut is {self.cut!r}; models stay whole only where cut is {AUTO!r}")

    @property
    def cuts(self) -> tuple[str, ...]:
        """Blocks behind which it may cut, checked against the model before the run."""
        return tuple(name for name in (self.first, self.cut) if name and name != AUTO)

    @property
    def writes(self) -> tuple[str, ...]:
        """With a shared head also ``keep_open``: the version stays open for the plans that wait for their turn."""
        return ("part", "split", "keep_open") if self.head == "shared" else ("part", "split")

    @property
    def forbids_before(self) -> Mapping[str, str]:
        """With a shared head no widths, and no deadline for devices: their plans are sent one after another in a round."""
        return ONE_CUT if self.head == "slots" else ONE_CUT | _IN_TURN | _ONE_WIDTH

    @property
    def forbids_behind(self) -> Mapping[str, str]:
        """With a shared head also no selection: it would receive the plans of one turn only."""
        return ONE_CUT if self.head == "slots" else ONE_CUT | _IN_TURN | _ONE_WIDTH | _ONE_TURN

    def notices(self, training: Training) -> tuple[str, ...]:
        """A notice about late gradients, where ``window`` is more than 1."""
        if self.window == 1:
            return ()
        late = f"{self.window - 1} micro-batch{'es' if self.window > 2 else ''}"
        return (
            f"splitfed has window {self.window}: gradients come up to {late} late, and the model is not that of FedAvg",
        )

    def init(self) -> State:
        """No plan waits for its turn."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Cut the plans; of those that share the blocks of a host, only the next one is sent."""
        decision = choose_cuts(view, decision, lambda plan: self._alternatives(plan, view.hosts))
        return (decision, state) if self.head == "slots" else in_turn(view, state, decision)

    def _alternatives(self, plan: Plan, hosts: int) -> list[Plan]:
        """The plans that a device may get: one for each cut, and with ``whole`` that of the whole model."""
        plans = [self._cut(plan, cut, hosts) for cut in allowed_cuts(plan.part.blocks, self.cut, first=self.first)]
        return [*plans, plan.with_("splitfed: whole")] if self.whole else plans

    def _cut(self, plan: Plan, cut: str, hosts: int) -> Plan:
        """One plan, cut."""
        names = plan.part.blocks
        front = names[: names.index(cut) + 1]
        return plan.with_(
            f"splitfed: cut behind {cut}",
            part=replace(plan.part, blocks=front, trained=front),
            split=Split(cut=cut, host=plan.device % hosts, head=self.head, window=self.window),
        )
