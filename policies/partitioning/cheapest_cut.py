"""A cut for each device: of the plans that it could get, the one that it is estimated to end first with, in its memory.

EcoFed's authors choose cuts for each device by reinforcement learning (Wu et al., FedAdapt, IEEE IoT-J 2023, arXiv 2107.04271).
Here nothing is learned: the cost model that the clock charges by is asked for every cut, and at most once for each kind of
device. Accuracy is no part of it: a cut changes no bit of SplitFed's model, nor of EcoFed's up to the end of its trunk.
"""

from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from ..decision import Decision
from ..plan import Plan
from ..selection.candidates import memory_misfit
from ..view import View

ONE_CUT = {"split": "which cuts it too; allowed: one policy that cuts the model"}  # may neither come before nor behind
WHOLE_GRADIENT = {
    "training.optimiser.clip_norm": "cuts the model, and neither side of a cut sees the whole gradient; allowed: null"
}
MOST_TRIED = 32  # an estimate of a cut takes two small training steps
AUTO = "auto"  # in place of a block's name: each device's own cut


def allowed_cuts(blocks: Sequence[str], cut: str, *, first: str = "", last: str = "") -> tuple[str, ...]:
    """Blocks behind which a model of these may be cut, as a policy's fields say; shallowest first.

    ``cut``: a block, AUTO for all from ``first`` to ``last``, "" for the shallowest of these. ``first``, ``last``: "" is the
    model's first block, and its last but one. Raises ``ValueError`` for a block behind which the model cannot be cut, or
    that is not between these.
    """
    clean = tuple(blocks[:-1])
    for name in (first, last, "" if cut == AUTO else cut):
        if (name or not clean) and name not in clean:
            raise ValueError(f"cut is {name!r}; this model can be cut behind: {', '.join(clean) or 'no block'}")
    start = clean.index(first) if first else 0
    end = clean.index(last) + 1 if last else len(clean)
    wanted = clean[start:end]
    if cut == AUTO and wanted:
        return wanted
    if not wanted or (cut or wanted[0]) not in wanted:
        found = f"{cut!r} from {first!r} to {last!r}" if cut == AUTO else repr(cut)
        raise ValueError(f"cut is {found}; it may be behind: {', '.join(wanted) or 'no block'}")
    return (cut or wanted[0],)


def cheapest(view: View, alternatives: Sequence[Plan]) -> Plan | str:
    """The plan with the fewest seconds among those that fit its device's memory; or why none of them does.

    ``alternatives``: at least one, all for one device, by the depth of their cut. Ties: the fewest bytes, then the first. Of
    more than ``MOST_TRIED`` only every n-th is estimated, then those between the neighbours of the best of these.
    """
    device, count = alternatives[0].device, len(alternatives)
    found: dict[int, tuple[bool, float, int, int]] = {}  # by place: does not fit, seconds (or memory), bytes, place

    def estimate(places: Iterable[int]) -> int:
        """Estimate those that have not been yet; the place of the best so far."""
        for place in places:
            if place not in found:
                cost = view.estimate(device, alternatives[place])
                misfit = bool(memory_misfit(view, device, cost.peak_memory_bytes))
                measure = cost.peak_memory_bytes if misfit else cost.seconds
                found[place] = misfit, measure, cost.up_bytes + cost.down_bytes, place
        return min(found.values())[3]

    step = -(-count // MOST_TRIED)
    coarse = estimate([*range(0, count, step), count - 1])
    best = estimate(range(max(0, coarse - step + 1), min(count, coarse + step)))
    misfit, least, *_ = found[best]
    if misfit:
        return memory_misfit(view, device, int(least), verb="needs" if count == 1 else "needs at least")
    return alternatives[best]


def choose_cuts(view: View, decision: Decision, alternatives: Callable[[Plan], Sequence[Plan]]) -> Decision:
    """Each plan of a decision as the cheapest of its ``alternatives``; devices that none of these fits are left out."""
    plans, left_out = [], list(decision.left_out)
    for plan in decision.plans:
        found = cheapest(view, alternatives(plan))
        if isinstance(found, str):
            left_out.append((plan.device, found))
        else:
            plans.append(found)
    return replace(decision, plans=tuple(plans), left_out=tuple(left_out))
