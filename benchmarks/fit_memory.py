"""Fits the constants of ``learning/costs/workspace.py`` to measured data segments of training steps.

Of each case the smallest limit under which two steps run is found by bisection (memory.py), and

    FACTOR x peak(tensors + SCRATCH x scratch) + KERNEL_BYTES x kernels + FIXED_BYTES

is fitted to them by least squares of the relative errors, for each SCRATCH of a grid; the best one is printed, with the errors
of all cases. The models are not those of memory.py, on which the prediction is checked.
"""

import argparse
from typing import Any

import numpy as np
from common import finish
from fedbonsai.learning.costs.cost import profile
from fedbonsai.learning.costs.dry_run import DryRun
from fedbonsai.learning.costs.memory import peak_of_batch
from fedbonsai.learning.training.losses import make_loss
from memory import Trainer, measure

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
CIFAR = {"stem": "cifar"}
CASES: list[tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = [
    ({"name": "digits_cnn"}, (1, 8, 8), {"batch": 16}),
    ({"name": "digits_cnn"}, (1, 8, 8), {"batch": 64}),
    ({"name": "small"}, (3, 32, 32), {"batch": 16}),
    ({"name": "small"}, (3, 32, 32), {"batch": 64}),
    ({"name": "resfed_cnn"}, (3, 32, 32), {"batch": 16}),
    ({"name": "resfed_cnn"}, (3, 32, 32), {"batch": 64}),
    ({"name": "resfed_cnn"}, (3, 32, 32), {"batch": 64, "checkpointing": True}),
    ({"name": "torchvision/mobilenet_v3_small", "kwargs": CIFAR}, (3, 32, 32), {"batch": 16}),
    ({"name": "torchvision/mobilenet_v3_small", "kwargs": CIFAR}, (3, 32, 32), {"batch": 64}),
    ({"name": "torchvision/shufflenet_v2_x0_5", "kwargs": CIFAR}, (3, 32, 32), {"batch": 32}),
    ({"name": "torchvision/resnet50", "kwargs": CIFAR}, (3, 32, 32), {"batch": 16}),
    ({"name": "torchvision/densenet121", "kwargs": CIFAR}, (3, 32, 32), {"batch": 16}),
]


def case(trainer: Trainer, **training: Any) -> dict[str, Any]:
    """Features and measured bytes of one case."""
    plan = trainer.plan(**training)
    loss = make_loss(plan.training.loss)
    run = DryRun(trainer.workload.submodel(plan.part), trainer.workload.example(), plan.training, loss)
    steps = profile(run)
    batch = plan.training.batch_size
    peaks = {str(k): peak_of_batch(steps.small, steps.large, batch, scratch=k) / 1e6 for k in GRID}
    return {"kernels": len(steps.large.kernels), "peaks_mb": peaks, **measure(trainer, plan)}


def fit(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The constants with the least sum of squared relative errors."""
    best: dict[str, Any] = {}
    measured = np.array([each["measured_mb"] for each in cases])
    for scratch in GRID:
        columns = [[each["peaks_mb"][str(scratch)], each["kernels"], 1.0] for each in cases]
        weighted = np.array(columns) / measured[:, None]
        constants, *_ = np.linalg.lstsq(weighted, np.ones(len(cases)), rcond=None)
        errors = weighted @ constants - 1
        found = {
            "SCRATCH": scratch,
            "FACTOR": round(float(constants[0]), 3),
            "KERNEL_BYTES": round(float(constants[1]) * 1e6, -4),
            "FIXED_BYTES": round(float(constants[2]) * 1e6, -4),
            "errors": [round(float(error), 3) for error in errors],
            "squares": float(errors @ errors),
        }
        if not best or found["squares"] < best["squares"]:
            best = found
    return best


def main() -> None:
    """Measure all cases, and fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the cases of the two smallest models only")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/fit_memory.json")
    options = parser.parse_args()
    cases = []
    for model, shape, training in CASES[: 4 if options.quick else None]:
        trainer = Trainer(model, shape)
        try:
            found = {"model": model["name"], **training, **case(trainer, **training)}
        finally:
            trainer.device.close()
        print({name: value for name, value in found.items() if name != "peaks_mb"}, flush=True)
        cases.append(found)
    finish({"fit": fit(cases), "cases": cases}, name="fit_memory", save=options.save)


if __name__ == "__main__":
    main()
