"""Turns: of the plans of a version that share the blocks of a host, one is in flight at a time, in a random order.

SplitFed's second version (Thapa et al., AAAI 2022, arXiv 2004.12088): the devices of a round train the server's part one after
another, on one copy. Hosts work in parallel, each with its own devices.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from ..decision import Decision
from ..plan import Plan
from ..policy import State
from ..selection.candidates import uniform_order
from ..view import View


def in_turn(view: View, state: State, decision: Decision) -> tuple[Decision, State]:
    """The decision with the plans that may be sent now, including waiting ones; the version stays open for the others.

    Plans without a shared head are sent immediately. The state is None while no plan waits. Waiting plans of a version that has
    closed are dropped. Waiting plans are stored as plain data by host, and only the plan that is sent is decoded, since a round
    of n turns on one host takes n decisions.
    """
    waiting: dict[str, list[Any]] = {}
    if state is not None and state["version"] == view.version:
        waiting = dict(state["waiting"])
    now = [plan for plan in decision.plans if not plan.shares_head]
    _join(waiting, [plan for plan in decision.plans if plan.shares_head], view.seed)
    busy = _hosts_in_turn(view.in_flight.values(), view.version)
    for host, queue in list(waiting.items()):
        first = next((place for place, plan in enumerate(queue) if plan["device"] not in view.in_flight), None)
        if int(host) in busy or first is None:
            continue
        now.append(msgspec.convert(queue[first], Plan))
        waiting[host] = queue[:first] + queue[first + 1 :]
        if not waiting[host]:
            del waiting[host]
    decision = replace(decision, plans=tuple(now), keep_open=decision.keep_open or bool(waiting))
    return decision, {"version": view.version, "waiting": waiting} if waiting else None


def _join(waiting: dict[str, list[Any]], plans: Sequence[Plan], seed: int) -> None:
    """Append plans to the queues of their hosts, in an order drawn from the seed; a device that already waits is skipped."""
    if not plans:
        return
    queued = {plan["device"] for queue in waiting.values() for plan in queue}
    new = {plan.device: plan for plan in plans if plan.device not in queued}
    joining: dict[str, list[Any]] = {}
    for device in uniform_order(np.random.default_rng(seed), list(new)):
        split = new[device].split
        assert split is not None
        joining.setdefault(str(split.host), []).append(_plain(new[device]))
    for host, queue in joining.items():
        waiting[host] = waiting.get(host, []) + queue


def _hosts_in_turn(in_flight: Iterable[Plan], version: int) -> set[int]:
    return {plan.split.host for plan in in_flight if plan.split and plan.shares_head and plan.version == version}


def _plain(plan: Plan) -> Any:
    """A plan as plain data."""
    return msgspec.json.decode(msgspec.json.encode(plan))
