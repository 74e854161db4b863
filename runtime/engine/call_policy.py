"""Asks the policy, and turns what goes wrong in it into an error that names the policy, the round and the field."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...policies.checks.answer import BadAnswer, check_answer, check_state
from ...policies.decision import Decision
from ...policies.policy import Chain, Policy, State
from ...policies.view import View
from ..errors import RunError


def first_state(policy: Policy) -> State:
    """The policy's state before its first decision. Raises ``RunError`` as ``call_policy`` does, of stage "init"."""
    with _reported(round_=None, stage="init"):
        state = policy.init()
        if not isinstance(policy, Chain):  # which checks those of its links
            check_state(state, who=_name(policy))
    return state


def call_policy(policy: Policy, view: View, state: State) -> tuple[Decision, State]:
    """The policy's decision on ``view`` and its new state.

    Raises ``RunError`` of stage "decide", with the policy's own trace when it raised something itself.
    """
    with _reported(round_=view.version, stage="decide"):
        answer: Any = policy.decide(view, state, Decision())
        if not isinstance(policy, Chain):
            check_answer(answer, who=_name(policy))
    decision, state = answer
    if problem := _problem(decision):
        raise RunError(problem, round_=view.version, stage="decide")
    return decision, state


def _name(policy: Policy) -> str:
    return f"the policy {type(policy).__name__}"


@contextmanager
def _reported(*, round_: int | None, stage: str) -> Iterator[None]:
    """Raise ``RunError`` for a breach of the contract, and, with its trace, for any other exception of the policy."""
    try:
        yield
    except BadAnswer as error:
        raise RunError(str(error), device=error.device, round_=round_, stage=stage) from error
    except Exception as error:
        fault = RunError(f"the policy raised {type(error).__name__}: {error}", round_=round_, stage=stage)
        fault.trace = traceback.format_exc()
        raise fault from error


def _problem(decision: Decision) -> str:
    """What of a decision cannot be carried out; "" when nothing is."""
    if decision.tasks:
        return f"the policy asks for the server task {decision.tasks[0].name!r}; no task can be carried out yet"
    if decision.close_at is not None and decision.close_at < 1:
        return f"the policy set close_at to {decision.close_at}; it must be 1 or more"
    if decision.close_after_s is not None and not decision.close_after_s > 0:
        return f"the policy set close_after_s to {decision.close_after_s:g}; it must be above 0"
    return ""
