"""Who may be chosen: the idle devices that fit, each with its plan and estimate. What every selection starts from.

A selection orders ``pool.devices``, picks from the front, and answers with a decision::

    pool = Candidates(view, decision)
    picked = pool.pick(order, count)                 # skips, and notes, whoever does not fit
    return pool.decision(picked, lambda device: "why"), state

Fitting is checked while picking, and not for the whole fleet before, so that a round of 100 among 10,000 devices costs
100 checks. A device that fits is not in flight, has training samples enough, and has the memory that its plan is estimated to
need. Skipping while walking a random order gives the same distribution as drawing from those that fit alone.
"""

import math
from collections.abc import Callable, Iterable

import msgspec

from ..decision import Decision
from ..plan import Plan
from ..report import Estimate
from ..view import View


class Candidates:
    """The devices that one selection may choose from, for one decision; thrown away after it.

    After a policy that chose devices, the candidates are its plans: a selection after a selection narrows it, and keeps
    the plans as they are. Else they are all devices that nobody before has left out, each with the experiment's own
    plan. Devices in flight, and those that cannot be reached now, are never candidates.

    ``devices``: candidates in ascending order. ``ruled_out``: (device, reason) of those found not to fit so far.
    """

    def __init__(self, view: View, decision: Decision) -> None:
        self.view = view
        self.before = decision
        self.given = {plan.device: plan for plan in decision.plans}
        barred = {device for device, _ in decision.left_out} if not self.given else set()
        pool: Iterable[int] = sorted(self.given) if self.given else view.devices
        idle = [device for device in pool if device not in view.in_flight and device not in barred]
        self.devices = [device for device in idle if device not in view.unreachable]
        self.ruled_out = [(device, "unreachable: at this time") for device in idle if device in view.unreachable]
        self._costs: dict[tuple[int, ...], Estimate] = {}

    def plan(self, device: int) -> Plan:
        """The plan that the device would get: the one chosen before, or the experiment's own."""
        return self.given[device] if self.given else self.view.new_plan(device)

    def estimate(self, device: int) -> Estimate:
        """Cost of the device's plan.

        The experiment's own plan is the same for all devices but for id and seed, so devices of one profile with as
        many samples and the same link state share one estimate: a fleet of 10,000 has few classes.
        """
        view = self.view
        key: tuple[int, ...] = (device,)
        if not self.given:
            key = (id(view.profiles[device]), view.samples[device], view.links.get(device, -1))
        cost = self._costs.get(key)
        if cost is None:
            cost = self._costs[key] = view.estimate(device, self.plan(device))
        return cost

    def misfit(self, device: int) -> str:
        """Why the device cannot carry out its plan; "" when it can. Memory is not judged where a policy behind sees to it."""
        if (have := self.view.samples[device]) < self.view.min_samples:
            return (
                f"data: {have} training sample, which the model cannot be trained on"
                if have
                else "data: no training samples"
            )
        if self.view.fits_later:
            return ""
        return memory_misfit(self.view, device, self.estimate(device).peak_memory_bytes)

    def pick(self, order: Iterable[int], count: int, *, unless: Callable[[int], str] | None = None) -> list[int]:
        """The first ``count`` devices of ``order`` that fit; fewer when there are no more.

        ``unless`` gives a selection's own reason against a device, "" for none. Whoever is skipped is noted in
        ``ruled_out``. An iterator given as ``order`` can be picked from again, and goes on where it stopped.
        """
        picked: list[int] = []
        if count < 1:
            return picked
        for device in order:
            if reason := self.misfit(device) or (unless(device) if unless else ""):
                self.ruled_out.append((device, reason))
                continue
            picked.append(device)
            if len(picked) == count:
                break
        return picked

    def decision(self, picked: Iterable[int], reason: Callable[[int], str]) -> Decision:
        """The decision before, with the plans of ``picked`` in ascending order, each noting its reason."""
        return msgspec.structs.replace(
            self.before,
            plans=tuple(self.plan(device).with_(reason(device)) for device in sorted(picked)),
            left_out=(*self.before.left_out, *sorted(self.ruled_out)),
        )


def memory_misfit(view: View, device: int, needed: int, *, verb: str = "needs") -> str:
    """Why a device cannot hold ``needed`` bytes; "" when it can. A learned memory budget overrules the profile."""
    budget = view.memory_budgets.get(device, view.profiles[device].memory_bytes)
    if needed <= budget:
        return ""
    return f"memory: {verb} {_megabytes(needed, math.ceil)}, has {_megabytes(budget, math.floor)}"


def _megabytes(num_bytes: int, rounding: Callable[[float], int]) -> str:
    """Megabytes (10**6), whole from 10 up; a need is rounded up and a budget down, so that they never print alike."""
    if num_bytes >= 10_000_000:
        return f"{rounding(num_bytes / 1e6)} MB"
    return f"{rounding(num_bytes / 1e3) / 1e3:g} MB"
