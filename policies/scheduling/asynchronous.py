"""Asynchronous rounds: devices are kept busy, and a version closes after a fixed number of updates.

FedBuff (Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv 2106.06639): up to
``concurrency`` devices train at any time; when one ends, an idle one, drawn at random, starts from the current version; after
every ``buffer`` updates the version closes. With a buffer of 1 it is FedAsync (Xie, Koyejo and Gupta, arXiv 1903.03934). The
weight of late updates is set by ``server.staleness``.

``decide`` is called at the start and after every outcome, so with a buffer of K about K times for each version.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from msgspec.structs import replace

from ...learning.spec import Count
from ..checks.fields import Cohort, check_cohort, check_fields, cohort_size
from ..decision import Decision
from ..policy import State
from ..selection.candidates import Candidates, uniform_order
from ..view import View
from .closing import ONE_NUMBER


@dataclass(frozen=True)
class Asynchronous:
    """``concurrency``: devices in flight at any time, or their share of all. ``buffer``: updates that close a version.

    A device may take part more than once in a version, if it is fast enough.
    """

    concurrency: Cohort = 1.0
    buffer: Count = 1

    writes: ClassVar[tuple[str, ...]] = ("plans", "close_at", "keep_open")
    forbids_before: ClassVar[Mapping[str, str]] = ONE_NUMBER
    forbids_behind: ClassVar[Mapping[str, str]] = ONE_NUMBER
    needs_settings: ClassVar[Mapping[str, str]] = {
        "server.staleness": "needs a rule by which updates of closed versions count: "
        "constant, polynomial or hinge, as in {rule: polynomial, a: 0.5}"
    }

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        check_cohort("concurrency", self.concurrency)

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Choose idle devices for the free places."""
        free = cohort_size(self.concurrency, len(view.profiles)) - len(view.in_flight)
        pool = Candidates(view, decision)
        order = uniform_order(np.random.default_rng(view.seed), pool.devices)
        picked = pool.pick(order, max(0, free))
        decided = pool.decision(picked, lambda _: f"asynchronous: {len(picked)} of {free} free places")
        return replace(decided, close_at=self.buffer, keep_open=True), state
