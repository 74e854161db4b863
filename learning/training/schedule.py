"""The learning rate over rounds. A plan carries its round's rate, so that it is complete in itself.

With t = min(1, version / (rounds - 1)):

    constant      1
    exponential   final ** t                           (ZeroFL's schedule, arXiv 2208.02507 sec. 6: 0.1 -> 0.01 is final 0.1)
    cosine        final + (1 - final) (1 + cos(pi t)) / 2
    step          gamma ** (milestones at or before the version)

In the first ``warmup_rounds`` a straight line stands in place of the schedule: warmup_from + (1 - warmup_from) s with
s = (version + 1) / (warmup_rounds + 1). The schedule goes on as if there had been none.
"""

import math
from typing import Annotated, Literal

import msgspec

from ..spec import Fraction


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Factor on the learning rate; ``rounds`` is the horizon (None: the run's own limit when it began)."""

    name: Literal["constant", "exponential", "cosine", "step"] = "constant"
    final: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    gamma: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    milestones: tuple[int, ...] = ()
    rounds: Annotated[int, msgspec.Meta(ge=1)] | None = None
    warmup_rounds: Annotated[int, msgspec.Meta(ge=0)] = 0
    warmup_from: Fraction = 0.0

    @property
    def has_horizon(self) -> bool:
        """Whether the factor depends on the number of rounds."""
        return self.name in ("exponential", "cosine")

    def within(self, rounds: int) -> "Schedule":
        """The same schedule with its horizon spelled out: ``rounds``, where it has one and does not set it itself.

        It is a part of what a run is. Without it, a run that is extended would go back to learning rates of its beginning.
        """
        if self.rounds is not None or not self.has_horizon:
            return self
        return msgspec.structs.replace(self, rounds=max(1, rounds))

    def factor(self, version: int, *, rounds: int) -> float:
        """Factor for the round that starts at ``version``, in a run of ``rounds``."""
        if version < self.warmup_rounds:
            return self.warmup_from + (1 - self.warmup_from) * (version + 1) / (self.warmup_rounds + 1)
        if self.name == "step":
            return float(self.gamma ** sum(version >= m for m in self.milestones))
        progress = min(1.0, version / max(1, (self.rounds or rounds) - 1))
        if self.name == "exponential":
            return float(self.final**progress)
        if self.name == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        return 1.0
