"""A small real view: the cost of a device is one division, so that every number can be checked by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from fedbonsai.clusters.profile import DeviceProfile
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Training
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Outcome, Report
from fedbonsai.policies.view import View

FLOP_PER_SAMPLE = 100
NEEDED_BYTES = 512_000_000
PART = Part(blocks=("conv", "fc"), trained=("conv", "fc"))


def make_plan(device: int, *, version: int = 0, **changes: Any) -> Plan:
    return Plan(id=0, device=device, version=version, part=PART, training=Training(), seed=1000 + device, **changes)


def make_report(
    device: int, *, version: int = 0, loss: float | None = None, samples: int = 10, seconds: float = 1.0, **changes: Any
) -> Report:
    """A report whose squared loss is the square of its loss, so that Oort's U is samples times loss."""
    return Report(
        plan=make_plan(device, version=version),
        outcome=Outcome.DONE if loss is not None else Outcome.LOST,
        samples=samples,
        loss=loss,
        loss_square=None if loss is None else loss * loss,
        virtual=Estimate(seconds=seconds),
        **changes,
    )


@dataclass
class FakeEstimator:
    """Seconds = samples * 100 FLOP / the device's speed; memory 512 MB. Records its calls; plans must be of the device."""

    profiles: Sequence[DeviceProfile]
    samples: Sequence[int]
    calls: list[int] = field(default_factory=list)

    def __call__(self, device: int, plan: Plan) -> Estimate:
        assert plan.device == device
        self.calls.append(device)
        flops = self.samples[device] * FLOP_PER_SAMPLE * plan.training.epochs
        seconds = flops / self.profiles[device].flop_per_s
        return Estimate(compute_s=seconds, seconds=seconds, flops=flops, peak_memory_bytes=NEEDED_BYTES)


def make_view(
    *,
    seconds: Sequence[float] = (1, 2, 3, 4),
    samples: Sequence[int] | None = None,
    memory_mb: Mapping[int, int] | None = None,
    reports: Sequence[Report] = (),
    **changes: Any,
) -> View:
    """Devices that need ``seconds`` for 10 samples, with 1 GB of memory but for those in ``memory_mb``."""
    samples = samples or [10] * len(seconds)
    memory = dict.fromkeys(range(len(seconds)), 1000) | dict(memory_mb or {})
    profiles = [
        DeviceProfile(
            name=f"d{device}",
            flop_per_s=10 * FLOP_PER_SAMPLE / needed,
            memory_bytes=memory[device] * 1_000_000,
            up_bytes_per_s=1e6,
            down_bytes_per_s=1e6,
        )
        for device, needed in enumerate(seconds)
    ]
    values: dict[str, Any] = {
        "time_s": 0.0,
        "version": 0,
        "seed": 7,
        "profiles": profiles,
        "samples": samples,
        "last_reports": {report.plan.device: report for report in reports},
        "estimator": FakeEstimator(profiles, samples),
    }
    values.update(changes)
    values.setdefault("plan_maker", lambda device: make_plan(device, version=values["version"]))
    return View(**values)


@pytest.fixture(name="make_view")
def make_view_fixture():
    """``make_view(seconds=..., ...)``."""
    return make_view


@pytest.fixture(name="make_plan")
def make_plan_fixture():
    """``make_plan(device, ...)``."""
    return make_plan


@pytest.fixture(name="make_report")
def make_report_fixture():
    """``make_report(device, loss=..., ...)``."""
    return make_report
