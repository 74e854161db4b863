"""Calls the policy, and checks its decision and its plans. Errors name the policy, the round and the field."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ...actors.support import PlanRefused, check_plan
from ...clusters.profile import DeviceProfile
from ...learning.workload import Workload
from ...policies.checks.answer import BadAnswer, check_answer, check_state
from ...policies.decision import Decision
from ...policies.plan import Plan
from ...policies.policy import Chain, Policy, State
from ...policies.view import View
from ..errors import RunError


def first_state(policy: Policy) -> State:
    """The policy's state before its first decision. Raises ``RunError`` as ``call_policy`` does, of stage "init"."""
    with _as_run_errors(round_=None, stage="init"):
        state = policy.init()
        if not isinstance(policy, Chain):  # a chain checks the states of its links itself
            check_state(state, who=_name(policy))
    return state


def call_policy(policy: Policy, view: View, state: State) -> tuple[Decision, State]:
    """The policy's decision on ``view`` and its new state.

    Raises ``RunError`` of stage "decide", with the policy's own trace when it raised something itself.
    """
    with _as_run_errors(round_=view.version, stage="decide"):
        answer: Any = policy.decide(view, state, Decision())
        if not isinstance(policy, Chain):
            check_answer(answer, who=_name(policy))
    decision, state = answer
    if problem := _problem(decision):
        raise RunError(problem, round_=view.version, stage="decide")
    return decision, state


def check_sendable(
    plan: Plan,
    *,
    version: int,
    busy: Mapping[int, Plan],
    profiles: Sequence[DeviceProfile],
    hosts: int,
    workload: Workload,
) -> None:
    """Raise ``PlanRefused`` if a plan of a policy cannot be sent now: its device, its version, its host, or its other fields.

    ``busy``: plans in flight, by device. ``profiles``: of all devices. ``hosts``: number of partition hosts.
    """
    if plan.device not in range(len(profiles)):
        raise PlanRefused(f"the policy chose device {plan.device}; devices are 0 to {len(profiles) - 1}")
    if plan.device in busy:
        raise PlanRefused(f"the policy chose device {plan.device}, which still has a plan in flight")
    if plan.version != version:
        raise PlanRefused(
            f"a plan for device {plan.device} starts at version {plan.version}; the current one is {version}"
        )
    if plan.split is not None and plan.split.host not in range(hosts):
        raise PlanRefused(f"split.host is {plan.split.host}; hosts are 0 to {hosts - 1}")
    check_plan(plan, workload, profile=profiles[plan.device])


def _name(policy: Policy) -> str:
    return f"the policy {type(policy).__name__}"


@contextmanager
def _as_run_errors(*, round_: int | None, stage: str) -> Iterator[None]:
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
    """The first thing in a decision that cannot be carried out; "" if there is none."""
    kinds = [type(task).__name__ for task in decision.tasks]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), ""):
        return f"the policy asks for {kinds.count(twice)} tasks {twice} in one version; it must be one at most"
    least = 0 if decision.tasks and not decision.plans else 1
    if decision.close_at is not None and decision.close_at < least:
        return f"the policy set close_at to {decision.close_at}; it must be {least} or more"
    if decision.close_after_s is not None and not decision.close_after_s > 0:
        return f"the policy set close_after_s to {decision.close_after_s:g}; it must be above 0"
    return ""
