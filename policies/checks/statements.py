"""What policies state of themselves, and whether the policies of a chain go together.

The attributes are described in ``policies.policy``. One check compares them: it uses fields of plans and decisions,
and no policy by name.
"""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ...clusters.profile import Kind
from ...learning.parts.part import Part
from ...learning.spec import Training
from ..decision import Decision
from ..plan import Plan, Split, Upload
from .type_check import mismatch

WRITABLE = (*Decision.__struct_fields__, *Plan.__struct_fields__)
# Fields of fields, for policies of which only these matter to others.
_INNER = {
    f"{field}.{name}": None
    for field, struct in (("part", Part), ("split", Split), ("training", Training), ("upload", Upload))
    for name in struct.__struct_fields__
}
# What a policy does that writes a field, as sentences say it; of all other fields, that it sets them.
_DEEDS = {
    "plans": "chooses devices",
    "split": "cuts the model",
    "part.width": "narrows the model",
    "training.sparsity": "sets how sparsely the model is trained",
    "link_down": "gives links a memory",
    "link_up": "gives links a memory",
    "deadline_s": "has devices stop early",
    "close_at": "sets the number of updates that closes a version",
    "tasks": "gives the server a task",
    "part": "sets what part of the model is trained",
    "path": "sets what stands for the model",
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
    by_class: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    cuts: Sequence[str] = ()
    sparsities: Sequence[float] = ()
    auxiliaries: Callable[[Sequence[str]], Sequence[str]] | None = None
    fits_plans: bool = False
    distils: bool = False
    freezes: bool = False
    trunk_end: str = ""
    upload_period: Callable[..., UploadPeriod] | None = None
    notices: Callable[[Training], Sequence[str]] | None = None

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
            if field not in WRITABLE and field not in _INNER:
                close = difflib.get_close_matches(field, (*WRITABLE, *_INNER), n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(
                    f"{name} of {who} names {field!r}{hint}; allowed: fields of a decision or a plan, {', '.join(WRITABLE)}, "
                    "or a field of part, split, training or upload, as in part.width"
                )
    return stated


def chain_fault(chain: Sequence[tuple[str, Statements]]) -> str:
    """The first thing in a chain that does not go together, in one sentence; "" where everything does.

    ``chain``: each policy as sentences name it, and its statements, in order.
    """
    for position, (who, later) in enumerate(chain):
        before = chain[:position]
        for field, reason in later.needs.items():
            if not any(_written(earlier, field) for _, earlier in before):
                return f"{who} {reason}"
        for other, earlier in before:
            # What the later one forbids comes first: where it forbids both orders, the earlier one must not advise the other.
            for field, reason in later.forbids_before.items():
                if written := _written(earlier, field):
                    return f"{other} {_deed(written)} before {who}, {reason}"
            for field, reason in earlier.forbids_behind.items():
                if written := _written(later, field):
                    return f"{who} {_deed(written)} behind {other}, {reason}"
    return ""


def class_fault(field: str, named: Collection[str], classes: Collection[str]) -> str:
    """Why a field that has a value for each class of the fleet does not fit the ``classes``, in one sentence; "" if it does.

    ``named``: the classes that the field names.
    """
    known = ", ".join(sorted(classes))
    if unknown := sorted(set(named) - set(classes)):
        return f"{field} names the class {unknown[0]!r}, which the fleet does not have; allowed: {known}"
    if missing := sorted(set(classes) - set(named)):
        return f"{field} has no {field.removesuffix('s')} for the class {missing[0]!r}; it must name all of: {known}"
    return ""


def _written(stated: Statements, field: str) -> str:
    """The name under which a policy writes a field, or the first of its fields; "" if it does not."""
    return next((name for name in stated.written if name == field or name.startswith(f"{field}.")), "")


def _deed(field: str) -> str:
    """What a policy does that writes a field."""
    return _DEEDS.get(field, f"sets {field}")
