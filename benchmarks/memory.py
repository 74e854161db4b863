"""Predicted and measured memory of training: the data segment above that of an idle trainer, and RSS beside it.

For each model, batch and kind of training: the prediction from a dry run (tensors alone, and with the workspace fit), the
smallest limit of the data segment under which two steps of a plan run (by bisection with the limit itself, each attempt in a
fresh fork of the idle trainer), and the growth of resident memory in a child that runs the plan. The models are not those to
which the fit was made (fit_memory.py).

Then enforced plans run whose budget is the smallest that the probe admits, the measured peak times the margin; none may run out
of memory.

    python benchmarks/memory.py --quick      one small model
    python benchmarks/memory.py --save
"""

import argparse
import statistics
from typing import Any

import msgspec
from common import Results, add_options
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Outcome
from step_memory import Trainer, measure, resident, two_steps

MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18"},
    "resnet34": {"name": "torchvision/resnet34", "kwargs": {"stem": "cifar"}},
    "vgg11_bn": {"name": "vgg11_bn"},
    "vgg16_bn": {"name": "vgg16_bn"},
}
BATCHES = (32, 128)
MARGIN = 1.1
EDGE = [{"name": "resfed_cnn"}, {"name": "small"}]  # whose steps take milliseconds, for many plans


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
