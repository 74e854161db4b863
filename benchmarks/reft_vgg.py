"""VGG-16 on unequal devices: the smallest class's bytes and multiply-accumulates, with the accuracy that they cost beside them.

    python benchmarks/reft_vgg.py --data ROOT --save            ROOT: folder of CIFAR-10 (data.root)

VGG-16 for 32x32 images with its 4096-4096 head (33,642,442 parameters, 128.3 MiB as float32, 0.332 GMACs forward), without
dropout. Four devices have the training images of CIFAR-10, labels by a Dirichlet distribution with alpha 1; a fiftieth of the
images is public, and no device has it in any row. Each trains 15 steps of 64 images a round. All rows have the same data,
initial model, rounds and training settings.

``fedavg``: the whole model on all devices, dense float32. ``narrow``: all channels on two devices, half of them on the third
and ``WEAK`` of them on the fourth (the first ones of each layer), packets of 8 bits an entry in both directions. ``reft``:
narrow, with distillation in every fifth round.

``accuracy``: of the server's full model, on the first ``TEST`` test images, mean of the last two evaluations. ``weak``: the
narrowest class: the part's parameters, its forward MACs for a sample, and the bytes of the largest packet that its device was
sent, and sent itself, in the run; ``own_accuracy``: of its part of the final model, on the same images.
``accuracy_cost``: what a row's accuracy is below that of ``fedavg``. The last line is JSON.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fedbonsai
import numpy as np
from common import Results, add_options
from fedbonsai.learning.costs.cost import part_cost
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.data.types import SamplePool
from fedbonsai.learning.data.vision import load_vision
from fedbonsai.learning.parts.slices import gather
from fedbonsai.learning.training.evaluation import evaluate
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.report import Report
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.events import Evaluated, PlanEnded, VersionClosed

ROUNDS = 20
TEST = 2000
WEAK = 0.234375  # 15/64: the widest multiple of 1/64 whose packet of 8 bits is below 1.8 MiB
LINK = {"up_bytes_per_s": 1e7, "down_bytes_per_s": 1e7, "memory_bytes": 10**10}
SPEEDS = {"strong": (2, 1.0), "middle": (1, 1 / 4), "weak": (1, 1 / 16)}  # devices, and share of 50 GFLOP/s
EIGHT_BITS = {"down": ["uniform"], "up": ["uniform"]}
NARROW = {
    "name": "width",
    "rule": "fixed",
    "widths": {"strong": 1.0, "middle": 0.5, "weak": WEAK},
    "channels": "prefix",
}
DISTILLATION = {
    "name": "distillation",
    "class_prior": 1.0,
    "steps": 30,
    "batch_size": 64,
    "check_every": 10,
    "every": 5,
    "from_round": 4,
}
ROWS: dict[str, dict[str, Any]] = {
    "fedavg": {"policy": []},
    "narrow": {"policy": [NARROW], "codecs": EIGHT_BITS},
    "reft": {"policy": [NARROW, DISTILLATION], "codecs": EIGHT_BITS},
}


def cifar(*, num_devices: int, seed: int, root: str | None) -> SamplePool:
    """CIFAR-10 with its first ``TEST`` test images."""
    pool = load_vision(DataConfig(name="cifar10", root=root))
    assert pool.test is not None
    return replace(pool, test=pool.test.take(np.arange(TEST)), digest="")


def config(root: str, row: str, *, rounds: int) -> dict[str, Any]:
    """The run of one row."""
    classes = [
        {"name": name, "count": count, "flop_per_s": 50e9 * share, **LINK} for name, (count, share) in SPEEDS.items()
    ]
    method = ROWS[row]
    return {
        "name": row,
        "seed": 0,
        "model": {"name": "vgg16_bn", "kwargs": {"dropout": 0.0}},
        "data": {
            "name": "reft_vgg:cifar",
            "root": root,
            "partition": {"name": "dirichlet", "alpha": 1.0},
            "public_share": 0.02,
        },
        "fleet": {"classes": classes},
        "training": {
            "steps": 15,
            "batch_size": 64,
            "optimiser": {"learning_rate": 0.02},
            "precision": "auto",
            "layout": "channels_last",
        },
        "policy": [{"name": "random", "cohort": 1.0}, *method["policy"]],
        "codecs": method.get("codecs", {}),
        "server": {"statistics": "batch"},
        "evaluation": {"every": 2},
        "workers": 2,
        "stop": {"rounds": rounds},
    }


def run(root: str, row: str, *, rounds: int) -> dict[str, Any]:
    """One row: its accuracy by round, its bytes, and what the weakest class held."""
    started, closed = time.perf_counter(), None
    curve: list[tuple[int, float]] = []
    weak: list[Report] = []
    settings = config(root, row, rounds=rounds)
    training = fedbonsai.run(settings)
    for event in training:
        if isinstance(event, VersionClosed):
            closed = event
        elif isinstance(event, PlanEnded) and event.fleet_class == "weak":
            weak.append(event.report)
        elif isinstance(event, Evaluated) and closed is not None:
            curve.append((closed.version, event.figures["accuracy"]))
            print(f"  {row} {curve[-1]}, {time.perf_counter() - started:.0f} s", flush=True)
    assert closed is not None
    return {
        "accuracy": round(sum(accuracy for _, accuracy in curve[-2:]) / 2, 4),
        "best": round(max(accuracy for _, accuracy in curve), 4),
        "curve": curve,
        "virtual_s": round(closed.time_s, 1),
        "up_MB": round(closed.up_bytes / 1e6, 1),
        "down_MB": round(closed.down_bytes / 1e6, 1),
        "weak": held(training, weak),
        "wall_s": round(time.perf_counter() - started),
    }


def held(training: Any, reports: list[Report]) -> dict[str, Any]:
    """The figures of the weakest class: its part, its packets, and the accuracy of its part of the final model."""
    part = reports[-1].plan.part
    workload = Workload(workload_settings(training.config, num_devices=training.config.load_fleet().num_devices))
    submodel, plan = workload.submodel(part), reports[-1].plan
    loss = make_loss(plan.training.loss)
    cost = part_cost(submodel, example=workload.example(), training=plan.training, loss=loss)
    slices, full = workload.slices(part), training.weights()
    model = workload.architecture(part).new_model()
    model.load_state_dict({name: gather(full[name], slices[name]) if name in slices else full[name] for name in full})
    test = workload.data.server_test()
    assert test is not None
    figures = evaluate(
        model,
        test,
        loss=loss,
        metrics=workload.metrics,
        transform=workload.data.test_transform,
        layout="channels_last",
        precision=plan.training.precision,
    )
    down, up = (max(getattr(report.virtual, f"{way}_bytes") for report in reports) for way in ("down", "up"))
    return {
        "width": part.width,
        "parameters": submodel.parameters,
        "GMACs": round(cost.forward_flops / 2e9, 4),
        "down_bytes": down,
        "up_bytes": up,
        "down_MiB": round(down / 2**20, 3),
        "up_MiB": round(up / 2**20, 3),
        "own_accuracy": round(figures["accuracy"], 4),
    }


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of CIFAR-10 (data.root)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add_options(parser)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # so that other processes can import ``cifar``
    results = Results("reft_vgg", options)
    rows = {row: results.row(row, run, options.data, row, rounds=options.rounds) for row in options.rows}
    if "fedavg" in rows:
        for figures in rows.values():
            figures["accuracy_cost"] = round(rows["fedavg"]["accuracy"] - figures["accuracy"], 4)
    results.finish(
        {"model": "vgg16_bn", "data": "cifar10", "rounds": options.rounds, "test_samples": TEST, "rows": rows}
    )


if __name__ == "__main__":
    main()
