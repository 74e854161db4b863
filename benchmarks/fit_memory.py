"""Fits the constants of ``learning/costs/workspace.py`` to measured data segments of training steps.

Of each case the smallest limit under which two steps run is found by bisection (step_memory.py), and

    FACTOR x peak(tensors + scratch) + KERNEL_BYTES x kernels + FIXED_BYTES

is fitted to them by least squares of the relative errors. (What scratch a convolution needs is not fitted: it was measured one
by one.) The models are not those of memory.py and profl.py, on which the prediction is checked. ``--refit`` fits the saved
cases anew, without measuring, and saves nothing.

    python benchmarks/fit_memory.py --quick      the cases of the two smallest models
    python benchmarks/fit_memory.py --save
"""

import argparse
from typing import Any

import numpy as np
from common import Results, add_options, refuse, saved
from fedbonsai.learning.costs.cost import profile
from fedbonsai.learning.costs.dry_run import DryRun
from fedbonsai.learning.costs.memory import peak_of_batch
from fedbonsai.learning.training.losses import make_loss
from step_memory import Trainer, measure

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
    peak_mb = peak_of_batch(steps.small, steps.large, batch, scratch=True) / 1e6
    return {"kernels": len(steps.large.kernels), "peak_mb": peak_mb, **measure(trainer, plan)}


def fit(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The constants with the least sum of squared relative errors."""
    measured = np.array([each["measured_mb"] for each in cases])
    weighted = np.array([[each["peak_mb"], each["kernels"], 1.0] for each in cases]) / measured[:, None]
    constants, *_ = np.linalg.lstsq(weighted, np.ones(len(cases)), rcond=None)
    return {
        "FACTOR": round(float(constants[0]), 3),
        "KERNEL_BYTES": round(float(constants[1]) * 1e6, -4),
        "FIXED_BYTES": round(float(constants[2]) * 1e6, -4),
        "errors": [round(float(error), 3) for error in weighted @ constants - 1],
    }


def main() -> None:
    """Measure all cases, and fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the cases of the two smallest models only")
    parser.add_argument("--refit", action="store_true", help="fit the saved cases, without measuring")
    add_options(parser)
    options = parser.parse_args()
    if options.refit:
        if options.save:
            refuse("--refit saves nothing; leave out one of --refit and --save")
        print(fit(saved("fit_memory")["cases"]))
        return
    results = Results("fit_memory", options)
    cases = []
    for model, shape, training in CASES[: 4 if options.quick else None]:
        trainer = Trainer(model, shape)
        try:
            found = results.row(f"{model['name']}, {training}", case, trainer, **training)
        finally:
            trainer.device.close()
        cases.append({"model": model["name"], **training, **found})
    results.finish({"fit": fit(cases), "cases": cases})


if __name__ == "__main__":
    main()
