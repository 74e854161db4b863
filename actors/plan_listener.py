"""The life cycle of a plan, and its listeners.

    check ── sent ──┬── arrived ── ended       the result arrives, is folded or not, and the plan is over
                    └──────────── released     the result is not wanted any more: the plan is lost, or the run ends

Each part of the server with state about plans in flight (links with memory, shared heads, the replay index) is a
``PlanListener``. The loop calls the one ``PlanLifecycle``, which calls all listeners; a new method with such state adds one.
Every plan that was sent ends or is released, exactly once.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..comms.links.state import LinkState
from ..policies.plan import Plan
from ..policies.report import Report


@dataclass(frozen=True)
class PlanResult:
    """The result of a plan, before it is folded.

    ``stream_bytes``: of each packet that the device sent to its host. ``sound``: whether the plan was carried out.
    ``version``: of the model now.
    """

    plan: Plan
    stream_bytes: tuple[int, ...]
    sound: bool
    version: int


class PlanListener:
    """Called at each stage of every plan. By default, each method does nothing."""

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Raise ``PlanRefused`` if the plan cannot be sent while these are in flight."""

    def sent(self, plan: Plan) -> None:
        """The plan is dispatched; the runtime has filled in all its fields."""

    def task_fields(self, plan: Plan) -> Mapping[str, Any]:
        """Fields of ``pool.Task`` that this listener sets for a plan that was sent."""
        return {}

    def arrived(self, result: PlanResult) -> None:
        """The result of the plan has arrived."""

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """The plan is over, and its update was folded or rejected. ``state``: of its simulated device."""

    def released(self, plan: Plan) -> None:
        """The plan is over without a result."""

    def device_reset(self, device: int) -> None:
        """A real device holds nothing any more: it has left the cluster, or its worker is a new one."""

    def view_fields(self, version: int) -> Mapping[str, Any]:
        """Fields of the ``View`` that this listener sets, in this version of the model."""
        return {}

    def notices(self) -> list[str]:
        """Notices since the last call, one sentence each."""
        return []
