"""ZeroFL as a policy: sparse local training, and updates that hold only the largest entries of each sparse layer.

Qiu, Fernandez-Marques, Gusmao, Gao, Parcollet and Lane, "ZeroFL: Efficient On-Device Training for Federated Learning with Local
Sparsity", ICLR 2022, arXiv 2208.02507. ``training.sparsity`` says which layers are sparse and at what sparsity the model is
evaluated; this policy may train devices at others. Of each sparse layer an update holds the share

    q = min(1, 1 - sparsity + ratio)                                              (the paper's mask ratio is ``ratio``)

by one of the paper's three rules, with w the weights that the device received and w' those that it has trained:

    top_weights       w' where |w'| is largest                 all other weights count as 0 in the mean
    diff_top_weights  w' - w where |w'| is largest             all other weights keep their values
    top_diff          w' - w where |w' - w| is largest         the same

All other tensors are sent whole. Where we depart:

- Values are sent in 16 or 8 bits, and positions in the shortest of several forms, instead of 32 bits each.
- A sparsity and a mask ratio for each device and round, by the seconds that its plan is estimated to take. The costs of sparse
  training are those that were measured of the kernels in use (``kernels.sparse``); with dense kernels sparse training takes as
  long as dense training, and only the uplink gains.

It changes the plans of the policies before it in a chain, and needs a selection before it.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec.structs import replace

from ...comms.codec import CodecSpec
from ...learning.spec import Positive, ShareLeftOut, Sparsity, Training
from ..checks.fields import check_fields
from ..decision import Decision
from ..plan import Plan
from ..policy import NEEDS_PLANS, State
from ..view import View

Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]
Rule = Literal["all", "top_weights", "diff_top_weights", "top_diff"]
_ONE_SELECTION = (
    "which selects what is sent, and a link holds one selection at most; allowed: one of the two, or rule: all"
)
_ONE_DOWN = "which sets the codec of the downlink; allowed: one of the two, or down: configured"
_NEEDS_LAYERS = {
    "training.sparsity": "trains sparse layers; allowed: a mapping, as in training.sparsity: {weights: 0.9, activations: 0.9}"
}
_FORM = CodecSpec("sparse")
# A step for each output channel. Other tensors stay in float16: small running variances would become 0.
_EIGHT_BITS = CodecSpec("uniform", {"bits": 8, "granularity": "channel", "roles": ["sparse"]})


@dataclass(frozen=True)
class ZeroFL:
    """How sparsely each device trains, and what its update holds.

    ``rule``: the selection; "all" sends whole updates. ``ratios``: mask ratios, and ``levels``: sparsities of weights and
    activations (() for those of ``training.sparsity``). A device gets the lowest sparsity, and with it the largest ratio, of
    which its plan is estimated to take at most ``deadline_s``; if none does, the fastest of them. ``deadline_s`` None: the
    median, over the devices that are chosen, of what plans of the first choice take. With one level and one ratio nothing is
    estimated. ``value_bits``: of the entries of sparse layers that are sent; 8 leaves all others at 16. ``down``: the codec of
    the downlink; "sparse" is lossless and codes the zeros that ``top_weights`` leaves in the model, "configured" is that of
    ``codecs.down``.
    """

    rule: Rule = "top_weights"
    ratios: tuple[Ratio, ...] = (0.2,)
    levels: tuple[ShareLeftOut, ...] = ()
    deadline_s: Positive | None = None
    value_bits: Literal[8, 16, 32] = 16
    down: Literal["sparse", "configured"] = "sparse"

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    needs_settings: ClassVar[Mapping[str, str]] = _NEEDS_LAYERS

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        if not self.ratios:
            raise ValueError("ratios is empty; it must hold one mask ratio or more")
        if self.deadline_s is not None and not self._chooses:
            raise ValueError(
                f"deadline_s is {self.deadline_s:g}, and there is nothing to choose; set several ratios or levels"
            )

    @property
    def _chooses(self) -> bool:
        """Whether plans have more than one choice."""
        return max(1, len(self.levels)) * (len(self.ratios) if self.rule != "all" else 1) > 1

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsities at which devices may train."""
        return self.levels

    @property
    def writes(self) -> tuple[str, ...]:
        """The sparsity of training, and what is sent."""
        return ("training.sparsity", *self.replaces, *(("upload",) if self.rule != "all" else ()))

    @property
    def replaces(self) -> tuple[str, ...]:
        """The codec chains that it sets: of the uplink unless updates are sent whole, and of the downlink."""
        up, down = ("codec_up",) if self.rule != "all" else (), ("codec_down",) if self.down == "sparse" else ()
        return (*up, *down)

    @property
    def forbids_before(self) -> Mapping[str, str]:
        """Other codecs of the same directions."""
        reasons = {"codec_up": _ONE_SELECTION, "codec_down": _ONE_DOWN}
        return {field: reasons[field] for field in self.replaces}

    @property
    def forbids_behind(self) -> Mapping[str, str]:
        """The same as before it."""
        return self.forbids_before

    @property
    def needs_codecs(self) -> tuple[str, ...]:
        """The codecs that every device must run."""
        up = [stage.name for stage in self._codecs(0.5)] if self.rule != "all" else []
        return tuple(dict.fromkeys([*up, *([_FORM.name] if self.down == "sparse" else [])]))

    def notices(self, training: Training) -> Sequence[str]:
        """A notice if a mask ratio reaches the sparsity, so that updates are whole."""
        own = training.sparsity.weights if training.sparsity is not None else 0.0
        lowest = min(self.levels, default=own)
        if self.rule == "all" or training.sparsity is None or max(self.ratios) <= lowest:
            return ()
        return (
            f"ratios holds {max(self.ratios):g}, above the sparsity {lowest:g}: it counts as {lowest:g}, and updates at that "
            "sparsity are sent whole",
        )

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Set sparsity, selection and codecs of the plans that train."""
        choices = {plan.device: self._choices(plan) for plan in decision.plans if _trains(plan)}
        deadline_s = self._deadline(view, choices)
        chosen = tuple(
            _fastest(view, choices[plan.device], deadline_s) if plan.device in choices else plan
            for plan in decision.plans
        )
        return replace(decision, plans=chosen), state

    def with_deadline(self, view: View) -> "ZeroFL":
        """The policy with the deadline that follows where all devices are chosen, so that it can plan for each alone."""
        devices = [device for device in view.devices if view.samples[device] >= view.min_samples]
        deadline_s = self._deadline(view, {device: self._choices(view.new_plan(device)) for device in devices})
        return dataclasses.replace(self, deadline_s=deadline_s)

    def _deadline(self, view: View, choices: Mapping[int, Sequence[Plan]]) -> float | None:
        """Seconds that plans may take; None where there is nothing to choose."""
        if self.deadline_s is not None or not self._chooses or not choices:
            return self.deadline_s
        return statistics.median(view.estimate(device, plans[0]).seconds for device, plans in choices.items())

    def _choices(self, plan: Plan) -> list[Plan]:
        """A plan at each sparsity, from the lowest, and at each mask ratio, from the largest."""
        own = plan.training.sparsity or Sparsity()  # where the configuration has none, no run is made
        levels: list[float | None] = [*sorted({*self.levels})] or [None]
        ratios = sorted({*self.ratios}, reverse=True) if self.rule != "all" else [1.0]
        return [self._at(plan, own, level, ratio) for level, ratio in product(levels, ratios)]

    def _at(self, plan: Plan, own: Sparsity, level: float | None, ratio: float) -> Plan:
        """A plan at one sparsity (None: its ``own``) and one mask ratio."""
        sparsity = own if level is None else replace(own, weights=level, activations=level)
        training = replace(plan.training, sparsity=sparsity)
        words = f"zerofl: {sparsity.weights:g} sparse"
        if self.down == "sparse":
            plan = replace(plan, codec_down=(_FORM,))
        if self.rule == "all":
            return plan.with_(words, training=training)
        share = min(1.0, 1 - sparsity.weights + ratio)
        payload: Literal["weights", "difference"] = "weights" if self.rule == "top_weights" else "difference"
        return plan.with_(
            f"{words}, {100 * share:.3g} % by {self.rule}",
            training=training,
            upload=replace(plan.upload, payload=payload),
            codec_up=self._codecs(share),
        )

    def _codecs(self, share: float) -> tuple[CodecSpec, ...]:
        """The codec chain of an update of which the sparse layers keep this share."""
        by = "reference" if self.rule == "diff_top_weights" else "sent"
        options: dict[str, Any] = {"density": round(share, 9), "scope": "tensor", "roles": ["sparse"], "by": by}
        selection = (CodecSpec("topk", options),) if share < 1 else ()
        half = CodecSpec("float16")
        values = {8: (_EIGHT_BITS, half), 16: (half,), 32: ()}[self.value_bits]
        return (*selection, *values, _FORM)


def _trains(plan: Plan) -> bool:
    """Whether a plan trains weights on its device, which come up."""
    return plan.trains_on_device and plan.objective.kind in ("train", "imitate")


def _fastest(view: View, plans: Sequence[Plan], deadline_s: float | None) -> Plan:
    """The first plan that is estimated to end by the deadline, or else the one that ends first."""
    if deadline_s is None:
        return plans[0]
    seconds = []
    for plan in plans:
        seconds.append(view.estimate(plan.device, plan).seconds)
        if seconds[-1] <= deadline_s:
            return plan
    return plans[seconds.index(min(seconds))]
