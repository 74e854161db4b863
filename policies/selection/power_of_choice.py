"""Power of choice: draw candidates, and choose those with the highest loss.

Cho, Wang and Joshi, "Client selection in federated learning: convergence analysis and power-of-choice selection
strategies", arXiv 2010.01243. This is their variant with stale losses (rpow-d): a candidate's loss is the mean
training loss of its last participation, so that no model is sent to mere candidates. A device that has never taken part has an
infinite loss, as in the paper.

Where we depart: a device whose newest report has no finite loss (it was lost, or diverged) counts as one that has never taken
part. Ranking it last instead would exclude it permanently after one failure.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..checks.fields import Cohort, check_cohort, check_fields, cohort_size
from ..decision import Decision
from ..policy import State
from ..view import View
from .candidates import Candidates, weighted_order


@dataclass(frozen=True)
class PowerOfChoice:
    """Of ``candidates`` devices drawn in proportion to their samples, the ``cohort`` with the highest last-known loss.

    Devices with equal losses, and devices without a report, keep the order of the draw. ``candidates`` equal to ``cohort`` is
    sampling in proportion to samples; more candidates trade variety for speed of convergence.
    """

    cohort: Cohort
    candidates: Cohort

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        check_cohort("cohort", self.cohort)
        check_cohort("candidates", self.candidates)
        if type(self.cohort) is type(self.candidates) and self.candidates < self.cohort:
            raise ValueError(f"candidates is {self.candidates!r}; allowed: at least cohort, which is {self.cohort!r}")

    def init(self) -> State:
        """No state: the losses are in the reports of the view."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Draw, then rank."""
        if view.dispatched:
            return decision, state
        num_cohort, num_drawn = (cohort_size(size, len(view.profiles)) for size in (self.cohort, self.candidates))
        if num_drawn < num_cohort:  # one is a share and the other a number: only now are both known
            raise ValueError(
                f"candidates is {self.candidates!r}, {num_drawn} of {len(view.profiles)} devices; "
                f"allowed: at least the {num_cohort} of the cohort ({self.cohort!r})"
            )
        pool = Candidates(view, decision)
        samples = np.asarray(view.samples, dtype=np.float64)[pool.devices]
        drawn = pool.pick(weighted_order(np.random.default_rng(view.seed), pool.devices, samples), num_drawn)
        losses = {device: _last_loss(view, device) for device in drawn}
        picked = sorted(drawn, key=lambda device: -losses[device])[:num_cohort]
        return pool.decision(picked, lambda device: _reason(losses[device])), state


def _last_loss(view: View, device: int) -> float:
    """Mean training loss of the device's newest report; infinite where there is none."""
    report = view.last_reports.get(device)
    if report is None or report.loss is None or not math.isfinite(report.loss):
        return math.inf
    return report.loss


def _reason(loss: float) -> str:
    return f"power of choice: loss {loss:.3g}" if math.isfinite(loss) else "power of choice: loss unknown"
