"""What a run has recorded of its devices and plans so far: last reports, participation, and counts of outcomes."""

from typing import ClassVar

from ...learning.spec import CountOrZero
from ...policies.plan import Plan
from ...policies.report import Outcome, Report
from ..errors import RunError

_BUDGET_LEFT = 0.9  # of what a device has just failed to have


class DeviceHistory:
    """The last report of each device, the number of its plans that have ended, and what memory it has turned out to have.

    All are part of the policies' view. ``memory_budgets``: of the devices that ran out of memory under an enforced limit.
    """

    SAVED: ClassVar = {  # in a checkpoint
        "reports": dict[int, Report],
        "participation": dict[int, CountOrZero],
        "memory_budgets": dict[int, CountOrZero],
    }
    NOT_SAVED = ("_notices",)

    def __init__(self) -> None:
        """No plan has ended."""
        self.reports: dict[int, Report] = {}
        self.participation: dict[int, int] = {}
        self.memory_budgets: dict[int, int] = {}
        self._notices: list[str] = []

    def ended(self, report: Report) -> None:
        """Record the end of a plan."""
        device = report.plan.device
        self.reports[device] = report
        self.participation[device] = self.participation.get(device, 0) + 1
        if report.outcome == Outcome.OUT_OF_MEMORY and report.enforced:
            self._learn_budget(report)

    def take_notices(self) -> list[str]:
        """The budgets that fell since the last call, one sentence each."""
        notices, self._notices = self._notices, []
        return notices

    def _learn_budget(self, report: Report) -> None:
        """Lower the budget of a device to 90 % of the smaller of its budget and what the plan was predicted to need.

        So the same plan is not admitted again, and neither is one that is predicted to need as much.
        """
        plan, needed = report.plan, report.virtual.peak_memory_bytes
        if plan.memory_bytes is None:
            return
        budget = int(_BUDGET_LEFT * min(plan.memory_bytes, needed or plan.memory_bytes))
        self.memory_budgets[plan.device] = min(budget, self.memory_budgets.get(plan.device, budget))
        limit, predicted, learned = (f"{size / 1e6:,.1f} MB" for size in (plan.memory_bytes, needed, budget))
        self._notices.append(
            f"device {plan.device} ran out of memory in round {plan.version} under a limit of {limit}, predicted {predicted}; "
            f"its learned budget is {learned}"
        )


class OutcomeCounts:
    """Counts dispatched plans and their outcomes, and raises the errors that end a run because of them.

    A *failure* is a plan that failed, was rejected, or was lost with its worker. A plan whose device dropped out is not one.
    """

    SAVED: ClassVar = {  # in a checkpoint
        **dict.fromkeys(("_sent", "_trainings", "_folds", "_answers", "_failures"), CountOrZero),
        **dict.fromkeys(("_first_failure", "_first_fault"), Report | None),
    }
    NOT_SAVED = ()

    def __init__(self) -> None:
        """No plan was dispatched."""
        self._sent = self._trainings = self._folds = self._answers = self._failures = 0
        self._first_failure: Report | None = None
        self._first_fault: Report | None = None

    def sent(self, plan: Plan) -> None:
        """Count a plan that was dispatched."""
        self._sent += 1
        self._trainings += plan.objective.kind != "evaluate"

    def ended(self, report: Report) -> None:
        """Count a plan that has ended."""
        if report.outcome == Outcome.DONE:
            evaluated = report.plan.objective.kind == "evaluate"
            self._answers += evaluated
            self._folds += not evaluated
        elif report.outcome != Outcome.LATE:
            self._first_fault = self._first_fault or report
            if report.outcome in (Outcome.FAILED, Outcome.REJECTED) or report.stage == "run":
                self._failures += 1
                self._first_failure = self._first_failure or report

    @property
    def delivered(self) -> bool:
        """Whether any update was folded; in a run that only evaluates, whether any device has returned metrics."""
        return self._folds > 0 or (not self._trainings and self._answers > 0)

    def check_failures(self, most: int | None) -> None:
        """Raise ``RunError`` with the first failure if there are more than ``most`` (None: any number is allowed)."""
        first = self._first_failure
        if first is not None and most is not None and self._failures > most:
            raise fault(
                f"{self._failures} plans have failed, were rejected or lost; max_failures is {most}; the first fault: "
                f"{first.error}",
                first,
            )

    def check_delivered(self, version: int) -> None:
        """Raise ``RunError`` if plans were dispatched and nothing was delivered in the whole run, which ends at ``version``."""
        if not self._sent or self.delivered:
            return
        text, first = "no device delivered an update in the whole run", self._first_fault
        if first is None:  # without any fault, only a deadline closes a version with nothing folded
            why = "none arrived before its version closed: the deadline (closing.after_s) is too short"
            raise RunError(f"{text}; {why}", round_=version, stage="close")
        raise fault(f"{text}; the first fault: {first.outcome.value}: {first.error}", first)


def fault(text: str, report: Report) -> RunError:
    """An error that ends the run, with device, round and stage of the report's plan."""
    return RunError(text, device=report.plan.device, round_=report.plan.version, stage=report.stage)
