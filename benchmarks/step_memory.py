"""Training steps under limits of the data segment, for the benchmarks of memory: a trainer, and what a plan needs.

A part of a model is a plan with that part.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fedbonsai.actors.enforcement.enforced_device import EnforcedDevice
from fedbonsai.actors.enforcement.probe import smallest_limit
from fedbonsai.actors.messages.dense_packets import seal_weights
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Objective, Plan
from fedbonsai.policies.report import Answer
from fedbonsai.runtime.configuration.config import Config, load_config
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.simulation.costs import Costs


@dataclass(frozen=True)
class Trainer:
    """One model on 32 x 32 images: its workload, its costs, and a device in a child process."""

    model: dict[str, Any]
    shape: tuple[int, ...] = (3, 32, 32)
    classes: int = 10
    config: Config = field(init=False)
    workload: Workload = field(init=False)
    costs: Costs = field(init=False)
    device: EnforcedDevice = field(init=False)

    def __post_init__(self) -> None:
        """Build what follows from the model."""
        data = {
            "name": "synthetic",
            "kwargs": {"shape": self.shape, "classes": self.classes, "samples_per_device": 256, "test_samples": 0},
        }
        config = load_config(
            {"model": self.model, "data": data, "fleet": "uniform-10", "memory": {"probe": True}, "backend": "inline"}
        )
        fleet = config.load_fleet()
        settings = workload_settings(config, num_devices=fleet.num_devices)
        for name, value in (
            ("config", config),
            ("workload", Workload(settings)),
            ("device", EnforcedDevice(settings)),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "costs", Costs(self.workload, fleet))

    def plan(self, *, batch: int, part: Part | None = None, **training: Any) -> Plan:
        """A plan of the whole model, or of a part."""
        settings = Training(
            batch_size=batch, optimiser=Optimiser(learning_rate=0.01, momentum=0.9, weight_decay=5e-4), **training
        )
        return Plan(id=1, device=0, version=0, part=part or whole(self.workload.spec), training=settings, seed=1)

    def packet(self, plan: Plan) -> list[Any]:
        """The packets of a plan with the initial model."""
        tensors = dict(self.workload.new_model().state_dict())
        for name in plan.part.auxiliaries:
            proxy = self.workload.architecture(plan.part).new_auxiliary(name)
            tensors |= {f"{name}.{key}": tensor for key, tensor in proxy.state_dict().items()}
        return [seal_weights(plan, tensors, self.workload.submodel(plan.part))]

    def run(self, plan: Plan, packets: list[Any]) -> Answer:
        """Run a plan in the child."""
        report, _, _ = self.device.run(plan_message(plan), packets)
        return msgspec.msgpack.decode(report, type=Answer)


def measure(trainer: Trainer, plan: Plan, *, resolution: float = 0.02) -> dict[str, Any]:
    """Predicted and measured bytes of a plan, and the error of the prediction."""
    row = trainer.costs.row(plan.part, plan.training)
    trials = 0

    def fits(limit: int) -> bool:
        nonlocal trials
        trials += 1
        return trainer.device.try_limit(plan_message(plan), limit)

    started = time.perf_counter()
    measured = smallest_limit(fits, guess=row.process_memory_bytes, resolution=resolution)
    return {
        "tensors_mb": round(row.peak_memory_bytes / 1e6, 1),
        "predicted_mb": round(row.process_memory_bytes / 1e6, 1),
        "measured_mb": round(measured / 1e6, 1),
        "error": round(row.process_memory_bytes / measured - 1, 4),
        "trials": trials,
        "probe_s": round(time.perf_counter() - started, 2),
    }


def resident(trainer: Trainer, plan: Plan) -> float:
    """Growth of a fresh child's peak resident MB by two steps of a plan, over the opening of its packet for one sample."""
    trainer.device.close()
    packets = trainer.packet(plan)
    idle = trainer.run(two_steps(plan, batch_size=1, objective=Objective(kind="evaluate")), packets)
    answer = trainer.run(two_steps(plan), packets)
    return round((answer.measured.peak_memory_bytes - idle.measured.peak_memory_bytes) / 1e6, 1)


def two_steps(plan: Plan, *, batch_size: int | None = None, **changes: Any) -> Plan:
    """The plan with two steps only."""
    training = msgspec.structs.replace(plan.training, steps=2, batch_size=batch_size or plan.training.batch_size)
    return msgspec.structs.replace(plan, training=training, **changes)
