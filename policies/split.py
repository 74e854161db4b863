"""Split learning as a policy: each plan's model is cut, the device keeps the first blocks, a partition host takes the rest.

SplitFed, first version (Thapa et al., AAAI 2022, arXiv 2004.12088). Acts on the plans of the policies before it in a chain.
"""

from dataclasses import dataclass
from typing import ClassVar

from msgspec.structs import replace

from ..learning.part import Part
from .decision import Decision
from .fields import check_fields
from .plan import Plan, Split
from .policy import State
from .view import View


@dataclass(frozen=True)
class SplitFed:
    """The same cut for all devices: behind block ``cut`` of the model ("" for its first)."""

    cut: str = ""

    needs_plans: ClassVar[bool] = True
    needs_kinds: ClassVar[tuple[str, ...]] = ("activations", "labels", "weights")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Where it cuts, so that a cut that is not clean is found before the run."""
        return (self.cut,) if self.cut else ()

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Cut the plans."""
        return replace(decision, plans=tuple(self._cut(plan, view.hosts) for plan in decision.plans)), state

    def _cut(self, plan: Plan, hosts: int) -> Plan:
        """One plan, cut."""
        names = plan.part.blocks
        cut = self.cut or names[0]
        if cut not in names[:-1]:
            raise ValueError(
                f"cut is {self.cut!r}; this model can be cut behind: {', '.join(names[:-1]) or 'no block'}"
            )
        front = names[: names.index(cut) + 1]
        return plan.with_(
            f"splitfed: cut behind {cut}",
            part=Part(blocks=front, trained=front),
            split=Split(cut=cut, host=plan.device % hosts),
        )
