"""A network of the blocks a, b, c and head, whose memory is a sum: so many MB for what a part holds, and for what it trains.

Each block and each auxiliary takes 1 MB. Training takes 8 MB for each unit of the trained sizes (a 4, b 2, c 1, head 1),
divided by the number of micro-batches, and half of it with checkpointing; teaching a proxy takes 4 MB. So the whole model takes
4 + 64 = 68 MB; alone behind frozen blocks and before proxies, a with the head takes 4 + 40, b 4 + 24 and c 4 + 16.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbonsai.clusters.profile import DeviceProfile
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Training
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.view import View

SIZES = {"a": 4, "b": 2, "c": 1, "head": 1}
NAMES = tuple(SIZES)
MB = 1_000_000


@dataclass
class Memory:
    """The sums above. Records its calls."""

    calls: list[Plan] = field(default_factory=list)

    def __call__(self, device: int, plan: Plan) -> Estimate:
        assert plan.device == device
        self.calls.append(plan)
        part, training = plan.part, plan.training
        work = {"train": 8.0 * sum(SIZES[name] for name in part.trained), "imitate": 4.0}.get(plan.objective.kind, 0.0)
        held = len(part.blocks) + len(part.auxiliaries)
        peak = held + work / training.accumulation / (2 if training.checkpointing else 1)
        return Estimate(compute_s=1.0, seconds=1.0, flops=1, peak_memory_bytes=int(peak * MB))


def make_view(*, memory_mb: Sequence[float] = (100, 100), **changes: Any) -> View:
    """Devices with so much memory."""
    version = changes.get("version", 0)
    profiles = [
        DeviceProfile(
            name=f"d{device}", flop_per_s=1.0, memory_bytes=int(room * MB), up_bytes_per_s=1.0, down_bytes_per_s=1.0
        )
        for device, room in enumerate(memory_mb)
    ]

    def new_plan(device: int) -> Plan:
        return Plan(
            id=0,
            device=device,
            version=version,
            part=Part(blocks=NAMES, trained=NAMES),
            training=Training(batch_size=32),
            seed=1000 + device,
        )

    values = {"time_s": 0.0, "version": 0, "seed": 7, "profiles": profiles, "samples": [10] * len(profiles)}
    return View(**values | {"estimator": Memory(), "plan_maker": new_plan} | changes)
