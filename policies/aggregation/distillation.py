"""Ensemble distillation as a policy: it adds the server's task to rounds, and the label counts that it needs to their plans.

Lin, Kong, Stich and Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020, arXiv
2006.07242. REFT (arXiv 2308.13662) distils its narrow models in this way. The task itself is described in ``policies.tasks``.

It changes the plans of the policies before it in a chain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec.structs import replace

from ...learning.spec import Count, CountOrZero, NonNegative, Positive
from ..checks.fields import check_fields
from ..decision import Decision
from ..plan import Plan
from ..policy import NEEDS_PLANS, State
from ..tasks import Distil
from ..view import View

_ONE_TASK = {"tasks": "which changes the model of a round too; allowed: one of the two"}


@dataclass(frozen=True)
class Distillation:
    """Ensemble distillation in every ``every``-th round, from round ``from_round`` on (the first is 0).

    The other fields are those of the task ``Distil``. With a ``class_prior`` above 0 devices send how many samples of each
    class they have.
    """

    steps: CountOrZero = Distil().steps
    learning_rate: Positive = Distil().learning_rate
    batch_size: Count = Distil().batch_size
    temperature: Positive = Distil().temperature
    weighting: Literal["equal", "samples"] = Distil().weighting
    class_prior: NonNegative = Distil().class_prior
    held_out: Annotated[float, msgspec.Meta(gt=0, lt=1)] = Distil().held_out
    check_every: Count = Distil().check_every
    patience: Count = Distil().patience
    every: Count = 1
    from_round: CountOrZero = 0

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    distils: ClassVar[bool] = True
    forbids_before: ClassVar[Mapping[str, str]] = _ONE_TASK
    forbids_behind: ClassVar[Mapping[str, str]] = _ONE_TASK

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)

    @property
    def writes(self) -> tuple[str, ...]:
        """Tasks; and of plans the upload, where label counts are needed."""
        return ("tasks", "upload") if self.class_prior > 0 else ("tasks",)

    @property
    def needs_kinds(self) -> tuple[str, ...]:
        """Label counts are of the kind ``labels``."""
        return ("labels",) if self.class_prior > 0 else ()

    @property
    def task(self) -> Distil:
        """The task of a round."""
        return Distil(**{name: getattr(self, name) for name in Distil.__struct_fields__})

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Add the task to the first plans of a version.

        Label counts are asked for in all plans: where updates of closed versions are folded, each may teach in a later round.
        """
        if not decision.plans:
            return decision, state
        if self.class_prior > 0:
            decision = replace(decision, plans=tuple(_count_labels(plan) for plan in decision.plans))
        due = view.version >= self.from_round and (view.version - self.from_round) % self.every == 0
        if due and view.dispatched == 0:
            decision = replace(decision, tasks=(*decision.tasks, self.task))
        return decision, state


def _count_labels(plan: Plan) -> Plan:
    """A plan whose report says how many samples of each class its device has."""
    if plan.upload.label_counts:
        return plan
    return plan.with_("distillation: label counts", upload=replace(plan.upload, label_counts=True))
