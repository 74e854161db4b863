"""What listens to the plans of a run: the one object that the loop calls. See ``plan_listener`` for the stages of a plan."""

from collections import ChainMap
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from ..comms.links.link import State
from ..policies.plan import Plan
from ..policies.report import Report
from .plan_listener import PlanListener, PlanResult
from .replay.replay_index import ReplayIndex


class PlanLifecycle(PlanListener):
    """All listeners of a run as one, called in their order. A method that remembers something of its plans is one more here."""

    SAVED: ClassVar = {"replay": ReplayIndex}  # by a checkpoint
    NOT_SAVED = ("_listeners",)

    def __init__(self, *, server: PlanListener, replay: ReplayIndex) -> None:
        """``server``: links with memory and shared heads; a checkpoint saves it by itself. ``replay``: the index of views."""
        self.replay = replay
        self._listeners: tuple[PlanListener, ...] = (server, replay)

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Raise ``PlanRefused`` where one of them does."""
        for listener in self._listeners:
            listener.check(plan, in_flight)

    def sent(self, plan: Plan) -> None:
        """Call each."""
        for listener in self._listeners:
            listener.sent(plan)

    def task_fields(self, plan: Plan) -> Mapping[str, Any]:
        """The fields of all."""
        return ChainMap(*(dict(listener.task_fields(plan)) for listener in self._listeners))

    def arrived(self, result: PlanResult) -> None:
        """Call each."""
        for listener in self._listeners:
            listener.arrived(result)

    def ended(self, plan: Plan, report: Report, state: State | None) -> None:
        """Call each."""
        for listener in self._listeners:
            listener.ended(plan, report, state)

    def released(self, plan: Plan) -> None:
        """Call each."""
        for listener in self._listeners:
            listener.released(plan)

    def view_fields(self, version: int) -> Mapping[str, Any]:
        """The fields of all."""
        return ChainMap(*(dict(listener.view_fields(version)) for listener in self._listeners))

    def notices(self) -> list[str]:
        """The notices of all."""
        return [text for listener in self._listeners for text in listener.notices()]
