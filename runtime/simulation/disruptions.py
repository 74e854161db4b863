"""What befalls one plan under the virtual clock: how its device and its links vary this time, and whether it is lost.

Drawn from the run's seed, the device and the plan, so the same run has the same fates with any number of workers, and nothing
has to be saved. No policy ever sees them: estimates are those of a device that neither varies nor drops out.
"""

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
    """``compute``: factor of the seconds of computing; ``down``, ``up``: of the rates of the device's own link.

    ``lost_in``: the stage in which the plan is lost, after this ``share`` of its bytes or of its work; None: it is not.
    ``steps``: share of its training after which the device must stop.
    """

    compute: float = 1.0
    down: float = 1.0
    up: float = 1.0
    lost_in: Stage | None = None
    share: float = 0.0
    steps: float = 1.0

    def profile(self, declared: DeviceProfile) -> DeviceProfile:
        """The device as it is this time."""
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
    """The fates of a run's plans."""

    def __init__(self, fleet: Fleet, *, seed: int) -> None:
        """``seed``: of the run."""
        self._seed = seed
        self._classes = [kind for kind in fleet.classes for _ in range(kind.count)]

    def of(self, plan: Plan) -> Disruption:
        """What befalls a plan."""
        kind = self._classes[plan.device]
        # Of a replay its device does not hear.
        if plan.replays or (kind.dropout, kind.jitter) == (NEVER_LOST, STEADY):
            return NO_DISRUPTION
        factors = self._factors(plan, kind.jitter) if kind.jitter != STEADY else (1.0, 1.0, 1.0)
        lost_in, share = self._loss(plan, kind)
        steps = self._steps(plan, kind)
        if lost_in is None and steps < 1 and not plan.trains_on_device:
            lost_in, share, steps = "train", steps, 1.0  # a part of a view is none
        return Disruption(*factors, lost_in, share, steps)

    def _factors(self, plan: Plan, jitter: Jitter) -> tuple[float, float, float]:
        """Log-normal factors with mean 1."""
        rng = np.random.default_rng(derive(self._seed, "jitter", plan.device, plan.id))
        spreads = np.array([jitter.compute, jitter.links, jitter.links])
        compute, down, up = np.exp(spreads * rng.standard_normal(3) - spreads**2 / 2).tolist()
        return compute, down, up

    def _steps(self, plan: Plan, kind: DeviceClass) -> float:
        """The share of its training that it has the time for."""
        if not kind.dropout.early:
            return 1.0
        rng = np.random.default_rng(derive(self._seed, "early", plan.device, plan.id))
        drawn, share = rng.random(2).tolist()
        return share if drawn < kind.dropout.early else 1.0

    def _loss(self, plan: Plan, kind: DeviceClass) -> tuple[Stage | None, float]:
        """In which stage it is lost, and how far into it."""
        rng = np.random.default_rng(derive(self._seed, "dropout", plan.device, plan.id))
        drawn, share = rng.random(2).tolist()
        for stage, chance in zip(STAGES, kind.dropout.chances, strict=True):
            if drawn < chance:
                return stage, share
            drawn -= chance
        return None, 0.0
