"""Oort: prefer devices whose data improve the model most for the time that they take.

Lai, Zhu, Madhyastha and Chowdhury, "Oort: efficient federated learning via guided participant selection", OSDI 2021,
arXiv 2010.06081, algorithm 1. With |B| samples, loss l, seconds t, last participation in round L, current round R:

    statistical utility   U = |B| sqrt(mean of l^2)                          clipped at a percentile over the devices
    utility               (U / clip + sqrt(staleness ln R / L)) (T / t)^penalty    the last factor only when t > T
    exploitation          a share 1 - e of the cohort, drawn in proportion to utility among those within ``cutoff`` of
                          the utility that would just make it
    exploration           a share e, drawn among devices without a report in proportion to speed; e decays to a floor
    pacer                 T grows by its first value when the last window of rounds had less utility than the one before

Where we depart:

- U is divided by the clip, so that the staleness term, which is below 1, has the same effect for every data set.
- The pacer compares windows once per window, not every round, so that T grows once for one decline.
- Without ``pacer_step_s`` the first T is the median estimate over the candidates of the first round.
- The newest report counts. A device whose newest report has no finite loss (lost, diverged) has U = 0, and its utility is the
  staleness term. The paper's fairness knob, its noise, and its list of clients chosen too often are not implemented.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from ...learning.spec import Count, Fraction, NonNegative, Positive
from ..checks.fields import Cohort, check_cohort, check_fields, cohort_size
from ..decision import Decision
from ..policy import State
from ..report import Report
from ..view import View
from .candidates import Candidates, weighted_order

Percentile = Annotated[float, msgspec.Meta(gt=0, le=100)]


@dataclass(frozen=True)
class Oort:
    """``cohort`` devices by statistical and system utility; the defaults are the paper's. See the module for each term.

    ``pacer_step_s``: first T, and its growth, in seconds. ``pacer_window``: rounds in a window.
    State: {"version": last version counted, "preferred_s": T, "step_s": its growth, "achieved": U of up to 2 windows}.
    """

    cohort: Cohort
    exploration: Fraction = 0.9
    exploration_decay: Fraction = 0.98
    exploration_floor: Fraction = 0.2
    cutoff: Fraction = 0.95
    clip_percentile: Percentile = 95.0
    staleness: NonNegative = 0.1
    penalty: NonNegative = 2.0
    pacer_step_s: Positive | None = None
    pacer_window: Count = 20

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        check_cohort("cohort", self.cohort)

    def init(self) -> State:
        """No round counted, T not set."""
        return {"version": 0, "preferred_s": None, "step_s": None, "achieved": []}

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Pace, exploit, explore; where one of the two finds too few devices, the other fills the cohort."""
        pool = Candidates(view, decision) if not view.dispatched else None
        if pool is None or not pool.devices:
            return decision, state
        state = self._paced(view, state, pool)
        rng = np.random.default_rng(view.seed)
        count = cohort_size(self.cohort, len(view.profiles))
        num_exploited = count - round(count * self.explored_share(view.version))

        seen = [device for device in pool.devices if device in view.last_reports]
        unseen = [device for device in pool.devices if device not in view.last_reports]
        utility = self.utilities([view.last_reports[device] for device in seen], view.version, state["preferred_s"])
        speeds = 1 / np.array([max(pool.estimate(device).seconds, 1e-9) for device in unseen])
        exploit = iter(self._exploitation_order(rng, seen, utility, num_exploited))
        explore = iter(weighted_order(rng, unseen, speeds))
        picked = pool.pick(exploit, num_exploited)
        picked += pool.pick(explore, count - len(picked))
        picked += pool.pick(exploit, count - len(picked))

        utility_of = dict(zip(seen, utility.tolist(), strict=True))

        def reason(device: int) -> str:
            if device in utility_of:
                return f"oort: utility {utility_of[device]:.3g}"
            return f"oort: explored, {pool.estimate(device).seconds:.3g} s"

        return pool.decision(picked, reason), state

    def explored_share(self, version: int) -> float:
        """Share of the cohort that is drawn among devices without a report, at a version of the model."""
        return max(min(self.exploration, self.exploration_floor), self.exploration * self.exploration_decay**version)

    def utilities(self, reports: Sequence[Report], version: int, preferred_s: float) -> npt.NDArray[np.float64]:
        """[report] utilities of the devices of these reports, with T = ``preferred_s``."""
        if not reports:
            return np.zeros(0)
        statistical = np.array([statistical_utility(report) for report in reports])
        clip = float(np.percentile(statistical, self.clip_percentile))
        if clip > 0:
            statistical = np.minimum(statistical, clip) / clip
        rounds = np.array([report.plan.version + 1 for report in reports])
        seconds = np.array([max(report.virtual.seconds, 1e-9) for report in reports])
        stale = np.sqrt(self.staleness * math.log(version + 1) / rounds)
        return (statistical + stale) * np.minimum(1.0, preferred_s / seconds) ** self.penalty

    def _exploitation_order(
        self, rng: np.random.Generator, seen: list[int], utility: npt.NDArray[np.float64], count: int
    ) -> list[int]:
        """Devices within the cutoff in random order, weighted by utility; then the others from the best down, as reserves."""
        if not seen:
            return []
        ranked = np.argsort(-utility, kind="stable")
        threshold = self.cutoff * utility[ranked[min(max(count, 1), len(seen)) - 1]]
        num_admitted = int(np.count_nonzero(utility >= threshold))
        admitted = ranked[:num_admitted]
        drawn = weighted_order(rng, [seen[i] for i in admitted], utility[admitted])
        return drawn + [seen[i] for i in ranked[num_admitted:]]

    def _paced(self, view: View, state: State, pool: Candidates) -> State:
        """The state with the utility of the last version added, and T adjusted when a window is full."""
        preferred_s, step_s, achieved = state["preferred_s"], state["step_s"], list(state["achieved"])
        if preferred_s is None:
            step_s = self.pacer_step_s or float(np.median([pool.estimate(device).seconds for device in pool.devices]))
            preferred_s = step_s
        if view.version > state["version"]:
            last = [report for report in view.last_reports.values() if report.plan.version == view.version - 1]
            achieved = [*achieved, math.fsum(statistical_utility(report) for report in last)][-2 * self.pacer_window :]
            full = len(achieved) == 2 * self.pacer_window and view.version % self.pacer_window == 0
            if full and sum(achieved[: self.pacer_window]) > sum(achieved[self.pacer_window :]):
                preferred_s += step_s
        return {"version": view.version, "preferred_s": preferred_s, "step_s": step_s, "achieved": achieved}


def statistical_utility(report: Report) -> float:
    """|B| sqrt(mean of the squared loss) of one report; 0 where it has no finite loss."""
    square = report.loss_square
    return report.samples * math.sqrt(square) if square is not None and math.isfinite(square) else 0.0
