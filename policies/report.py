"""The report of a plan: the plan itself, its outcome, and its virtual and measured figures.

*Virtual* figures follow from the profile, the FLOPs and the packet bytes, and are the same on every machine. *Measured* figures
are wall time and memory of this machine; they never influence a decision under the virtual clock.
"""

from enum import Enum

import msgspec

from ..learning.spec import CountOrZero
from .estimate import Estimate
from .plan import Plan


class Outcome(str, Enum):
    """How a plan ended; every dispatched plan has exactly one outcome."""

    DONE = "done"
    LATE = "late"
    LOST = "lost"
    OUT_OF_MEMORY = "out_of_memory"
    REJECTED = "rejected"
    FAILED = "failed"


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of this machine: wall seconds in total and in the training loop, and the worker's peak resident memory."""

    wall_s: float = 0.0
    train_s: float = 0.0
    peak_memory_bytes: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer of a device to one plan, without the plan.

    ``samples``: distinct local samples used (the weight of the update); ``steps``: optimiser steps. ``loss``: mean
    training loss per sample; ``loss_square``: mean of its square over the batches (Oort's statistical utility).
    ``metrics``: evaluation on the device's own test share, if it has one. ``error`` and ``stage``: what went wrong and in which
    stage, when the outcome is not ``done``. ``held``: the model version that the device's end of its link holds now (None: its
    links have no memory, or the packet could not be opened); ``out_of_sync``: the packet builds on a state that the device
    does not hold. ``enforced``: whether the plan ran under a limit of its memory budget (None: none was asked for; false: the
    system has no such limit).
    """

    outcome: Outcome = Outcome.DONE
    samples: int = 0
    steps: int = 0
    loss: float | None = None
    loss_square: float | None = None
    metrics: dict[str, float] = {}
    virtual: Estimate = Estimate()
    measured: Measured = Measured()
    error: str = ""
    stage: str = ""
    held: int | None = None
    out_of_sync: bool = False
    label_counts: tuple[CountOrZero, ...] = ()
    enforced: bool | None = None


class Report(Answer, frozen=True, kw_only=True, omit_defaults=True):
    """The plan, the answer of the device, and the virtual figures that the clock added."""

    plan: Plan

    def answer(self) -> Answer:
        """The report without the plan, as it is sent."""
        return Answer(**{field: getattr(self, field) for field in Answer.__struct_fields__})

    @classmethod
    def of(cls, plan: Plan, answer: Answer) -> "Report":
        """The report of ``plan`` with this answer."""
        return cls(plan=plan, **{field: getattr(answer, field) for field in Answer.__struct_fields__})
