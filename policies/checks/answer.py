"""Checks of the return value of a policy: a decision whose fields have their declared types, and a state of plain data.

Plans are sent as msgspec bytes and states are stored in checkpoints. A value that cannot be written there is reported where the
policy returns it, with the policy's name.
"""

from collections.abc import Collection, Iterator
from typing import Any

import msgspec

from ...clusters.units import shown
from ...clusters.yaml_text import is_unicode
from ..decision import Decision
from ..plan import Plan
from .type_check import mismatch

MOST_DEPTH = 100  # of a state
_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_NUMBERS = frozenset({bool, int, float})
_USUAL = frozenset({type(None), bool, float, bytes})  # always plain
_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})
_PLAIN = "plain data: None, bool, int, float, str, bytes, and lists, tuples, sets and dicts of these"


class BadAnswer(ValueError):
    """A policy broke its contract. One sentence that names the policy and, if it concerns a single plan, the device."""

    def __init__(self, problem: str, *, device: int | None = None) -> None:
        """``device``: None where the problem concerns no single plan."""
        super().__init__(problem)
        self.device = device


def check_answer(answer: Any, *, who: str) -> None:
    """Raise ``BadAnswer`` unless ``answer`` is a decision and a state. ``who``: the policy, as the sentence names it."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Decision)):
        raise BadAnswer(f"{who} returned {_described(answer)}; it must return a pair, a Decision and its new state")
    decision, state = answer
    if not _is_valid(decision) and (problem := mismatch(decision, Decision)):
        where, what = problem
        device = None
        if isinstance(decision.plans, tuple) and where.startswith("plans["):
            number, _, inside = where.removeprefix("plans[").partition("]")
            plan = decision.plans[int(number)]
            if isinstance(plan, Plan) and isinstance(plan.device, int) and inside.startswith("."):
                device, where = plan.device, f"plan for device {plan.device}: {inside.removeprefix('.')}"
        raise BadAnswer(f"{who} made a decision that cannot be used: {where} {what}", device=device)
    check_state(state, who=who)


def check_state(state: Any, *, who: str) -> None:
    """Raise ``BadAnswer`` for a state that is not plain data."""
    if not _is_plain(state, MOST_DEPTH, set()):
        keys, what = next(_not_plain(state, (), {}))
        where = "".join(f"[{shown(key)}]" for key in keys[:5]) + ("..." if len(keys) > 5 else "")
        raise BadAnswer(
            f"{who} returned a state that no checkpoint can hold: state{where} is {what}; allowed is {_PLAIN}"
        )


def _is_valid(decision: Decision) -> bool:
    """Whether all fields, at every depth, have their declared types: a fast check by msgspec."""
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(decision), type=Decision) == decision
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError):
        return False


def _described(answer: Any) -> str:
    if isinstance(answer, tuple) and len(answer) == 2:
        return f"a pair with {_type_of(answer[0])}"
    return _type_of(answer)


def _type_of(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _is_plain(value: Any, depth: int, seen: set[int]) -> bool:
    """Whether a value is plain data. Fast, because it is called after every decision, and states may be large.

    ``seen``: ids of containers that have been checked, so that one that occurs several times is checked once.
    """
    value_type = type(value)
    if value_type in _SCALARS:
        return not _too_wide(value)
    if value_type not in _CONTAINERS:
        return isinstance(value, float)  # numpy's float64, which is saved as a float
    if id(value) in seen:
        return True
    if depth == 0:  # also reached by a container that contains itself
        return False
    for items in (value, value.values()) if value_type is dict else (value,):
        if not _are_numbers(items):
            for item in items:
                if type(item) not in _USUAL and not _is_plain(item, depth - 1, seen):
                    return False
    seen.add(id(value))
    return True


def _are_numbers(values: Collection[Any]) -> bool:
    """Whether all are numbers of at most 64 bits: the contents of most large states, checked without a Python loop."""
    types = set(map(type, values))
    return types <= _NUMBERS and (int not in types or (max(values) < 2**63 and min(values) >= -(2**63)))


def _not_plain(value: Any, keys: tuple[Any, ...], seen: dict[int, Any]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The values that are not plain: the keys and positions that lead to them, and a description. For the error's sentence."""
    value_type = type(value)
    if value_type in _SCALARS:
        if problem := _too_wide(value):
            yield keys, problem
    elif id(value) in seen or isinstance(value, float):
        return
    elif value_type not in _CONTAINERS:
        yield keys, f"{shown(value)}, a {value_type.__module__}.{value_type.__qualname__}"
    elif len(keys) >= MOST_DEPTH:
        yield keys, f"nested more than {MOST_DEPTH} deep"
    else:
        for place, item in value.items() if value_type is dict else enumerate(value):
            for part in (place, item) if value_type is dict else (item,):
                yield from _not_plain(part, (*keys, place), seen)
        seen[id(value)] = value


def _too_wide(value: Any) -> str:
    """Why a scalar of a plain type cannot be written; "" where it can."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return f"{shown(value)}, which has more than 64 bits"
    if isinstance(value, str) and not value.isascii() and not is_unicode(value):
        return f"{shown(value)}, which holds half of a surrogate pair"
    return ""
