"""What comes back from a device: the plan echoed, what became of it, and two records that are kept apart.

*Virtual* figures follow from the profile, the FLOPs and the packet bytes: the same on every machine. *Measured* figures
are what this machine needed; they never influence a decision under the virtual clock.
"""

from enum import Enum

import msgspec

from .plan import Plan


class Outcome(str, Enum):
    """The one end that every dispatched plan comes to."""

    DONE = "done"
    LATE = "late"
    LOST = "lost"
    OUT_OF_MEMORY = "out_of_memory"
    REJECTED = "rejected"
    FAILED = "failed"


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan costs on a device: predicted before, charged by the virtual clock after, by the same code.

    ``seconds`` = ``down_s`` + ``compute_s`` + ``stream_s`` + ``up_s``; bytes are those of the packets, of the stream to a
    partition host too. ``stream_s``: what a device waits for packets that cross the cut, and for the host, whose work is
    ``host_flops``. ``energy_j`` is 0 where the profile has no ``watts``.
    """

    down_s: float = 0.0
    compute_s: float = 0.0
    stream_s: float = 0.0
    up_s: float = 0.0
    seconds: float = 0.0
    down_bytes: int = 0
    up_bytes: int = 0
    flops: int = 0
    host_flops: int = 0
    peak_memory_bytes: int = 0
    energy_j: float = 0.0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine needed: wall seconds in all and in the training loop, and the worker's peak resident memory."""

    wall_s: float = 0.0
    train_s: float = 0.0
    peak_memory_bytes: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a device sends back for one plan, which it need not repeat.

    ``samples``: distinct local samples used (the weight of the update); ``steps``: optimiser steps. ``loss``: mean
    training loss per sample; ``loss_square``: mean of its square over the batches (Oort's statistical utility).
    ``metrics``: evaluation on the device's own test share, if it has one. ``error`` and ``stage`` say what went wrong
    and where, when the outcome is not ``done``. ``held``: the version of the model that the device's end of its link holds
    now (None: its links have no memory, or it could not open what came); ``out_of_sync``: what came builds on a state that
    it does not hold.
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


class Report(Answer, frozen=True, kw_only=True, omit_defaults=True):
    """All that came back for one plan: the plan, the answer, and the virtual figures that the clock added."""

    plan: Plan

    def answer(self) -> Answer:
        """Without the plan: what travels."""
        return Answer(**{field: getattr(self, field) for field in Answer.__struct_fields__})

    @classmethod
    def of(cls, plan: Plan, answer: Answer) -> "Report":
        """An answer to ``plan``."""
        return cls(plan=plan, **{field: getattr(answer, field) for field in Answer.__struct_fields__})
