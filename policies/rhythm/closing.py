"""When a version closes though devices are still at work: at enough updates, or after some seconds. It chooses nobody.

Over-selection (Bonawitz et al., "Towards federated learning at scale: system design", MLSys 2019, arXiv 1902.01046: about
130 % of the devices that a round needs): a selection before this one chooses more devices than are needed, and the version
closes ``at`` so many updates. Whoever comes later is late: not folded, unless ``server.staleness`` says what it is worth.

A deadline may also be told to the devices (``partial``): each stops training early and sends what it has, which counts in
proportion to the steps made. Where we depart from Bonawitz et al.: who is late is not called off, but goes on and is busy until
then.
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
    """``at``: updates that close the version, or their share of the plans before it, rounded up. ``after_s``: seconds.

    ``partial``: devices stop early, so that their updates are there after ``after_s``; all but those that upload views
    (``ecofed``), which are sent whole or not at all. Behind ``asynchronous``, which says itself at how many updates a version
    closes, the seconds count for each plan by itself.
    """

    at: Cohort | None = None
    after_s: Positive | None = None
    partial: bool = False

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS

    @property
    def writes(self) -> tuple[str, ...]:
        """What its fields ask for."""
        wanted = {
            "close_at": self.at is not None,
            "close_after_s": self.after_s is not None,
            "deadline_s": self.partial,
        }
        return tuple(field for field, is_set in wanted.items() if is_set)

    @property
    def forbids_before(self) -> Mapping[str, str]:
        """A share is of the plans that there are at the start of a version."""
        if self.at is None:
            return {}
        return ONE_NUMBER | _ALL_PLANS if isinstance(self.at, float) else ONE_NUMBER

    @property
    def forbids_behind(self) -> Mapping[str, str]:
        """One policy says at how many updates a version closes."""
        return {} if self.at is None else ONE_NUMBER

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        if self.at is not None:
            check_cohort("at", self.at)
        if self.at is None and self.after_s is None:
            raise ValueError("at and after_s are both null; at least one of them must say when a version closes")
        if self.partial and self.after_s is None:
            raise ValueError("partial is true without after_s; devices must know when to stop")

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Say when; with the first plans of a version, since later ones of the same round would be counted anew."""
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
        """A plan whose device stops early."""
        if not self.partial or not plan.trains_on_device or plan.objective.kind != "train":
            return plan
        return plan.with_(f"closing: stops after {self.after_s:g} s", deadline_s=self.after_s)
