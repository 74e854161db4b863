"""A network of four fully connected layers, 3-64-128-256-10, whose costs at any width are one sum of products.

The whole model has 3*64 + 64*128 + 128*256 + 256*10 = 43712 weights. Training takes 6 FLOPs for each weight and sample, and
16 bytes for each weight. At half the width, 3*32 + 32*64 + 64*128 + 128*10 = 11616 weights are left: 26.57 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from fedbonsai.clusters.profile import DeviceProfile
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Training
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.view import View

WEIGHTS = 43712
SAMPLES = 10
WHOLE_FLOPS = 6 * WEIGHTS * SAMPLES  # 2 622 720: at this speed a device takes 1 s for the whole model
PART = Part(blocks=("front", "back"), trained=("front", "back"))


def weights(width: float, min_channels: int = 1) -> int:
    """Weights of the network at a width, on true integer channel counts."""
    hidden = [max(min(min_channels, size), math.ceil(width * size)) for size in (64, 128, 256)]
    sizes = [3, *hidden, 10]
    return sum(before * after for before, after in pairwise(sizes))


def make_plan(device: int, *, version: int = 0, **changes: Any) -> Plan:
    values: dict[str, Any] = {"part": PART, "training": Training()} | changes
    return Plan(id=values.pop("id", 0), device=device, version=version, seed=1000 + device, **values)


@dataclass
class Network:
    """Estimates plans by the sums above; ``fixed_s`` are seconds of the links. Records the device and width of each call.

    A part without the last block holds the first two layers, half of the work of the whole.
    """

    profiles: Sequence[DeviceProfile]
    samples: Sequence[int]
    fixed_s: float = 0.0
    calls: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, device: int, plan: Plan) -> Estimate:
        assert plan.device == device
        part = plan.part
        self.calls.append((device, part.width))
        held = weights(part.width, part.min_channels if part.width < 1 else 1) * len(part.blocks) // 2
        processed = self.samples[device] * plan.training.epochs
        if plan.training.steps is not None:
            processed = plan.training.steps * min(plan.training.batch_size, self.samples[device])
        flops = 6 * held * processed
        compute_s = flops / self.profiles[device].flop_per_s
        if plan.deadline_s is not None:
            compute_s = min(compute_s, plan.deadline_s)  # stops early
        seconds = compute_s + self.fixed_s
        return Estimate(compute_s=compute_s, seconds=seconds, flops=flops, peak_memory_bytes=16 * held)


def make_fleet(
    *,
    seconds: Sequence[float] = (1, 2, 4, 8, 16),
    samples: Sequence[int] | None = None,
    memory: Mapping[int, int] | None = None,
    names: Sequence[str] | None = None,
    fixed_s: float = 0.0,
    **changes: Any,
) -> View:
    """Devices that train the whole model in ``seconds``, with 1 MB of memory but for those in ``memory`` (bytes)."""
    samples = samples or [SAMPLES] * len(seconds)
    room = dict.fromkeys(range(len(seconds)), 1_000_000) | dict(memory or {})
    profiles = [
        DeviceProfile(
            name=names[device] if names else f"d{device}",
            flop_per_s=WHOLE_FLOPS / needed,
            memory_bytes=room[device],
            up_bytes_per_s=1e6,
            down_bytes_per_s=1e6,
        )
        for device, needed in enumerate(seconds)
    ]
    values: dict[str, Any] = {"time_s": 0.0, "version": 0, "seed": 7, "profiles": profiles, "samples": samples}
    values |= {"estimator": Network(profiles, samples, fixed_s)} | changes
    values.setdefault("plan_maker", lambda device: make_plan(device, version=values["version"]))
    return View(**values)
