"""Devices that must stop early: how many steps of its training a plan has the time for, and what its update then counts.

A plan with a deadline, or whose device will be needed for something else, is cut down to the most steps that fit, one at
least; these are the first steps of the whole, bit for bit. The weight of its update, its samples, is multiplied by the share
of the steps that were made, so that half a training counts half. (FedProx, Li et al., MLSys 2020, arXiv 1812.06127, takes
partial work at its full weight.)

How long steps take is by the estimate of a device that is alone on its links, with the seconds of computing that its fate
gives it: a device knows its own speed, but not who will be on its link. There an update may still come late.
"""

from collections.abc import Callable

from msgspec.structs import replace

from ..learning.amount import num_steps
from ..policies.plan import Plan
from ..policies.report import Estimate, Report
from .fate import Fate


def stop_early(plan: Plan, fate: Fate, *, num_samples: int, estimate: Callable[[Plan], Estimate]) -> Plan:
    """The plan cut down to the steps that fit its deadline and its ``fate``; as it is where all fit.

    ``estimate``: of a plan as it stands, without its fate.
    """
    whole = num_steps(num_samples, plan.training)
    if plan.whole_steps or whole <= 1 or (plan.deadline_s is None and fate.steps >= 1):
        return plan

    def of(steps: int) -> Plan:
        return replace(plan, training=replace(plan.training, steps=steps), whole_steps=whole)

    def fits(steps: int) -> bool:
        if plan.deadline_s is None:
            return True
        cost = estimate(of(steps))
        needed_s = cost.seconds + (fate.compute - 1) * cost.compute_s
        return needed_s <= plan.deadline_s * (1 + 1e-9)  # which may have been computed as such an estimate

    fewest, most = 1, max(1, int(whole * fate.steps))
    if most < whole or not fits(whole):
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fewest, most = (middle, most) if fits(middle) else (fewest, middle - 1)
        return of(fewest)
    return plan


def share_done(report: Report, *, num_samples: int) -> float:
    """The share of its plan's steps that a device made, 1 at most: what its update counts. 1 where none stop early."""
    plan = report.plan
    if not plan.whole_steps and plan.train_s is None:
        return 1.0
    return min(1.0, report.steps / (plan.whole_steps or num_steps(num_samples, plan.training)))
