"""Predicted and measured memory of training: the data segment above that of an idle trainer, and RSS beside it.

For each model, batch and kind of training: the prediction from a dry run (tensors alone, and with the workspace fit), the
smallest limit of the data segment under which two steps of a plan run (by bisection with the limit itself, each attempt in a
fresh fork of the idle trainer), and the growth of resident memory in a child that runs the plan. The models are not those to
which the fit was made (fit_memory.py).

Then enforced plans run whose budget is the smallest that the probe admits, the measured peak times the margin; none may run out
of memory.

    python benchmarks/memory.py --quick      one small model
    python benchmarks/memory.py --save

``Trainer``, ``measure``, ``resident`` and ``admitted`` serve other benchmarks too: a part of a model is a plan with that part.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
from common import Results, add_options
from fedbonsai.actors.enforcement.enforced_device import EnforcedDevice
from fedbonsai.actors.enforcement.probe import smallest_limit
from fedbonsai.actors.messages.dense_packets import seal_weights
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Objective, Plan
from fedbonsai.policies.report import Answer, Outcome
from fedbonsai.runtime.configuration.config import Config, load_config
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.simulation.costs import Costs

MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18"},
    "resnet34": {"name": "torchvision/resnet34", "kwargs": {"stem": "cifar"}},
    "vgg11_bn": {"name": "vgg11_bn"},
    "vgg16_bn": {"name": "vgg16_bn"},
}
BATCHES = (32, 128)
MARGIN = 1.1
EDGE = [{"name": "resfed_cnn"}, {"name": "small"}]  # whose steps take milliseconds, for many plans


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


def admitted(trainer: Trainer, plan: Plan, measured_mb: float, *, count: int) -> int:
    """How many of ``count`` plans fail under the smallest budget that admits them, the measured peak times the margin."""
    limited = two_steps(plan, memory_bytes=int(measured_mb * 1e6 * MARGIN))
    packets = trainer.packet(plan)
    answers = [trainer.run(msgspec.structs.replace(limited, seed=seed), packets) for seed in range(count)]
    return sum(answer.outcome != Outcome.DONE for answer in answers)


def at_the_edge(trainer: Trainer, *, count: int) -> int:
    """How many of ``count`` plans of the whole model fail under the smallest budget that admits them."""
    plan = trainer.plan(batch=16)
    return admitted(trainer, plan, measure(trainer, plan)["measured_mb"], count=count)


def row(trainer: Trainer, plan: Plan, *, name: str) -> dict[str, Any]:
    """All figures of one plan."""
    training = plan.training
    found = {"part": name, "batch": training.batch_size, "checkpointing": training.checkpointing}
    return found | measure(trainer, plan) | {"rss_mb": resident(trainer, plan)}


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median and worst absolute error of the predictions."""
    errors = [abs(each["error"]) for each in rows]
    return {"median_error": round(statistics.median(errors), 4), "worst_error": max(errors)}


def main() -> None:
    """Measure all models, and run plans at the edge of admission."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small model, and 20 enforced plans")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes (default: 32 128)")
    add_options(parser)
    options = parser.parse_args()
    results = Results("memory", options)
    models = {"resfed_cnn": {"name": "resfed_cnn"}} if options.quick else MODELS
    full, checkpointed, failed, count = list[dict[str, Any]](), list[dict[str, Any]](), 0, 0
    for name, model in models.items():
        trainer = Trainer(model)
        try:
            for batch in (16,) if options.quick else options.batches:
                for rows, checkpointing in ((full, False), (checkpointed, True)):
                    if not checkpointing or batch == max(options.batches) or options.quick:
                        plan = trainer.plan(batch=batch, checkpointing=checkpointing)
                        key = f"{name}, {batch}" + (", checkpointing" if checkpointing else "")
                        rows.append(results.row(key, row, trainer, plan, name=name))
        finally:
            trainer.device.close()
    edge = [{"name": "resfed_cnn"}] if options.quick else EDGE
    for model in edge:
        trainer = Trainer(model)
        try:
            num_plans = 20 if options.quick else 200 // len(edge)
            failed += results.row(f"{model['name']}, admitted", at_the_edge, trainer, count=num_plans)
            count += num_plans
        finally:
            trainer.device.close()
    result = {
        "full": full,
        "checkpointed": checkpointed,
        "prediction": summary(full),
        "prediction_checkpointed": summary(checkpointed),
        "admitted": {"plans": count, "out_of_memory": failed, "margin": MARGIN},
    }
    results.finish(result)


if __name__ == "__main__":
    main()
