"""What the policies that cut the model share: the allowed cuts, the choice of a cut, and the codec of activations.

Each device gets the cut with the shortest estimated time among those that fit its memory. EcoFed's authors choose cuts for each
device by reinforcement learning (Wu et al., FedAdapt, IEEE IoT-J 2023, arXiv 2107.04271). Here nothing is learned: every cut is
estimated by the cost model that the virtual clock charges by. Accuracy plays no role: a cut changes no bit of SplitFed's model,
nor of EcoFed's up to the end of its trunk.

Activations are coded with one step for each channel, unsigned codes where no value is negative, then entropy coding. EcoFed (Wu
et al., IEEE TPDS 2024, arXiv 2304.05495) has signed 8 bit codes with one step for the whole tensor, and no entropy coding.
Labels are not quantised.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec.structs import replace

from ...comms.codec import CodecSpec
from ..decision import Decision
from ..plan import Plan
from ..selection.candidates import memory_misfit
from ..view import View

ONE_CUT = {"split": "which cuts it too; allowed: one policy that cuts the model"}  # forbidden before and behind
WHOLE_GRADIENT = {
    "training.optimiser.clip_norm": "cuts the model, and neither side of a cut sees the whole gradient; allowed: null"
}
MOST_TRIED = 32  # estimates of all cuts; more are searched coarsely: each takes two small training steps
Bits = Annotated[int, msgspec.Meta(ge=0, le=8)]  # of the code of activations; 0: they are not coded
AUTO = "auto"  # in place of a block's name: a cut for each device


def allowed_cuts(blocks: Sequence[str], cut: str, *, first: str = "", last: str = "") -> tuple[str, ...]:
    """Names of ``blocks`` behind which the fields of a policy allow a cut, shallowest first.

    ``cut``: a block, AUTO for all from ``first`` to ``last``, "" for the shallowest of these. ``first``, ``last``: "" stands
    for the model's first block, and its last but one. Raises ``ValueError`` for a block behind which the model cannot be
    cut, or that is not between ``first`` and ``last``.
    """
    clean = tuple(blocks[:-1])
    for name in (first, last, "" if cut == AUTO else cut):
        if (name or not clean) and name not in clean:
            raise ValueError(f"cut is {name!r}; this model can be cut behind: {', '.join(clean) or 'no block'}")
    start = clean.index(first) if first else 0
    end = clean.index(last) + 1 if last else len(clean)
    allowed = clean[start:end]
    if cut == AUTO and allowed:
        return allowed
    if not allowed or (cut or allowed[0]) not in allowed:
        setting = f"{cut!r} from {first!r} to {last!r}" if cut == AUTO else repr(cut)
        raise ValueError(f"cut is {setting}; it may be behind: {', '.join(allowed) or 'no block'}")
    return (cut or allowed[0],)


def cheapest(view: View, alternatives: Sequence[Plan]) -> Plan | str:
    """The plan with the fewest estimated seconds among those that fit its device's memory, or the reason why none fits.

    ``alternatives``: at least one, all for one device, by the depth of their cut. Ties: the fewest bytes, then the first. Of
    more than ``MOST_TRIED`` only every n-th is estimated, then those between the neighbours of the best of these.
    """
    device, count = alternatives[0].device, len(alternatives)
    costs: dict[int, tuple[bool, float, int, int]] = {}  # by index: does not fit, seconds (or memory), bytes, index

    def estimate(indices: Iterable[int]) -> int:
        """Estimate those that have not been estimated; the index of the best so far."""
        for index in indices:
            if index not in costs:
                cost = view.estimate(device, alternatives[index])
                misfit = bool(memory_misfit(view, device, cost.peak_memory_bytes))
                measure = cost.peak_memory_bytes if misfit else cost.seconds
                costs[index] = misfit, measure, cost.up_bytes + cost.down_bytes, index
        return min(costs.values())[3]

    step = -(-count // MOST_TRIED)
    coarse = estimate([*range(0, count, step), count - 1])
    best = estimate(range(max(0, coarse - step + 1), min(count, coarse + step)))
    misfit, least, *_ = costs[best]
    if misfit:
        return memory_misfit(view, device, int(least), verb="needs" if count == 1 else "needs at least")
    return alternatives[best]


def choose_cuts(view: View, decision: Decision, alternatives: Callable[[Plan], Sequence[Plan]]) -> Decision:
    """The decision with the cheapest of the ``alternatives`` of each plan; devices that none of them fits are left out."""
    plans, left_out = [], list(decision.left_out)
    for plan in decision.plans:
        chosen = cheapest(view, alternatives(plan))
        if isinstance(chosen, str):
            left_out.append((plan.device, chosen))
        else:
            plans.append(chosen)
    return replace(decision, plans=tuple(plans), left_out=tuple(left_out))


def check_bits(bits: int) -> None:
    """Raise ``ValueError`` for 1, with which there is no code."""
    if bits == 1:
        raise ValueError("bits is 1; it must be 0 or between 2 and 8")


def activation_codec(bits: int) -> tuple[CodecSpec, ...]:
    """The codec chain for codes of ``bits`` bits; 0: none, activations stay float32."""
    if not bits:
        return ()
    grid = {"bits": bits, "signed": "auto", "granularity": "channel", "roles": ["activation"]}
    return (CodecSpec("uniform", grid), CodecSpec("entropy"))
