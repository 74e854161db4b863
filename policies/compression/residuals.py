"""ResFed as a policy: both directions of each plan's link carry compressed residuals against shared predictions.

Song, Zhou, Lyu, Festag, Knoll, "ResFed: Communication-Efficient Federated Learning With Deep Compressed Residuals", IEEE
Internet of Things Journal 11(6), 2024, arXiv 2212.05602. Where we depart:

- ``up: auto`` is the delta rule with error feedback at both ends. The paper's default (half_step in both directions) is
  available by name: it diverges when devices miss rounds, and without missed rounds it was less accurate on digits
  (benchmarks/resfed.py).
- Tensors of one dimension, and statistics, are quantised separately and never enter the top-k.
- Levels are centroids, not medians, and the quantiser drops no entry that top-k has kept.
- Positions are entropy coded by the statistics of the data (``entropy``), not by runs of 16 bits.

It changes the plans of the policies before it in a chain, and needs a selection before it. A selection that goes by estimates
belongs behind it: ``[all, residuals, oort]``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec.structs import replace

from ...clusters.profile import DeviceProfile
from ...comms.codec import CodecSpec
from ...comms.links.predict import ANCHORED, Residual
from ...learning.spec import Positive
from ..checks.fields import check_fields
from ..decision import Decision
from ..plan import Plan
from ..policy import NEEDS_PLANS, State
from ..view import View

Density = Annotated[float, msgspec.Meta(gt=0, le=1)]
Levels = Annotated[int, msgspec.Meta(ge=1, le=16)]
UpRule = Literal["auto", "none", "delta", "drift", "stationary", "half_step", "second_order"]
DownRule = Literal["auto", "none", "stationary", "half_step", "second_order"]
_NO_CUT = {"split": "which gives links a memory, and those of a cut model cannot have one yet; allowed: one of the two"}
_STAGES = ("topk", "ternary", "uniform")
_BACK_ENDS = ("entropy", "rans", "lz4")  # the best first


@dataclass(frozen=True)
class Residuals:
    """Residual coding of both directions.

    ``up``, ``down``: the prediction rule of each direction, "auto", or "none" (then dense, by the configured codecs).
    ``density``: share of the weights that one message carries; ``levels``: values for each sign, at that density.
    ``steps``: further pairs of density and levels, from the largest to the smallest messages: a device gets the first pair of
    which one message is estimated to take at most ``upload_s`` (``download_s``); if none does, the last one on the uplink, and
    on the downlink the one that takes the fewest bytes now. On the downlink a device only moves on to later steps: the state
    that it holds belongs to its step, and each move costs a dense model. ``scope``: the set from which the largest entries are
    chosen: all tensors together, each tensor, or all tensors after scaling each by its size. ``vector_bits``: bits of tensors
    of one dimension.
    """

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS

    up: UpRule = "auto"
    down: DownRule = "auto"
    density: Density = 0.007
    levels: Levels = 1
    steps: tuple[tuple[Density, Levels], ...] = ()
    upload_s: Positive | None = None
    download_s: Positive | None = None
    scope: Literal["global", "tensor", "normalised"] = "global"
    vector_bits: Annotated[int, msgspec.Meta(ge=2, le=8)] = 4

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        if self.steps and self.upload_s is None and self.download_s is None:
            raise ValueError(
                f"steps is {self.steps!r}, which no limit chooses among; set upload_s or download_s, or leave it empty"
            )

    def init(self) -> State:
        """{device: number of its step on the downlink}, for devices that are not at the first step."""
        return {}

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Set the link rules and codecs of the plans; a plan that collects statistics sends no weights to be predicted."""
        reached = dict(state)
        plans = tuple(
            plan if plan.objective.kind == "collect" else self._code(plan, view, reached) for plan in decision.plans
        )
        return replace(decision, plans=plans), reached

    def _code(self, plan: Plan, view: View, reached: dict[str, int]) -> Plan:
        """One plan with residuals in both directions; updates ``reached``."""
        back_end = _back_end(view.profiles[plan.device])
        up, down = self._up_rule(), self._down_rule()
        changes = []
        if down is not None:
            at = reached.get(str(plan.device), 0)
            plan, step = self._fit_down(replace(plan, link_down=down), view, back_end, at)
            changes.append(f"down {down.rule} {self._steps[step][0]:g}")
            if step:
                reached[str(plan.device)] = step
        if up is not None:
            plan, density = self._fit_up(replace(plan, link_up=up), view, back_end)
            changes.append(f"up {up.rule} {density:g}")
        return plan.with_(f"residuals: {', '.join(changes) or 'none'}")

    def _up_rule(self) -> Residual | None:
        """Rule of the uplink, with error feedback where that is stable."""
        if self.up == "none":
            return None
        rule = "delta" if self.up == "auto" else self.up
        return Residual(rule=rule, feedback=rule in ANCHORED)

    def _down_rule(self) -> Residual | None:
        """Rule of the downlink; its error feedback is stable only where the uplink starts from the received model."""
        if self.down == "none":
            return None
        rule = "stationary" if self.down == "auto" else self.down
        return Residual(rule=rule, feedback=self.up in ("auto", "none", *ANCHORED))

    @property
    def replaces(self) -> tuple[str, ...]:
        """Codec chains that it sets in every plan."""
        directions = {"codec_down": self.down, "codec_up": self.up}
        return tuple(field for field, rule in directions.items() if rule != "none")

    @property
    def writes(self) -> tuple[str, ...]:
        """Codecs and link rules of the directions that it codes."""
        return (*self.replaces, *(field.replace("codec", "link") for field in self.replaces))

    @property
    def forbids_before(self) -> Mapping[str, str]:
        """Links of a cut model have no memory yet."""
        return _NO_CUT if self.replaces else {}

    @property
    def forbids_behind(self) -> Mapping[str, str]:
        """The same as before it."""
        return self.forbids_before

    @property
    def needs_codecs(self) -> tuple[str, ...]:
        """Codecs that every device must run. The entropy coder is chosen among those that a device runs."""
        return _STAGES if self.replaces else ()

    @property
    def _steps(self) -> tuple[tuple[float, int], ...]:
        """Pairs of density and levels, from the largest to the smallest messages."""
        return (self.density, self.levels), *self.steps

    def _fit_up(self, plan: Plan, view: View, back_end: str) -> tuple[Plan, float]:
        """The plan with the first step whose upload takes at most ``upload_s``, or the last; its density."""
        for density, levels in self._steps:
            fitted = replace(plan, codec_up=self._codecs(density, levels, back_end))
            if self.upload_s is None or view.estimate(plan.device, fitted).up_s <= self.upload_s:
                break
        return fitted, density

    def _fit_down(self, plan: Plan, view: View, back_end: str, first: int) -> tuple[Plan, int]:
        """The plan with the first step, from ``first`` on, of which one message takes at most ``download_s``; its number.

        One message is that of a link without memory: messages that a device has missed are no reason to move, since moving
        costs more. Where none is short enough, the step with the fewest bytes, including those of missed messages and of
        moving.
        """
        steps = self._steps
        fitted = {n: replace(plan, codec_down=self._codecs(*steps[n], back_end)) for n in range(first, len(steps))}
        if self.download_s is None:
            return fitted[first], first
        total_bytes: dict[int, tuple[int, int]] = {}
        for number, candidate in fitted.items():
            message = view.estimate(plan.device, replace(candidate, link_down=None))
            if message.down_s <= self.download_s:
                return candidate, number
            total_bytes[number] = view.estimate(plan.device, candidate).down_bytes, message.down_bytes
        number = min(total_bytes, key=lambda number: total_bytes[number])
        return fitted[number], number

    def _codecs(self, density: float, levels: int, back_end: str) -> tuple[CodecSpec, ...]:
        """The codec chain of one direction."""
        options: tuple[dict[str, Any], ...] = (
            {"density": density, "scope": self.scope},
            {"levels": levels, "scope": "tensor" if self.scope == "tensor" else "global"},
            {"bits": self.vector_bits, "roles": ["vector", "statistic"]},
        )
        stages = tuple(CodecSpec(name, chosen) for name, chosen in zip(_STAGES, options, strict=True))
        return (*stages, CodecSpec(back_end)) if back_end else stages


def _back_end(profile: DeviceProfile) -> str:
    """The best entropy coder that a device runs; "" for none."""
    if profile.codecs is None:
        return _BACK_ENDS[0]
    return next((name for name in _BACK_ENDS if name in profile.codecs), "")
