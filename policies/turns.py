"""Turns: of the plans of a version that share a host's blocks, one is out at a time, in an order drawn from the seed.

SplitFed's second version (Thapa et al., AAAI 2022, arXiv 2004.12088): the devices of a round train the server's part one after
another, on one copy. Hosts go on beside each other, each with the devices that are its own.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from .decision import Decision
from .draw import uniform_order
from .plan import Plan
from .policy import State
from .view import View


def in_turn(view: View, state: State, decision: Decision) -> tuple[Decision, State]:
    """A decision with those of its plans whose turn it is, and of those that have waited; the version stays open for the rest.

    Plans that share nothing are sent at once. The state is None while nobody waits; what waits for a version that has closed
    is forgotten.
    """
    queue: list[Plan] = []
    if state is not None and state["version"] == view.version:
        queue = [msgspec.convert(plan, Plan) for plan in state["plans"]]
    waiting = {plan.device for plan in queue}
    now = [plan for plan in decision.plans if not shares(plan)]
    new = {plan.device: plan for plan in decision.plans if shares(plan) and plan.device not in waiting}
    queue += [new[device] for device in uniform_order(np.random.default_rng(view.seed), list(new))]
    busy, later = _hosts_in_turn(view.in_flight.values(), view.version), []
    for plan in queue:
        assert plan.split is not None
        if plan.split.host in busy or plan.device in view.in_flight:
            later.append(plan)
        else:
            busy.add(plan.split.host)
            now.append(plan)
    decision = replace(decision, plans=tuple(now), keep_open=decision.keep_open or bool(later))
    return decision, {"version": view.version, "plans": [_plain(plan) for plan in later]} if later else None


def shares(plan: Plan) -> bool:
    """Whether its host's blocks are those of the device before it."""
    return plan.split is not None and plan.split.head == "shared"


def out_of_turn(plan: Plan, in_flight: Iterable[Plan]) -> bool:
    """Whether another plan of its version has the host's shared blocks now."""
    return plan.split is not None and shares(plan) and plan.split.host in _hosts_in_turn(in_flight, plan.version)


def _hosts_in_turn(in_flight: Iterable[Plan], version: int) -> set[int]:
    return {plan.split.host for plan in in_flight if plan.split and shares(plan) and plan.version == version}


def _plain(plan: Plan) -> Any:
    """A plan as plain data, lists and all."""
    return msgspec.json.decode(msgspec.json.encode(plan))
