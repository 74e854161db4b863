"""The candidates of a selection: idle devices that fit, each with its plan and estimate; and random orders of devices.

A selection orders ``pool.devices``, picks from the front, and returns a decision::

    pool = Candidates(view, decision)
    picked = pool.pick(order, count)                 # skips devices that do not fit, and notes the reason
    return pool.decision(picked, lambda device: "why"), state

Whether a device fits is checked while picking, and not for the whole fleet before, so that a round of 100 among 10,000
devices costs 100 checks. A device that fits is not in flight, has enough training samples, and has the memory that its plan
is estimated to need. Skipping devices of a random order gives the same distribution as drawing from the devices that fit.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from ..decision import Decision
from ..estimate import Estimate
from ..plan import Plan
from ..view import View


class Candidates:
    """The devices that one selection may choose from, for one decision.

    Behind a policy that has chosen devices, the candidates are its plans: a second selection narrows the first, and keeps
    its plans. Otherwise they are all devices that no policy before has left out, each with the experiment's own plan.
    Devices in flight, and devices that cannot be reached now, are never candidates; nor is any device in a version that closes
    at once.

    ``devices``: candidates in ascending order. ``ruled_out``: (device, reason) of devices found not to fit so far.
    """

    def __init__(self, view: View, decision: Decision) -> None:
        self.view = view
        self.before = decision
        self.given = {plan.device: plan for plan in decision.plans}
        barred = {device for device, _ in decision.left_out} if not self.given else set()
        pool: Iterable[int] = sorted(self.given) if self.given else view.devices if decision.close_at != 0 else ()
        idle = [device for device in pool if device not in view.in_flight and device not in barred]
        self.devices = [device for device in idle if device not in view.unreachable]
        self.ruled_out = [(device, "unreachable: at this time") for device in idle if device in view.unreachable]
        self._costs: dict[tuple[int, ...], Estimate] = {}

    def plan(self, device: int) -> Plan:
        """The plan that the device would get: that of the policies before, or the experiment's own."""
        return self.given[device] if self.given else self.view.new_plan(device)

    def estimate(self, device: int) -> Estimate:
        """Cost of the device's plan.

        The experiment's own plans differ in id and seed only, so devices with the same profile, number of samples and link
        state share one estimate: a fleet of 10,000 has few classes.
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
        """Why the device cannot carry out its plan; "" when it can. Memory is not checked where ``view.fits_later`` is set."""
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

        ``unless`` returns the selection's own reason against a device, "" for none. Skipped devices are added to ``ruled_out``.
        An iterator given as ``order`` can be picked from again, and continues where it stopped.
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
        """The decision before, with the plans of ``picked`` in ascending order, each with its reason."""
        return msgspec.structs.replace(
            self.before,
            plans=tuple(self.plan(device).with_(reason(device)) for device in sorted(picked)),
            left_out=(*self.before.left_out, *sorted(self.ruled_out)),
        )


def memory_misfit(view: View, device: int, needed: int, *, verb: str = "needs") -> str:
    """Why a device cannot hold ``needed`` bytes; "" when it can. A learned memory budget takes precedence over the profile."""
    budget = memory_budget(view, device)
    if needed <= budget:
        return ""
    margin = f", less a margin of {view.memory_margin:g}" if view.memory_margin != 1 else ""
    return f"memory: {verb} {megabytes(needed, math.ceil)}, has {megabytes(budget, math.floor)}{margin}"


def memory_budget(view: View, device: int) -> int:
    """Bytes that a plan may be predicted to need on a device: the learned budget, or else the profile's, less the margin."""
    budget = view.memory_budgets.get(device, view.profiles[device].memory_bytes)
    return budget if view.memory_margin == 1 else int(budget / view.memory_margin)


def megabytes(num_bytes: int, rounding: Callable[[float], int]) -> str:
    """Megabytes (10**6), whole from 10 up. Needs are rounded up and budgets down, so that they never print as equal."""
    if num_bytes >= 10_000_000:
        return f"{rounding(num_bytes / 1e6)} MB"
    return f"{rounding(num_bytes / 1e3) / 1e3:g} MB"


def weighted_order(rng: np.random.Generator, devices: Sequence[int], weights: npt.NDArray[np.float64]) -> list[int]:
    """``devices`` in the order of weighted draws without replacement: probabilities are proportional to ``weights``.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", Information Processing Letters 97(5), 2006, in
    its exponential form: the arrival times of independent Poisson processes with these rates. ``weights``: [device],
    none negative; those of weight 0 come last, in random order.
    """
    draws = rng.exponential(size=len(devices))
    with np.errstate(divide="ignore"):
        arrivals = draws / weights
    return [devices[index] for index in np.lexsort((draws, arrivals)).tolist()]


def uniform_order(rng: np.random.Generator, devices: Sequence[int]) -> list[int]:
    """``devices`` in random order, every order equally likely."""
    return [devices[index] for index in rng.permutation(len(devices)).tolist()]
