"""The widest part of the model that a budget allows.

The FLOPs of a narrow part are counted on its true integer channel counts, so they are a staircase: about quadratic in the
width, with floors (``min_channels``), layers whose ends cannot be narrowed, and costs that do not depend on the width at all
(latency). No formula gives the width; it is searched by estimates. Each new width costs a dry run of training, so the search
takes few of them, and widths are multiples of 1/1024, so that equal budgets meet at the same widths.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from ..estimate import Estimate
from ..plan import Plan
from ..view import View

GRID = 1024  # widths are multiples of 1/GRID
NARROWEST = 1 / GRID
MOST_TRIED = 6  # widths below 1 that one search estimates at most
ENOUGH = 0.95  # of the budget: the search stops
_AIM = 0.975  # of the budget: the middle of what is enough
_STEP = 0.875  # of the width: the step down from a stair where the parabola fails


def widest(load: Callable[[float], float]) -> float | None:
    """The largest width of a part that stays within its budget, as far as ``MOST_TRIED`` estimates below 1 find it.

    ``load``: cost of a width as a share of the budget, at most 1 where it fits; it does not fall as the width rises. The
    result's load is never above 1. It is at least ``ENOUGH`` where a width with such a load was found, which stairs may
    prevent; otherwise the largest width that was tried and fits. None: not even ``NARROWEST`` fits.

    The whole width is tried first, then the square root of the budget's share of its load. From then on a parabola
    ``a + b width^2`` through the ends of the bracket, or through the last two widths as long as none fits, gives the next one.
    After two steps that moved the same end, the bracket is halved.
    """
    above, load_above = GRID, load(1.0)
    if load_above <= 1:
        return 1.0
    below, load_below, moved = 0, 0.0, 0  # moved: consecutive steps at the lower end, negative: at the upper end
    slope = load_above / GRID**2
    for tried in range(MOST_TRIED):
        if above - below <= 1:
            break
        if not below:
            square = above**2 - (load_above - _AIM) / slope if slope > 0 else math.inf
            guess = math.sqrt(max(0.0, square))
            if moved <= -2 or slope <= 0:
                guess = min(guess, above * _STEP)
            if tried == MOST_TRIED - 1:
                guess = 1
        elif load_below < _AIM and abs(moved) < 2:
            rise = (_AIM - load_below) / (load_above - load_below)
            guess = math.sqrt(below**2 + rise * (above**2 - below**2))
        else:
            guess = (below + above) / 2
        middle = min(max(round(guess), below + 1), above - 1)
        found = load(middle / GRID)
        if found <= 1:
            below, load_below, moved = middle, found, max(moved, 0) + 1
            if found >= ENOUGH:
                break
        else:
            slope = (load_above - found) / (above**2 - middle**2)
            above, load_above, moved = middle, found, min(moved, 0) - 1
    return below / GRID if below else None


class NarrowCosts:
    """Costs of plans at all widths, for one decision. Plans that cost the same share them.

    Id, seed, reasons and host of a plan cost nothing. So devices with the same profile, number of samples and link state, and
    otherwise equal plans, share one estimate for each width: a fleet of 10,000 has few classes. A deadline of the plan itself,
    by which its device would stop early, is left aside: the costs are those of the whole training.
    """

    def __init__(self, view: View, narrow: Callable[[Plan, float], Plan]) -> None:
        """``narrow``: a plan of the whole width at another one. It should choose the same channels for all versions."""
        self._view = view
        self._narrow = narrow
        self._found: dict[tuple[Any, ...], Estimate] = {}
        self._widths: dict[tuple[bytes, Sequence[float]], tuple[float, ...]] = {}

    def of(self, plan: Plan) -> Callable[[float], Estimate]:
        """The cost of a plan by its width."""
        view, device = self._view, plan.device
        key = id(view.profiles[device]), view.samples[device], view.links.get(device, -1), _kind(plan)
        whole = replace(plan, deadline_s=None) if plan.deadline_s is not None else plan

        def cost(width: float) -> Estimate:
            found = self._found.get((key, width))
            if found is None:
                found = self._found[key, width] = view.estimate(device, self._narrow(whole, width))
            return found

        return cost

    def widths(self, plan: Plan, shares: Sequence[float]) -> tuple[float, ...]:
        """The widths at which a plan takes at most these shares of the FLOPs of its whole width: each once, the widest first.

        A share below what the narrowest part takes is that part. They are the same for all devices with such plans.
        """
        where = _kind(plan), shares
        if where not in self._widths:
            cost = self.of(plan)
            whole = cost(1.0).flops
            found = [widest(_share_of(cost, share * whole)) or NARROWEST for share in shares]
            self._widths[where] = tuple(sorted(set(found), reverse=True))
        return self._widths[where]


def _share_of(cost: Callable[[float], Estimate], flops: float) -> Callable[[float], float]:
    """The FLOPs of a plan as a share of ``flops``, by its width."""
    return lambda width: cost(width).flops / flops if flops else 0.0


def _kind(plan: Plan) -> bytes:
    """The fields of a plan that its costs depend on, apart from its device."""
    split = replace(plan.split, host=0) if plan.split is not None else None
    return msgspec.msgpack.encode(replace(plan, id=0, device=0, seed=0, reasons=(), deadline_s=None, split=split))
