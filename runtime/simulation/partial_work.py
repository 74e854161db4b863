"""Devices that must stop early: how many steps of its training a plan has the time for, and what its update then counts.

A plan with a deadline, or whose device will be needed for something else, is cut down to the most steps that fit, one at
least; these are the first steps of the whole, bit for bit. The weight of its update, its samples, is multiplied by the share
of the steps that were made: half a training counts half as much as a whole one in the mean of their version. (Alone in its
version it is the mean, as ever. FedProx, Li et al., MLSys 2020, arXiv 1812.06127, takes partial work at its full weight.)

How long steps take is by the estimate of the device as it is this time, alone on its links: it knows its own speed and what
its link carries now, but not who will be on a shared one. There an update may still come late.
"""

from collections.abc import Callable

from msgspec.structs import replace

from ...learning.costs.amount import num_steps
from ...policies.estimate import Estimate
from ...policies.plan import Plan
from ...policies.report import Report


def stop_early(plan: Plan, *, num_samples: int, estimate: Callable[[Plan], Estimate], share: float = 1.0) -> Plan:
    """The plan cut down to the steps that fit its deadline, and to ``share`` of all; as it is where all fit.

    ``estimate``: of a plan as it stands, on its device as it is this time.
    """
    whole = num_steps(num_samples, plan.training)
    as_it_is = plan.whole_steps or whole <= 1 or (plan.deadline_s is None and share >= 1)
    if as_it_is or plan.objective.kind == "evaluate":
        return plan

    def of(steps: int) -> Plan:
        return replace(plan, training=replace(plan.training, steps=steps), whole_steps=whole)

    def fits(steps: int) -> bool:
        # (The deadline may have been computed as such an estimate.)
        return plan.deadline_s is None or estimate(of(steps)).seconds <= plan.deadline_s * (1 + 1e-9)

    fewest, most = 1, max(1, int(whole * share))
    if most < whole or not fits(whole):
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fewest, most = (middle, most) if fits(middle) else (fewest, middle - 1)
        return of(fewest)
    return plan


def share_done(report: Report, *, num_samples: int) -> float:
    """The share of its plan's steps that a device made, as far as it was to make them: what its update counts."""
    plan = report.plan
    if plan.whole_steps:
        assert plan.training.steps is not None
        return min(report.steps, plan.training.steps) / plan.whole_steps
    whole = num_steps(num_samples, plan.training) if plan.train_s is not None else 0
    return min(report.steps, whole) / whole if whole else 1.0
