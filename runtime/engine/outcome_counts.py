"""What became of a run's plans, in numbers: whether anything was ever delivered, and how much went wrong."""

from typing import ClassVar

from ...learning.spec import CountOrZero
from ...policies.plan import Plan
from ...policies.report import Outcome, Report
from ..errors import RunError


class OutcomeCounts:
    """Counts plans that were sent and what came of them; says when a run must not go on, or did not end well.

    A *failure* failed, was rejected, or was lost with its worker; a device that drops out is none.
    """

    SAVED: ClassVar = {  # by a checkpoint
        **dict.fromkeys(("_sent", "_trainings", "_folds", "_answers", "_failures"), CountOrZero),
        **dict.fromkeys(("_first_failure", "_first_fault"), Report | None),
    }
    NOT_SAVED = ()

    def __init__(self) -> None:
        """Nothing was sent."""
        self._sent = self._trainings = self._folds = self._answers = self._failures = 0
        self._first_failure: Report | None = None
        self._first_fault: Report | None = None

    def sent(self, plan: Plan) -> None:
        """A plan was dispatched."""
        self._sent += 1
        self._trainings += plan.objective.kind != "evaluate"

    def ended(self, report: Report) -> None:
        """A plan has come to its end."""
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
        """Whether an update was ever folded; of a run that only evaluates, whether an answer ever came."""
        return self._folds > 0 or (not self._trainings and self._answers > 0)

    def check_failures(self, most: int | None) -> None:
        """Raise ``RunError`` with the first failure where there are more than may be (None: any number)."""
        first = self._first_failure
        if first is not None and most is not None and self._failures > most:
            raise fault(
                f"{self._failures} plans have failed, were rejected or lost; max_failures is {most}; the first fault: "
                f"{first.error}",
                first,
            )

    def check_delivered(self, version: int) -> None:
        """Raise ``RunError`` where every device only ever failed or came late, whatever rule ended the run at ``version``."""
        if not self._sent or self.delivered:
            return
        text, first = "no device delivered an update in the whole run", self._first_fault
        if first is None:  # only a deadline closes a version with nothing folded and nothing gone wrong
            why = "none came before its version closed: its deadline (closing.after_s) is too short"
            raise RunError(f"{text}; {why}", round_=version, stage="close")
        raise fault(f"{text}; the first fault: {first.outcome.value}: {first.error}", first)


def fault(text: str, report: Report) -> RunError:
    """What ends a run, with device, round and stage of the plan that it is told of."""
    return RunError(text, device=report.plan.device, round_=report.plan.version, stage=report.stage)
