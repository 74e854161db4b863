"""What policies state of themselves, and whether the policies of a chain go together.

The attributes are described in ``policies.policy``. One check holds them against each other: it knows fields of plans and
decisions, and no policy by name.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ...clusters.profile import Kind
from ..decision import Decision
from ..plan import Plan
from .type_check import mismatch

WRITABLE = (*Decision.__struct_fields__, *Plan.__struct_fields__)
# What a policy does that writes a field, as sentences say it; of all other fields, that it sets them.
_DEEDS = {
    "plans": "chooses devices",
    "split": "cuts the model",
    "link_down": "gives links a memory",
    "link_up": "gives links a memory",
    "deadline_s": "has devices stop early",
    "close_at": "sets the number of updates that closes a version",
    "tasks": "gives the server a task",
    "keep_open": "keeps versions open for plans to come",
}


class UploadPeriod(NamedTuple):
    """Rounds of a run by their uploads of views; in all other rounds the hosts train on the views that they have buffered.

    ``full``: rounds in which the whole cohort uploads; ``some``: rounds in which, on average, the share ``part`` of it uploads.
    """

    full: float
    some: float
    part: float


@dataclass(frozen=True, kw_only=True)
class Statements:
    """The statements of one policy, with the defaults of those that it lacks; see ``policies.policy`` for each."""

    writes: Sequence[str] | None = None
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    forbids_before: Mapping[str, str] = dataclasses.field(default_factory=dict)
    forbids_behind: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs_settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    forbids_settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    replaces: Sequence[Literal["codec_down", "codec_up"]] = ()
    needs_codecs: Sequence[str] = ()
    needs_kinds: Sequence[Kind] = ()
    cuts: Sequence[str] = ()
    auxiliaries: Callable[[Sequence[str]], Sequence[str]] | None = None
    fits_plans: bool = False
    freezes: bool = False
    trunk_end: str = ""
    upload_period: Callable[..., UploadPeriod] | None = None
    notices: Sequence[str] = ()

    @property
    def written(self) -> Sequence[str]:
        """The fields that it writes. A policy that does not state them chooses devices, unless it needs that done before it."""
        if self.writes is not None:
            return self.writes
        return () if "plans" in self.needs else ("plans",)


def statements_of(policy: Any, who: str = "the policy") -> Statements:
    """The statements of a policy, which may have any of them as an attribute, a property or (``auxiliaries``) a method.

    ``who``: the policy, as errors name it. Raises ``ValueError`` in one sentence for a statement of another type, and for one
    that names a field which neither a plan nor a decision has.
    """
    names = [field.name for field in dataclasses.fields(Statements)]
    stated = Statements(**{name: getattr(policy, name) for name in names if hasattr(policy, name)})
    if wrong := mismatch(stated, Statements):
        raise ValueError(f"{wrong[0]} of {who} {wrong[1]}")
    for name in ("writes", "needs", "forbids_before", "forbids_behind"):
        for field in getattr(stated, name) or ():
            if field not in WRITABLE:
                close = difflib.get_close_matches(field, WRITABLE, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(
                    f"{name} of {who} names {field!r}{hint}; allowed: fields of a decision or a plan, {', '.join(WRITABLE)}"
                )
    return stated


def chain_fault(chain: Sequence[tuple[str, Statements]]) -> str:
    """The first thing in a chain that does not go together, in one sentence; "" where everything does.

    ``chain``: each policy as sentences name it, and its statements, in order.
    """
    for position, (who, later) in enumerate(chain):
        before = chain[:position]
        for field, reason in later.needs.items():
            if not any(field in earlier.written for _, earlier in before):
                return f"{who} {reason}"
        for other, earlier in before:
            for field, reason in earlier.forbids_behind.items():
                if field in later.written:
                    return f"{who} {_deed(field)} behind {other}, {reason}"
            for field, reason in later.forbids_before.items():
                if field in earlier.written:
                    return f"{other} {_deed(field)} before {who}, {reason}"
    return ""


def _deed(field: str) -> str:
    """What a policy does that writes a field."""
    return _DEEDS.get(field, f"sets {field}")
