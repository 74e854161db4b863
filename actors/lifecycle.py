"""All listeners of a run as one object, which the loop calls. ``plan_listener`` describes the stages of a plan."""

from collections import ChainMap
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from ..comms.links.state import LinkState
from ..policies.plan import Plan
from ..policies.report import Report
from .plan_listener import PlanListener, PlanResult
from .replay.replay_index import ReplayIndex


class PlanLifecycle(PlanListener):
    """Passes each stage of a plan to all listeners, in order. A method with state about plans in flight adds one here."""

    SAVED: ClassVar = {"replay": ReplayIndex}  # by a checkpoint
    NOT_SAVED = ("_listeners",)

    def __init__(self, *, server: PlanListener, replay: ReplayIndex, parts: tuple[PlanListener, ...]) -> None:
        """``server``, ``parts``: links and heads; index maps and frozen blocks; they are saved with the server.

        ``replay``: index of views.
        """
        self.replay = replay
        self._listeners: tuple[PlanListener, ...] = (server, *parts, replay)

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Raise ``PlanRefused`` if a listener does."""
        for listener in self._listeners:
            listener.check(plan, in_flight)

    def sent(self, plan: Plan) -> None:
        """Pass it to all listeners."""
        for listener in self._listeners:
            listener.sent(plan)

    def task_fields(self, plan: Plan) -> Mapping[str, Any]:
        """The fields of all listeners."""
        return ChainMap(*(dict(listener.task_fields(plan)) for listener in self._listeners))

    def arrived(self, result: PlanResult) -> None:
        """Pass it to all listeners."""
        for listener in self._listeners:
            listener.arrived(result)

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """Pass it to all listeners."""
        for listener in self._listeners:
            listener.ended(plan, report, state)

    def released(self, plan: Plan) -> None:
        """Pass it to all listeners."""
        for listener in self._listeners:
            listener.released(plan)

    def device_reset(self, device: int) -> None:
        """Pass it to all listeners."""
        for listener in self._listeners:
            listener.device_reset(device)

    def view_fields(self, version: int) -> Mapping[str, Any]:
        """The fields of all listeners."""
        return ChainMap(*(dict(listener.view_fields(version)) for listener in self._listeners))

    def notices(self) -> list[str]:
        """The notices of all listeners."""
        return [text for listener in self._listeners for text in listener.notices()]
