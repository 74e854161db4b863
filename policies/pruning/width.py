"""The width of the model on each device, from its speed and its memory.

Three published methods differ in how narrow a device's part is and in which channels it holds:

- REFT (Desai, Hilal and Eldardiry, arXiv 2308.13662): each device's level follows from its capability, and the channels with
  the largest L1 norms are kept. The text of its Eq. (4) is not known to us: ``linear`` is the plain reading of it, and
  ``deadline`` gives each device what it can train in a given time, by default that of the fleet's median device.
- HeteroFL (Diao, Ding and Tarokh, ICLR 2021, arXiv 2010.01264): levels of 1 to 1/16 of the channels, always the first ones.
- FedRolex (Alam, Liu, Yan and Zhang, NeurIPS 2022, arXiv 2212.01548): the same levels, a window of channels that moves on.

It changes the plans of the policies before it in a chain. A policy that cuts the model belongs before it: the device's part,
and the host's, are then as wide as the device allows. A second selection may follow.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec.structs import replace

from ...clusters.profile import DeviceProfile
from ...learning.data.batches import num_steps
from ...learning.parts.part import ChannelRule
from ...learning.spec import Count, CountOrZero, NonNegative, Positive
from ..checks.fields import check_fields
from ..checks.statements import class_fault
from ..decision import Decision
from ..estimate import Estimate
from ..plan import Plan
from ..policy import NEEDS_PLANS, State
from ..report import Outcome, Report
from ..selection.candidates import megabytes, memory_budget, memory_misfit
from ..view import View
from .capacity import NARROWEST, NarrowCosts, widest

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
_BEHIND = {
    "split": "which sets the width of both sides of a cut; allowed: the other order",
    "part": "which sets the widths of the parts that it is given; allowed: one policy that sets widths, behind the others",
}


CostOf = Callable[[float], Estimate]  # of one plan, by its width


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """What the budgets of all devices follow from: a deadline, or the fastest device's speed (FLOP/s); None: no such limit."""

    deadline_s: float | None = None
    fastest: float | None = None


@dataclass(frozen=True)
class _Budget:
    """What one device may spend. Of ``seconds`` and ``flops`` at most one is a limit (not None); ``memory`` always is.

    ``slowness``: the device's declared speed divided by its measured one. ``share``: ``flops`` as a share of the whole width's.
    """

    memory: int
    seconds: float | None = None
    slowness: float = 1.0
    flops: float | None = None
    share: float = 1.0

    def seconds_of(self, cost: Estimate) -> float:
        """Seconds of a plan at the device's measured speed."""
        return cost.seconds + cost.compute_s * (self.slowness - 1)

    def used(self, cost: Estimate) -> float:
        """The share of the seconds or FLOPs that a plan takes."""
        if self.seconds is not None:
            return self.seconds_of(cost) / self.seconds
        return cost.flops / self.flops if self.flops else 0.0

    def load(self, cost: Estimate, margin: float) -> float:
        """The largest share of a limit that a plan takes, where seconds and FLOPs are multiplied by ``margin``."""
        return max(self.used(cost) * margin, cost.peak_memory_bytes / self.memory)

    def misfit(self, cost: Estimate, verb: str) -> str:
        """Why a plan takes more than its seconds or FLOPs allow. ``verb``: "needs", or "needs at least" for the narrowest."""
        if self.seconds is not None:
            return f"deadline: {verb} {self.seconds_of(cost):.3g} s, has {self.seconds:.3g} s"
        return (
            f"speed: {verb} {100 * self.share * self.used(cost):.3g} % of the FLOPs, {100 * self.share:.3g} % allowed"
        )

    def reason(self, width: float, cost: Estimate, whole: Estimate) -> str:
        """The reason of a plan: its width, and the limit that it comes nearest to. ``whole``: cost of the whole width."""
        limited = self.seconds is not None or self.flops is not None
        words = ["width: whole"]
        if width != 1:
            percent = 100 * cost.flops / whole.flops if whole.flops else 100.0
            shown = f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
            words = [f"width: {width:.3g} of the channels", f"{shown} % of the FLOPs"]
        if width != 1 and limited and cost.peak_memory_bytes / self.memory > self.used(cost):
            words.append(
                f"memory: needs {megabytes(cost.peak_memory_bytes, math.ceil)}, has {megabytes(self.memory, math.floor)}"
            )
        elif self.seconds is not None:
            words.append(f"{self.seconds_of(cost):.3g} of {self.seconds:.3g} s")
        elif self.flops is not None:
            words.append(f"{100 * self.share:.3g} % allowed")
        return ", ".join(words)


@dataclass(frozen=True)
class Width:
    """The share of the channels that each device holds, by one of three rules, and never more than its memory allows.

    ``rule`` "deadline": the widest part whose plan is estimated to take ``deadline_s`` (null: as long as the fleet's median
    device takes for the whole model, by the declared profiles at the first decision, so that half of the devices stay whole).
    "linear": the widest part with at most the share ``1 - most_pruned (1 - speed / fastest speed)`` of the FLOPs. "fixed":
    ``widths`` gives each class of the fleet its width.

    ``levels``: devices get the widest of these that fits, where ``unit`` says what they are shares of: the FLOPs, or the
    channels (``width``); (): each device its own width. A level is evaluated anew ``every`` so many rounds; a device moves to a
    wider level only where that fits the budget divided by ``1 + hysteresis``, and to a narrower one, or out, at once when its
    own does not fit any more. Where the budget follows from a device (without ``deadline_s``), that device's own level may
    exceed it by the share ``hysteresis`` first.

    ``too_slow``, under the deadline rule: a device that no level fits in time is left out, with the reason ("leave_out"), or
    gets the narrowest level and stops at the deadline ("fewer_steps"). Its update then counts by the share of the steps that it
    made. A device that has too little memory, or not the time for one step, is always left out.

    ``channels``: the rule by which channels are chosen, of which each group keeps ``min_channels``. ``refresh``: rounds between
    rankings by the weights, and between steps of a rolling window. ``warm_up``: first rounds, in which a rule that ranks by
    weights is replaced by ``prefix``, since the norms of an untrained model mean nothing. ``scaled``: HeteroFL's scaler.
    ``smoothing``: weight of the newest measurement in the running mean of a device's speed under the wall clock, where reports
    say how long a plan took to train (without a cut). Under the virtual clock speeds are the declared ones.
    """

    rule: Literal["deadline", "linear", "fixed"] = "deadline"
    deadline_s: Positive | None = None
    most_pruned: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    widths: Mapping[str, Share] | None = field(default=None, hash=False)
    levels: tuple[Share, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    unit: Literal["flops", "width"] = "flops"
    too_slow: Literal["leave_out", "fewer_steps"] = "leave_out"
    hysteresis: NonNegative = 0.15
    every: Count = 10
    channels: ChannelRule = "l1"
    min_channels: Count = 2
    refresh: Count = 10
    warm_up: CountOrZero = 3
    scaled: bool = False
    smoothing: Share = 0.5

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    forbids_behind: ClassVar[Mapping[str, str]] = _BEHIND
    fits_plans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        if self.deadline_s is not None and self.rule != "deadline":
            raise ValueError(f"deadline_s is {self.deadline_s:g}; it counts only where rule is 'deadline'")
        if self.widths is not None and self.rule != "fixed":
            raise ValueError(f"widths is {dict(self.widths)!r}; it counts only where rule is 'fixed'")
        if self.too_slow == "fewer_steps" and self.rule != "deadline":
            raise ValueError("too_slow is 'fewer_steps'; it counts only where rule is 'deadline'")
        if self.rule == "fixed" and not self.widths:
            raise ValueError("rule is 'fixed' and widths is empty; it must give each class of the fleet its width")

    @property
    def writes(self) -> tuple[str, ...]:
        """The width of parts, unless all are whole; and their deadline, where devices may stop early."""
        if self.widths and set(self.widths.values()) == {1}:
            return ()
        return ("part.width", "deadline_s") if self.too_slow == "fewer_steps" else ("part.width",)

    @property
    def by_class(self) -> Mapping[str, Sequence[str]]:
        """``widths`` has a value for each class of the fleet."""
        return {"widths": tuple(self.widths)} if self.widths else {}

    def init(self) -> State:
        """``deadline_s``: where it follows from the fleet. ``devices``: {device: its width, and since which version}.

        Under the wall clock also its measured speed (FLOP/s), and the id of the plan that was measured last.
        """
        return {"deadline_s": None, "devices": {}}

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Narrow the plans; devices that no width fits stop early, or are left out."""
        if not decision.plans:
            return decision, state
        # A device that was narrowed but not sent (a selection behind this policy) is forgotten.
        known = {
            name: entry
            for name, entry in state["devices"].items()
            if int(name) in view.participation or int(name) in view.in_flight
        }
        terms = self._terms(view, state["deadline_s"], known)
        costs = NarrowCosts(view, self._narrow)
        plans, left_out = [], list(decision.left_out)
        for plan in decision.plans:
            if plan.replays or plan.objective.kind == "evaluate":
                plans.append(plan)
                continue
            entry = self._measured(view, plan, known.get(str(plan.device), {}))
            cost_of = costs.of(plan)
            budget = self._budget(view, plan, cost_of(1.0), entry.get("speed"), terms)
            alternatives = self._alternatives(view, plan, costs)
            width, since = self._choose(view.version, entry, alternatives, budget, cost_of)
            if width is None:
                narrowest = alternatives[-1] if alternatives else NARROWEST
                least = self._least(view, plan, narrowest, cost_of)
                if self.too_slow == "fewer_steps" and budget.load(least, 1.0) <= 1:
                    # Its width is not kept: the tolerance is for levels that fit once.
                    known[str(plan.device)] = {key: entry[key] for key in ("speed", "report") if key in entry}
                    plans.append(self._shortened(plan, narrowest, view.version, budget))
                    continue
                verb = "needs" if len(alternatives) == 1 and self.too_slow == "leave_out" else "needs at least"
                misfit = memory_misfit(view, plan.device, least.peak_memory_bytes, verb=verb)
                left_out.append((plan.device, misfit or budget.misfit(least, verb)))
                continue
            cost = cost_of(width)
            known[str(plan.device)] = entry | {"width": width, "at": since}
            reason = budget.reason(width, cost, cost_of(1.0))
            plans.append(self._narrow(plan, width, view.version).with_(reason))
        kept = terms.deadline_s if self.deadline_s is None else None
        decided = replace(decision, plans=tuple(plans), left_out=tuple(left_out))
        return decided, {"deadline_s": kept, "devices": known}

    def _least(self, view: View, plan: Plan, width: float, cost_of: CostOf) -> Estimate:
        """The least that a plan costs at its narrowest width: whole, or one step where it may be stopped."""
        if self.too_slow == "leave_out":
            return cost_of(width)
        one = replace(self._narrow(plan, width), training=replace(plan.training, steps=1), deadline_s=None)
        return view.estimate(plan.device, one)

    def _shortened(self, plan: Plan, width: float, version: int, budget: _Budget) -> Plan:
        """The plan at a width, to stop when its seconds are over, or at its own deadline if that comes first."""
        assert budget.seconds is not None
        stops_s = min(budget.seconds, plan.deadline_s or math.inf)
        narrow = self._narrow(plan, width, version)
        return narrow.with_(f"width: {width:.3g} of the channels, stops after {stops_s:.3g} s", deadline_s=stops_s)

    def _terms(self, view: View, kept_s: float | None, known: Mapping[str, Any]) -> _Terms:
        """What the budgets of all devices follow from. ``kept_s``: the deadline that the state holds."""
        if self.rule == "linear":
            return _Terms(fastest=max(_speed(known, device, profile) for device, profile in enumerate(view.profiles)))
        if self.rule == "deadline":
            return _Terms(deadline_s=self.deadline_s or kept_s or median_s(view))
        if fault := class_fault("widths", self.widths or {}, {profile.name for profile in view.profiles}):
            raise ValueError(fault)
        return _Terms()

    def _measured(self, view: View, plan: Plan, entry: Mapping[str, Any]) -> dict[str, Any]:
        """A device's entry with its measured speed, under the wall clock and where its last report is new."""
        report = view.last_reports.get(plan.device)
        if view.clock != "wall" or report is None or report.plan.id == entry.get("report"):
            return dict(entry)
        flops = _flops_done(view, report)
        if not flops or report.measured.train_s <= 0:
            return dict(entry)
        newest = flops / report.measured.train_s
        speed = self.smoothing * newest + (1 - self.smoothing) * entry.get("speed", newest)
        return {**entry, "speed": speed, "report": report.plan.id}

    def _budget(self, view: View, plan: Plan, whole: Estimate, speed: float | None, terms: _Terms) -> _Budget:
        """What a device may spend on a plan. ``speed``: its measured one, if known; ``whole``: cost of the whole width."""
        declared, memory = view.profiles[plan.device].flop_per_s, memory_budget(view, plan.device)
        if terms.deadline_s is not None:
            return _Budget(memory, seconds=terms.deadline_s, slowness=declared / (speed or declared))
        if terms.fastest is not None:
            share = 1 - self.most_pruned * (1 - min(1.0, (speed or declared) / terms.fastest))
            return _Budget(memory, flops=share * whole.flops, share=share)
        return _Budget(memory)

    def _alternatives(self, view: View, plan: Plan, costs: NarrowCosts) -> tuple[float, ...]:
        """The widths that a plan may get, the widest first; () for any."""
        if self.widths:
            return (self.widths[view.profiles[plan.device].name],)
        if self.unit == "width":
            return tuple(sorted(set(self.levels), reverse=True))
        return costs.widths(plan, self.levels)

    def _choose(
        self, version: int, entry: Mapping[str, Any], alternatives: tuple[float, ...], budget: _Budget, cost_of: CostOf
    ) -> tuple[float | None, int]:
        """The width of a plan, None where no level fits, and the version at which it was evaluated."""

        def fitting(margin: float) -> float | None:
            def load(width: float) -> float:
                return budget.load(cost_of(width), margin)

            if not alternatives:
                return widest(load)
            return next((width for width in alternatives if load(width) <= 1), None)

        now = entry.get("width")
        if now is None or (alternatives and now not in alternatives):
            return fitting(1.0), version
        # A budget that follows from a device is its own cost: any noise would exceed it.
        tolerance = 1.0 if self.deadline_s is not None else 1 + self.hysteresis
        if budget.load(cost_of(now), 1 / tolerance) > 1:
            return fitting(1.0), version
        if version - entry["at"] < self.every:
            return now, entry["at"]
        return max(now, fitting(1 + self.hysteresis) or now), version

    def _narrow(self, plan: Plan, width: float, version: int = 0) -> Plan:
        """A plan at a width; 1 changes nothing. ``version``: by which rankings are counted."""
        if width == 1:
            return plan
        channels, turn = self._ranking(version)
        part = replace(
            plan.part, width=width, min_channels=self.min_channels, channels=channels, turn=turn, scaled=self.scaled
        )
        return replace(plan, part=part)

    def _ranking(self, version: int) -> tuple[ChannelRule, int]:
        """The rule by which channels are chosen for a version, and the number of the choice."""
        if self.channels == "prefix":
            return "prefix", 0
        if self.channels == "rolling":
            return "rolling", version // self.refresh
        if version < self.warm_up:
            return "prefix", 0
        return self.channels, (version - self.warm_up) // self.refresh


def median_s(view: View) -> float:
    """Seconds that the fleet's median device takes for the experiment's own plan, by its profile.

    Every device of a class counts as the one with the median number of samples, so that classes are compared, not samples.
    """
    classes: dict[DeviceProfile, list[int]] = {}
    for device in [each for each in view.devices if view.samples[each] >= view.min_samples] or view.devices:
        classes.setdefault(view.profiles[device], []).append(device)
    seconds = []
    for group in classes.values():
        median = sorted(group, key=lambda device: view.samples[device])[len(group) // 2]
        seconds += [view.estimate(median, view.new_plan(median)).seconds] * len(group)
    return sorted(seconds)[(len(seconds) - 1) // 2]


def _speed(known: Mapping[str, Any], device: int, profile: DeviceProfile) -> float:
    """The measured speed of a device, or the declared one where none is known (FLOP/s)."""
    entry = known.get(str(device))
    return entry.get("speed", profile.flop_per_s) if entry else profile.flop_per_s


def _flops_done(view: View, report: Report) -> float:
    """FLOPs that the device has trained for a report: with a deadline, those of the steps that it made.

    0 where the time that it took says nothing of its speed: it failed, or it waited for a host.
    """
    plan = report.plan
    if plan.split is not None or report.outcome not in (Outcome.DONE, Outcome.LATE):
        return 0
    if plan.deadline_s is None:
        return report.virtual.flops or view.estimate(plan.device, plan).flops
    whole = num_steps(view.samples[plan.device], plan.training)
    flops = view.estimate(plan.device, replace(plan, deadline_s=None, train_s=None)).flops
    return flops * min(1.0, report.steps / whole) if whole else 0.0
