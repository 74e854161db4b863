"""Accuracy of ZeroFL's three rules (Qiu et al., ICLR 2022, arXiv 2208.02507) beside dense FedAvg and sending everything.

    python benchmarks/zerofl_accuracy.py writers --data ROOT --quick      one seed, a few rows and rounds
    python benchmarks/zerofl_accuracy.py writers --data ROOT --save       three seeds; ROOT: folder of the data (data.root)

Both data sets follow the paper's set-up as far as an hour on one core allows: one local epoch, SGD without momentum, an
exponential schedule with its ratio of last to first rate, few of the devices in a round.

``writers``: MNIST by writer (QMNIST's numbers), 539 devices with one writer each, 5 a round; LEAF's network for FEMNIST with
fewer channels, all its layers but the last one sparse. ``cifar``: 5,000 images of CIFAR-10 on 20 devices of equal size by a
Dirichlet distribution with alpha 1 (the paper's non-IID case), 5 a round; ResNet-18 with 8 to 64 channels.

Rows are named by sparsity, rule and mask ratio; "all" sends whole updates. ``accuracy``: of the last model on all test images.
``up_MB``: of all updates. ``gain``: mean accuracy minus that of sending everything at the same sparsity and by the same
server; ``gain_each``: by seed. The last line is JSON.
"""

import argparse
from typing import Any

import fedbonsai
import torch
from common import Results, add_options, over_seeds
from fedbonsai.runtime.events import Evaluated, PlanEnded

LINK = {"flop_per_s": 1e9, "memory_bytes": 10**10, "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}
TASKS: dict[str, dict[str, Any]] = {
    "writers": {
        "model": "networks:narrow_femnist_cnn",
        "data": {"name": "mnist", "partition": {"name": "groups"}},
        "fleet": {"classes": [{"name": "writer", "count": 539} | LINK]},
        "training": {"batch_size": 10, "optimiser": {"learning_rate": 0.2, "momentum": 0.0}},
        "schedule": {"name": "exponential", "final": 0.25},
        "layers": ["conv1", "conv2", "fc1"],
        "rounds": 40,
    },
    "cifar": {
        "model": {"name": "networks:NarrowResNet18", "kwargs": {"width": 8}},
        "data": {
            "name": "cifar10",
            "partition": {"name": "dirichlet", "alpha": 1.0, "sizes": "equal"},
            "public_share": 0.9,
        },
        "fleet": {"classes": [{"name": "device", "count": 20} | LINK]},
        "training": {"batch_size": 16, "optimiser": {"learning_rate": 0.1, "momentum": 0.0}},
        "schedule": {"name": "exponential", "final": 0.1},
        "layers": [],
        "rounds": 40,
    },
}
ADAM = {"optimiser": {"name": "adam", "learning_rate": 0.01}}
ROWS: dict[str, tuple[float, str, float, dict[str, Any]]] = {  # sparsity, rule, mask ratio, server
    "fedavg": (0.0, "", 0.0, {}),
    "90 %, all": (0.9, "all", 0.0, {}),
    "90 %, top_weights, 0.2": (0.9, "top_weights", 0.2, {}),
    "90 %, diff_top_weights, 0.2": (0.9, "diff_top_weights", 0.2, {}),
    "90 %, top_diff, 0.2": (0.9, "top_diff", 0.2, {}),
    "90 %, top_weights, 0": (0.9, "top_weights", 0.0, {}),
    "90 %, top_diff, 0": (0.9, "top_diff", 0.0, {}),
    "90 %, diff_top_weights, 0": (0.9, "diff_top_weights", 0.0, {}),
    "95 %, all": (0.95, "all", 0.0, {}),
    "95 %, top_weights, 0.2": (0.95, "top_weights", 0.2, {}),
    "90 %, all, adam": (0.9, "all", 0.0, ADAM),
    "90 %, top_weights, 0, adam": (0.9, "top_weights", 0.0, ADAM),
    "90 %, top_weights, 0.1": (0.9, "top_weights", 0.1, {}),
}


def configuration(task: str, row: str, *, root: str, seed: int, rounds: int) -> dict[str, Any]:
    """The configuration of one run. The downlink is dense: coding it would not change a bit of any model."""
    about, (sparsity, rule, ratio, server) = TASKS[task], ROWS[row]
    training, policy = dict(about["training"]), [{"name": "random", "cohort": 5}]
    if rule:
        training["sparsity"] = {"weights": sparsity, "activations": sparsity, "layers": about["layers"]}
        ratios = {"ratios": [ratio]} if rule != "all" else {}
        policy.append({"name": "zerofl", "rule": rule, "down": "configured", **ratios})
    return {
        "model": about["model"],
        "data": about["data"] | {"root": root},
        "fleet": about["fleet"],
        "training": training | {"epochs": 1},
        "schedule": about["schedule"],
        "server": server,
        "policy": policy,
        "evaluation": {"every": rounds},
        "checkpoint": {"every": None},
        "backend": "inline",
        "seed": seed,
        "stop": {"rounds": rounds},
    }


def run(config: dict[str, Any]) -> dict[str, Any]:
    """One run: its last accuracy, and what all its updates took."""
    found, up = 0.0, 0
    with fedbonsai.run(config) as events:
        for event in events:
            if isinstance(event, PlanEnded):
                up += event.report.virtual.up_bytes
            elif isinstance(event, Evaluated):
                found = event.figures["accuracy"]
    return {"accuracy": round(found, 4), "up_MB": round(up / 1e6, 2)}


def gains(rows: dict[str, Any]) -> None:
    """Add to each row what it gains over sending everything."""
    for name, row in rows.items():
        sparsity, rule, _, server = ROWS[name]
        wanted = (sparsity, "all", 0.0, server)
        whole = next((rows[other] for other in rows if ROWS[other] == wanted), None)
        if rule not in ("", "all") and whole is not None:
            row["gain"] = round(row["accuracy"] - whole["accuracy"], 4)
            pairs = zip(row["by_seed"].values(), whole["by_seed"].values(), strict=True)
            row["gain_each"] = [round(one["accuracy"] - other["accuracy"], 4) for one, other in pairs]


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="one seed, three rows, four rounds")
    parser.add_argument("--data", required=True, help="folder of the data (data.root)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, help="default: those of the task")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(1 if options.quick else options.seeds)
    rounds = options.rounds or (4 if options.quick else TASKS[options.task]["rounds"])
    results = Results(f"zerofl_{options.task}", options, seeds=seeds)
    rows: dict[str, Any] = {}
    for row in options.rows[:3] if options.quick else options.rows:
        by_seed = {}
        for seed in seeds:
            config = configuration(options.task, row, root=options.data, seed=seed, rounds=rounds)
            by_seed[str(seed)] = results.row(f"{row}, seed {seed}", run, config)
        rows[row] = over_seeds(by_seed)
    gains(rows)
    results.finish({"rounds": rounds, "rows": rows})


if __name__ == "__main__":
    main()
