"""What block by block training reaches beside its baselines, where few devices fit the training of the whole model.

    python benchmarks/profl_cifar.py --data ROOT --quick      one seed
    python benchmarks/profl_cifar.py --data ROOT --save       three seeds; ROOT: folder of CIFAR-10 (data.root)
        [--continue]                                          the runs that are missing, also on another machine

ResNet-18 with a quarter of the channels, 2,000 images of CIFAR-10 (the rest is held back) on twenty devices by a
Dirichlet distribution with alpha 1. Memory budgets are 60 to 110 % of the predicted peak of whole training: a fifth of the
devices fits the whole model. All rows have the same training settings, and end when the devices have computed for equally long
in sum (``client_s``, simulated). ``participation``: devices that trained a block of the model, by all. ``accuracy``: mean of
the last three evaluations. The last line is JSON.
"""

import argparse
import statistics
import time
from typing import Any

import fedbonsai
from common import Results, add_options, over_seeds
from fedbonsai.runtime.events import Evaluated, PlanEnded

SHARES = (0.6, 0.7, 0.8, 0.9, 1.1)  # of the predicted peak of whole training, four devices each
STAGES = {"shrink_rounds": 3, "imitate_rounds": 1, "grow_rounds": 6, "min_rounds": 3}
ROWS: dict[str, list[dict[str, Any]]] = {
    "profl": [{"name": "profl", **STAGES}],
    "exclusive": [],
    "all_small": [{"name": "all_small"}],
    "heterofl": [{"name": "width", "rule": "linear", "most_pruned": 0.0, "levels": [1.0, 0.5, 0.25, 0.125, 0.0625],
                  "unit": "width", "min_channels": 1, "channels": "prefix", "scaled": True}],
}  # fmt: skip


def configuration(root: str, seed: int, memory_bytes: int) -> dict[str, Any]:
    """The settings of all rows. ``memory_bytes``: predicted peak of whole training."""
    classes = [
        {"name": f"class{n}", "count": 4, "flop_per_s": 1e9, "memory_bytes": int(share * memory_bytes),
         "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}
        for n, share in enumerate(SHARES)
    ]  # fmt: skip
    return {
        "model": {"name": "networks:narrow_resnet18"},
        "data": {
            "name": "cifar10",
            "root": root,
            "partition": {"name": "dirichlet", "alpha": 1.0},
            "public_share": 0.96,
        },
        "fleet": {"classes": classes},
        "training": {"epochs": 1, "batch_size": 16, "optimiser": {"learning_rate": 0.05, "weight_decay": 5e-4}},
        "server": {"statistics": "batch"},
        "backend": "inline",
        "seed": seed,
    }


def whole_peak(root: str) -> int:
    """The predicted peak of whole training: of its tensors."""
    from fedbonsai.learning.parts.part import whole
    from fedbonsai.learning.workload import Workload
    from fedbonsai.runtime.configuration.config import load_config
    from fedbonsai.runtime.configuration.resolution import workload_settings
    from fedbonsai.runtime.simulation.costs import Costs

    config = load_config(configuration(root, 0, 10**9))
    workload = Workload(workload_settings(config, num_devices=20))
    return Costs(workload, config.load_fleet()).row(whole(workload.spec), config.training).peak_memory_bytes


def run(row: str, config: dict[str, Any], client_s: float) -> dict[str, Any]:
    """One run until its devices have computed for ``client_s`` seconds in sum."""
    started, used, up, down = time.perf_counter(), 0.0, 0, 0
    accuracies, devices, heads = list[float](), set[int](), set[int]()
    settings = config | {
        "name": row,
        "policy": [{"name": "random", "cohort": 1.0}, *ROWS[row]],
        "stop": {"rounds": 1000},
    }
    with fedbonsai.run(settings) as events:
        for event in events:
            if isinstance(event, PlanEnded):
                report = event.report
                used += report.virtual.compute_s
                up, down = up + report.virtual.up_bytes, down + report.virtual.down_bytes
                if report.plan.part.trained:
                    (heads if len(report.plan.part.trained) == 1 else devices).add(report.plan.device)
            elif isinstance(event, Evaluated):
                accuracies.append(event.figures["accuracy"])
                if used >= client_s:
                    break
    return {
        "accuracy": round(statistics.fmean(accuracies[-3:]), 4),
        "rounds": len(accuracies),
        "participation": len(devices) / 20,
        "head_only": len(heads - devices) / 20,
        "client_s": round(used, 1),
        "MB": round((up + down) / 1e6, 1),
        "wall_s": round(time.perf_counter() - started, 1),
    }


def training(results: Results, root: str, *, rows: list[str], seeds: range, client_s: float) -> dict[str, Any]:
    """A row for each method: mean and spread of the accuracy, and each seed's figures."""
    peak, result = whole_peak(root), {}
    for row in rows:
        result[row] = over_seeds(
            {
                str(seed): results.row(f"{row}, seed {seed}", run, row, configuration(root, seed, peak), client_s)
                for seed in seeds
            }
        )
    return {"client_s": client_s, "whole_peak_MB": round(peak / 1e6, 2), "rows": result}


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--data", required=True, help="folder of CIFAR-10 (data.root)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--client-s", type=float, default=1500.0, help="simulated seconds of computing in sum; default: 1500"
    )
    add_options(parser)
    options = parser.parse_args()
    seeds = range(1 if options.quick else options.seeds)
    results = Results("profl_cifar", options, seeds=seeds, settings={"client_s": options.client_s})
    found = training(results, options.data, rows=options.rows, seeds=seeds, client_s=options.client_s)
    results.finish({"training": found})


if __name__ == "__main__":
    main()
