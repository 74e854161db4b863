"""How a device differs from its declared profile while it executes one plan: jitter, link traces, dropouts.

Disruptions are drawn from the run's seed, the device and the plan. A run therefore draws the same ones with any number of
workers, and none has to be saved. Policies never see them: an estimate assumes a device that neither varies nor drops out.
"""

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
from msgspec.structs import replace

from ...clusters.availability import NEVER_LOST, STEADY, Jitter
from ...clusters.fleet import DeviceClass, Fleet
from ...clusters.profile import DeviceProfile
from ...learning.seeds import derive
from ...policies.plan import Plan

Stage = Literal["down", "train", "up"]
STAGES: tuple[Stage, Stage, Stage] = ("down", "train", "up")


@dataclass(frozen=True)
class Disruption:
    """``compute``: factor on the seconds of computing; ``down``, ``up``: on the rates of the device's own link.

    ``lost_in``: the stage in which the plan is lost, after this ``share`` of its bytes or of its work; None: it is not lost.
    ``steps``: the share of its training after which the device must stop.
    """

    compute: float = 1.0
    down: float = 1.0
    up: float = 1.0
    lost_in: Stage | None = None
    share: float = 0.0
    steps: float = 1.0

    def profile(self, declared: DeviceProfile) -> DeviceProfile:
        """The declared profile with this disruption's factors applied."""
        if (self.compute, self.down, self.up) == (1.0, 1.0, 1.0):
            return declared
        return replace(
            declared,
            flop_per_s=declared.flop_per_s / self.compute,
            down_bytes_per_s=declared.down_bytes_per_s * self.down,
            up_bytes_per_s=declared.up_bytes_per_s * self.up,
        )


NO_DISRUPTION = Disruption()


class DisruptionSampler:
    """Draws the disruption of each plan of a run."""

    def __init__(self, fleet: Fleet, *, seed: int) -> None:
        """``seed``: of the run."""
        self._seed = seed
        self._classes = [device_class for device_class in fleet.classes for _ in range(device_class.count)]

    def of(self, plan: Plan) -> Disruption:
        """The disruption of a plan; the same at every call."""
        device_class = self._classes[plan.device]
        # A replay runs on its host alone.
        if plan.replays or (device_class.dropout, device_class.jitter) == (NEVER_LOST, STEADY):
            return NO_DISRUPTION
        factors = self._factors(plan, device_class.jitter) if device_class.jitter != STEADY else (1.0, 1.0, 1.0)
        lost_in, share = self._loss(plan, device_class)
        steps = self._steps(plan, device_class)
        if lost_in is None and steps < 1 and not plan.trains_on_device:
            lost_in, share, steps = "train", steps, 1.0  # part of a view is of no use
        return Disruption(*factors, lost_in, share, steps)

    def _factors(self, plan: Plan, jitter: Jitter) -> tuple[float, float, float]:
        """Log-normal factors with mean 1: of compute, downlink and uplink."""
        rng = np.random.default_rng(derive(self._seed, "jitter", plan.device, plan.id))
        spreads = np.array([jitter.compute, jitter.links, jitter.links])
        compute, down, up = np.exp(spreads * rng.standard_normal(3) - spreads**2 / 2).tolist()
        return compute, down, up

    def _steps(self, plan: Plan, device_class: DeviceClass) -> float:
        """The share of its training that the device has time for."""
        if not device_class.dropout.early:
            return 1.0
        rng = np.random.default_rng(derive(self._seed, "early", plan.device, plan.id))
        drawn, share = rng.random(2).tolist()
        return share if drawn < device_class.dropout.early else 1.0

    def _loss(self, plan: Plan, device_class: DeviceClass) -> tuple[Stage | None, float]:
        """The stage in which the plan is lost, and after which share of it."""
        rng = np.random.default_rng(derive(self._seed, "dropout", plan.device, plan.id))
        drawn, share = rng.random(2).tolist()
        for stage, chance in zip(STAGES, device_class.dropout.chances, strict=True):
            if drawn < chance:
                return stage, share
            drawn -= chance
        return None, 0.0


class CurrentProfiles:
    """The profiles of a fleet's devices at a given time: rates of the own link follow its class's trace, if it has one."""

    def __init__(self, fleet: Fleet) -> None:
        """Before its first trace entry a device has the declared rates."""
        self._declared = fleet.profiles()
        # By device, in order of time: (second, up, down).
        self._rates: defaultdict[int, list[tuple[float, float, float]]] = defaultdict(list)
        for device_class in fleet.classes:
            assert not isinstance(device_class.rates, str), "a fleet is loaded with its traces"
            for device, at_s, up, down in device_class.rates or ():
                self._rates[device].append((at_s, up, down))

    def at(self, device: int, disruption: Disruption, *, now_s: float) -> DeviceProfile:
        """The profile of a device at ``now_s``, with a disruption applied."""
        return disruption.profile(self._traced(device, now_s))

    def _traced(self, device: int, now_s: float) -> DeviceProfile:
        declared, rates = self._declared[device], self._rates.get(device, [])
        passed = bisect_right(rates, now_s, key=lambda rate: rate[0])
        if not passed:
            return declared
        _, up, down = rates[passed - 1]
        return replace(declared, up_bytes_per_s=up, down_bytes_per_s=down)
