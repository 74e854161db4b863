"""Turns: of the plans of a version that share a host's blocks, one is out at a time, in an order drawn from the seed.

SplitFed's second version (Thapa et al., AAAI 2022, arXiv 2004.12088): the devices of a round train the server's part one after
another, on one copy. Hosts go on beside each other, each with the devices that are its own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from ..decision import Decision
from ..plan import Plan
from ..policy import State
from ..selection.draw import uniform_order
from ..view import View


def in_turn(view: View, state: State, decision: Decision) -> tuple[Decision, State]:
    """A decision with those of its plans whose turn it is, and of those that have waited; the version stays open for the rest.

    Plans that share nothing are sent at once. The state is None while nobody waits; what waits for a version that has closed
    is forgotten. Of the plans that wait, as plain data by host, only the one that goes is read: a round of n turns on one
    host asks n times.
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
    """Put plans at the ends of their hosts' queues, in an order drawn from the seed; a device that waits already does not."""
    if not plans:
        return
    there = {plan["device"] for queue in waiting.values() for plan in queue}
    new = {plan.device: plan for plan in plans if plan.device not in there}
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
    """A plan as plain data, lists and all."""
    return msgspec.json.decode(msgspec.json.encode(plan))
