"""Plain selections: all devices, a random cohort, the fastest.

Like every synchronous selection they choose once for each version, before anything of it is dispatched, and return the decision
unchanged after that. ``Candidates`` describes which devices they choose from, and how a second selection narrows the first.
"""

from dataclasses import dataclass

import numpy as np

from ..checks.fields import Cohort, check_cohort, check_fields, cohort_size
from ..decision import Decision
from ..policy import State
from ..view import View
from .candidates import Candidates, uniform_order


@dataclass(frozen=True)
class All:
    """Every idle device that fits."""

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Choose all."""
        if view.dispatched:
            return decision, state
        pool = Candidates(view, decision)
        return pool.decision(pool.pick(pool.devices, len(pool.devices)), lambda _: "all"), state


@dataclass(frozen=True)
class RandomCohort:
    """``cohort`` devices drawn uniformly without replacement.

    McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017, arXiv
    1602.05629, algorithm 1. The paper's fraction C is a share here: ``cohort: 0.1``.
    """

    cohort: Cohort

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        check_cohort("cohort", self.cohort)

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Draw a cohort."""
        if view.dispatched:
            return decision, state
        pool = Candidates(view, decision)
        order = uniform_order(np.random.default_rng(view.seed), pool.devices)
        picked = pool.pick(order, cohort_size(self.cohort, len(view.profiles)))
        reason = f"random: {len(picked)} of {len(pool.devices)}"
        return pool.decision(picked, lambda _: reason), state


@dataclass(frozen=True)
class Fastest:
    """The ``cohort`` devices that are estimated to finish first; of equally fast ones, the lower number.

    A bound rather than a method: the slow devices never take part, whatever data they hold.
    """

    cohort: Cohort

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        check_cohort("cohort", self.cohort)

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Choose by estimated seconds."""
        if view.dispatched:
            return decision, state
        pool = Candidates(view, decision)
        order = sorted(pool.devices, key=lambda device: pool.estimate(device).seconds)
        picked = pool.pick(order, cohort_size(self.cohort, len(view.profiles)))
        return pool.decision(picked, lambda device: f"fastest: {pool.estimate(device).seconds:.3g} s"), state
