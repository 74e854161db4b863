"""ProFL in its costliest stage, for comparisons of methods before a run: what a device must afford to take part to the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from msgspec.structs import replace

from ...learning.parts.part import Part
from ..decision import Decision
from ..policy import NEEDS_PLANS, State
from ..view import View
from .profl import ProFL
from .stages import train_part


@dataclass(frozen=True, kw_only=True)
class CostliestStage:
    """Plans of one stage, whose part is given."""

    part: Part

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    writes: ClassVar[tuple[str, ...]] = ("part", "path")

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Replace the parts of the plans."""
        plans = tuple(replace(plan, part=self.part) for plan in decision.plans)
        return replace(decision, plans=plans, path=self.part), state


def costliest_stage(policy: ProFL, view: View) -> CostliestStage:
    """The stage of ``policy`` that needs the most memory, on this view."""
    plan = view.new_plan(0)
    names = plan.part.blocks
    groups = policy.groups(view, plan)
    parts = [train_part(groups, names[-1], stage) for stage in range(len(groups))]
    return CostliestStage(
        part=max(parts, key=lambda part: view.estimate(0, replace(plan, part=part)).peak_memory_bytes)
    )
