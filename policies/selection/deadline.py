"""Selection by deadline: only devices that are estimated to finish in time.

Nishio and Yonetani, "Client selection for federated learning with heterogeneous resources in mobile edge", ICC 2019,
arXiv 1804.08333 (FedCS). Where we depart:

- FedCS packs uploads one after another into one shared channel. Here every device is estimated with idle links
  (``view.estimate``), so all devices that fit can be chosen and no packing is needed. On a contended shared link a device
  may still be late.
- FedCS first queries a random share of the clients for their resources. Here profiles are known; ``cohort`` draws that
  many at random among the devices that fit, instead of the fastest, so that the same few are not chosen every time.

A version waits for late devices unless ``closing`` behind this policy gives it a deadline.
"""

from dataclasses import dataclass

import numpy as np

from ...learning.spec import Positive
from ..checks.fields import Cohort, check_cohort, check_fields, cohort_size
from ..decision import Decision
from ..policy import State
from ..view import View
from .candidates import Candidates, uniform_order


@dataclass(frozen=True)
class ByDeadline:
    """Devices whose estimate is at most ``deadline_s`` seconds: all of them, or ``cohort`` at random.

    Devices that were tried and do not fit are listed as left out, with their seconds.
    """

    deadline_s: Positive
    cohort: Cohort | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        if self.cohort is not None:
            check_cohort("cohort", self.cohort)

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Choose devices that are in time."""
        if view.dispatched:
            return decision, state
        pool = Candidates(view, decision)
        order, count = pool.devices, len(pool.devices)
        if self.cohort is not None:
            order = uniform_order(np.random.default_rng(view.seed), pool.devices)
            count = cohort_size(self.cohort, len(view.profiles))

        def too_slow(device: int) -> str:
            seconds = pool.estimate(device).seconds
            return f"deadline: needs {seconds:.3g} s, has {self.deadline_s:g} s" if seconds > self.deadline_s else ""

        def in_time(device: int) -> str:
            return f"deadline: {pool.estimate(device).seconds:.3g} s of {self.deadline_s:g} s"

        return pool.decision(pool.pick(order, count, unless=too_slow), in_time), state
