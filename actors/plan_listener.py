"""The life of a plan, and what listens to it.

    checked ── sent ──┬── arrived ── ended       its result is there; then it is folded or not, and the plan is over
                      └──────────── released     no result is wanted any more: the plan is lost, or the run is over

Each part of the server that remembers something of plans in flight (links with memory, shared heads, the replay index) is a
``PlanListener``. The loop calls the one ``PlanLifecycle`` and knows none of them, so a method that must remember something adds
a listener to it. Every plan that was sent ends or is released, exactly once.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..comms.links.link import State
from ..policies.plan import Plan
from ..policies.report import Report


@dataclass(frozen=True)
class PlanResult:
    """The result of a plan, before it is folded.

    ``stream_bytes``: of each packet that its device has sent to its host. ``sound``: the device has carried it out.
    ``version``: of the model now.
    """

    plan: Plan
    stream_bytes: tuple[int, ...]
    sound: bool
    version: int


class PlanListener:
    """Called at each stage of every plan's life; each method may be left as it is, and then does nothing."""

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Raise ``PlanRefused`` where the plan cannot be sent while these are in flight."""

    def sent(self, plan: Plan) -> None:
        """The plan leaves the server; all that the runtime fills in is in it."""

    def task_fields(self, plan: Plan) -> Mapping[str, Any]:
        """Fields of ``pool.Task`` that this listener fills in for a plan that was sent."""
        return {}

    def arrived(self, result: PlanResult) -> None:
        """The result of the plan is there."""

    def ended(self, plan: Plan, report: Report, state: State | None) -> None:
        """The plan is over, and its update was folded or refused. ``state``: what its simulated device remembers."""

    def released(self, plan: Plan) -> None:
        """The plan is over without a result."""

    def view_fields(self, version: int) -> Mapping[str, Any]:
        """Fields of the ``View`` that policies see, in this version of the model."""
        return {}

    def notices(self) -> list[str]:
        """What an operator should know, since the last call."""
        return []
