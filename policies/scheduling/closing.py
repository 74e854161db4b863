"""Closes versions while plans are still in flight: after a number of updates, or after a time. It chooses no devices.

Over-selection (Bonawitz et al., "Towards federated learning at scale: system design", MLSys 2019, arXiv 1902.01046: about
130 % of the devices that a round needs): a selection before this policy chooses more devices than are needed, and the version
closes at ``at`` updates. Later updates are late, and not folded unless ``server.staleness`` gives them a weight.

The deadline may also apply on the devices (``partial``): each stops training early and sends its update so far, which counts in
proportion to the steps done. Where we depart from Bonawitz et al.: a late device is not aborted, but completes its plan and is
in flight until then.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from msgspec.structs import replace

from ...learning.spec import Positive
from ..checks.fields import Cohort, check_cohort, check_fields
from ..decision import Decision
from ..plan import Plan
from ..policy import NEEDS_PLANS, State
from ..view import View

ONE_NUMBER = {"close_at": "which sets it too; allowed: one of the two"}
_ALL_PLANS = {
    "keep_open": "which closes at a share of the plans of a version, all of which it must see at once; "
    "allowed: a number of updates, or the other order"
}


@dataclass(frozen=True)
class Closing:
    """``at``: updates that close the version, or a share of the plans, rounded up. ``after_s``: seconds until it closes.

    ``partial``: devices stop early, so that their updates arrive after ``after_s``; except devices that upload views
    (``ecofed``), since a view is used only when it is complete. Behind ``asynchronous``, which sets the number of updates that
    closes a version, the seconds count for each plan separately.
    """

    at: Cohort | None = None
    after_s: Positive | None = None
    partial: bool = False

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS

    @property
    def writes(self) -> tuple[str, ...]:
        """The fields for which it has a value."""
        is_set = {
            "close_at": self.at is not None,
            "close_after_s": self.after_s is not None,
            "deadline_s": self.partial,
        }
        return tuple(field for field, value in is_set.items() if value)

    @property
    def forbids_before(self) -> Mapping[str, str]:
        """No other number of updates; and for a share, no plans that are yet to come."""
        if self.at is None:
            return {}
        return ONE_NUMBER | _ALL_PLANS if isinstance(self.at, float) else ONE_NUMBER

    @property
    def forbids_behind(self) -> Mapping[str, str]:
        """No other number of updates."""
        return {} if self.at is None else ONE_NUMBER

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        if self.at is not None:
            check_cohort("at", self.at)
        if self.at is None and self.after_s is None:
            raise ValueError("at and after_s are both null; at least one of them must be set")
        if self.partial and self.after_s is None:
            raise ValueError("partial is true and after_s is null; devices stop early only where there is a deadline")

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Set when the version closes, with its first plans only: a share is one of all plans of the round."""
        if not decision.plans:
            return decision, state
        plans = tuple(self._in_time(plan) for plan in decision.plans)
        if view.dispatched:
            return replace(decision, plans=plans), state
        at = self.at if not isinstance(self.at, float) else math.ceil(self.at * len(plans) - 1e-9)
        return (
            replace(
                decision,
                plans=plans,
                close_at=at if at is not None else decision.close_at,
                close_after_s=self.after_s if self.after_s is not None else decision.close_after_s,
            ),
            state,
        )

    def _in_time(self, plan: Plan) -> Plan:
        """The plan with the deadline at which its device stops early, where it may."""
        if not self.partial or not plan.trains_on_device or plan.objective.kind not in ("train", "imitate"):
            return plan
        return plan.with_(f"closing: stops after {self.after_s:g} s", deadline_s=self.after_s)
