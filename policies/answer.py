"""What a policy returns, held against the contract: a decision whose fields have their declared types, and a plain state.

A plan travels as msgspec bytes, and a state as a part of a checkpoint, so what cannot be written there must be found where
it is returned, with the policy's name.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from ..clusters.units import shown
from .decision import Decision
from .plan import Plan
from .type_check import mismatch

MOST_DEPTH = 100  # of a state
_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_PLAIN = "plain data: None, bool, int, float, str, bytes, and lists, tuples, sets and dicts of these"


class BadAnswer(ValueError):
    """A policy broke its contract. One sentence that names the policy, and the device whose plan it is about, if it is."""

    def __init__(self, problem: str, *, device: int | None = None) -> None:
        """``device``: None where it is about no single plan."""
        super().__init__(problem)
        self.device = device


def check_answer(answer: Any, *, who: str) -> None:
    """Raise ``BadAnswer`` unless ``answer`` is a decision and a state. ``who``: the policy, as the sentence names it."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Decision)):
        raise BadAnswer(f"{who} returned {_what(answer)}; it must return a pair, a Decision and its new state")
    decision, state = answer
    if not _sound(decision) and (found := mismatch(decision, Decision)):
        where, what = found
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
    if found := next(_not_plain(state, "", 0, {}), None):
        where, what = found
        raise BadAnswer(
            f"{who} returned a state that no checkpoint can hold: state{where} is {what}; allowed is {_PLAIN}"
        )


def _sound(decision: Decision) -> bool:
    """Whether all fields, at every depth, are what they are declared to be: as fast as msgspec can tell."""
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(decision), type=Decision) == decision
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError):
        return False


def _what(answer: Any) -> str:
    if isinstance(answer, tuple) and len(answer) == 2:
        return f"a pair with {_kind(answer[0])}"
    return _kind(answer)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _not_plain(value: Any, path: str, depth: int, seen: dict[int, Any]) -> Iterator[tuple[str, str]]:
    """(where, what) of what is not plain. ``seen``: containers that were looked at already."""
    kind = type(value)
    if kind in _SCALARS:
        yield from _too_wide(value, path)
        return
    if id(value) in seen or isinstance(value, float):  # (the second: numpy's float64, which is saved as a float)
        return
    if depth > MOST_DEPTH:
        yield path[:80], f"nested more than {MOST_DEPTH} deep"
    elif kind is dict:
        if not _flat(value) or not _flat(value.values()):
            for key, item in value.items():
                yield from _not_plain(key, f"{path}, key {shown(key)},", depth + 1, seen)
                yield from _not_plain(item, f"{path}[{shown(key)}]", depth + 1, seen)
    elif kind in (list, tuple, set, frozenset):
        if not _flat(value):
            for place, item in enumerate(value):
                yield from _not_plain(item, f"{path}[{place}]", depth + 1, seen)
    else:
        yield path, f"{shown(value)}, a {kind.__module__}.{kind.__qualname__}"
    seen[id(value)] = value  # last: one inside itself is found to be nested without end


def _flat(values: Iterable[Any]) -> bool:
    """Whether all are numbers of the usual size: what large states are made of, told without a loop."""
    kinds = set(map(type, values))
    if not kinds <= {type(None), bool, int, float}:
        return False
    return int not in kinds or all(-(2**63) <= value < 2**63 for value in values if type(value) is int)


def _too_wide(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """What is plain, and yet cannot be written."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        yield path, f"{shown(value)}, which has more than 64 bits"
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            yield path, f"{shown(value)}, which holds half of a surrogate pair"
