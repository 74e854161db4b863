"""Asking a policy: its answer, checked, or the one error that says what was wrong with it."""

import traceback
from typing import Any

from ..policies.decision import Decision
from ..policies.policy import Policy, State
from ..policies.view import View
from .errors import RunError


def ask(policy: Policy, view: View, state: State) -> tuple[Decision, State]:
    """The policy's decision on ``view`` and its new state.

    Raises ``RunError`` of stage "decide", with the policy's own trace when it raised something itself.
    """
    try:
        answer: Any = policy.decide(view, state, Decision())
    except Exception as error:  # whatever a user's policy raises ends the run
        fault = RunError(f"the policy raised {type(error).__name__}: {error}", round_=view.version, stage="decide")
        fault.trace = traceback.format_exc()
        raise fault from error
    if problem := _problem(answer):
        raise RunError(problem, round_=view.version, stage="decide")
    decision, state = answer
    return decision, state


def _problem(answer: Any) -> str:
    """What is wrong with an answer; "" when nothing is."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Decision)):
        return f"the policy returned {type(answer).__name__}; it must return a pair, a Decision and its new state"
    decision = answer[0]
    if decision.tasks:
        return f"the policy asks for the server task {decision.tasks[0].name!r}; no task can be carried out yet"
    if decision.close_at is not None and decision.close_at < 1:
        return f"the policy set close_at to {decision.close_at}; it must be 1 or more"
    if decision.close_after_s is not None and not decision.close_after_s > 0:
        return f"the policy set close_after_s to {decision.close_after_s:g}; it must be above 0"
    return ""
