"""AllSmall: one narrow model for all devices, which the one with the least memory can hold.

The baseline of ProFL and HeteroFL: the channels of the model are scaled so that every device takes part, and no device trains
more than the weakest one can.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from msgspec.structs import replace

from ...learning.spec import Count
from ..checks.fields import check_fields
from ..decision import Decision
from ..estimate import Estimate
from ..plan import Plan
from ..policy import NEEDS_PLANS, State
from ..selection.candidates import memory_misfit
from ..view import View
from .capacity import NARROWEST, NarrowCosts, widest

_BEHIND = {
    "split": "which sets the width of both sides of a cut; allowed: the other order",
    "part": "which sets the width of all parts; allowed: one policy that sets widths, behind the others",
}


@dataclass(frozen=True, kw_only=True)
class AllSmall:
    """The widest model whose training fits the memory of every device of the fleet, on all devices.

    It is chosen at the first decision, by the declared memory, and kept: devices that later turn out to have less are left out.
    A device whose memory not even the narrowest model fits is left out, and the others' width does not depend on it.
    Of each group of channels the first ones are held, ``min_channels`` at least.
    """

    min_channels: Count = 2

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    forbids_behind: ClassVar[Mapping[str, str]] = _BEHIND
    fits_plans: ClassVar[bool] = True
    writes: ClassVar[tuple[str, ...]] = ("part.width",)

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)

    def init(self) -> State:
        """The width, once it is chosen."""
        return {"width": None}

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Narrow the plans."""
        if not decision.plans:
            return decision, state
        costs = NarrowCosts(view, self._narrow)
        if state["width"] is None:
            state = {"width": self._choose(view, costs)}
        width = state["width"]
        plans, left_out = [], list(decision.left_out)
        for plan in decision.plans:
            if plan.replays or plan.objective.kind == "evaluate":
                plans.append(plan)
                continue
            needed = costs.of(plan)(width).peak_memory_bytes
            if misfit := memory_misfit(view, plan.device, needed):
                left_out.append((plan.device, misfit))
                continue
            plans.append(self._narrow(plan, width).with_(f"all_small: {width:.3g} of the channels"))
        return replace(decision, plans=tuple(plans), left_out=tuple(left_out)), state

    def _choose(self, view: View, costs: NarrowCosts) -> float:
        """The widest model that fits all devices which the narrowest fits."""
        by_memory = {view.profiles[device].memory_bytes: device for device in view.devices}
        for memory in sorted(by_memory):
            cost = costs.of(view.new_plan(by_memory[memory]))
            if (found := widest(partial(_load, cost, memory))) is not None:
                return found
        return NARROWEST

    def _narrow(self, plan: Plan, width: float) -> Plan:
        """A plan at a width; 1 changes nothing."""
        if width == 1:
            return plan
        return replace(plan, part=replace(plan.part, width=width, min_channels=self.min_channels))


def _load(cost: Callable[[float], Estimate], memory: int, width: float) -> float:
    """The memory of a width as a share of a device's."""
    return cost(width).peak_memory_bytes / memory
