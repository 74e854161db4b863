"""Accuracy of benchmarks/zerofl.py: the three rules of ZeroFL beside dense FedAvg and sending everything.

Both data sets follow the paper's set-up where an hour on one core allows: one local epoch, SGD without momentum, an exponential
schedule with its ratio of last to first rate, a tenth to a quarter of the devices in a round.

``writers``: MNIST by writer (QMNIST's numbers), 539 devices with one writer each, 5 a round; LEAF's network for FEMNIST with
fewer channels, all its layers but the last one sparse. ``cifar``: 5,000 images of CIFAR-10 on 20 devices of equal size by a
Dirichlet distribution with alpha 1 (the paper's non-IID case), 5 a round; ResNet-18 with 8 to 64 channels.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import fedbonsai
from fedbonsai.runtime.events import Evaluated, PlanEnded

LINK = {"flop_per_s": 1e9, "memory_bytes": 10**10, "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}
TASKS: dict[str, dict[str, Any]] = {
    "writers": {
        "model": "zerofl_models:digits_cnn",
        "data": {"name": "mnist", "partition": {"name": "groups"}},
        "fleet": {"classes": [{"name": "writer", "count": 539} | LINK]},
        "training": {"batch_size": 10, "optimiser": {"learning_rate": 0.2, "momentum": 0.0}},
        "schedule": {"name": "exponential", "final": 0.25},
        "layers": ["conv1", "conv2", "fc1"],
        "rounds": 40,
    },
    "cifar": {
        "model": {"name": "profl_models:NarrowResNet18", "kwargs": {"width": 8}},
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
    started, found, up = time.thread_time(), 0.0, 0
    with fedbonsai.run(config) as events:
        for event in events:
            if isinstance(event, PlanEnded):
                up += event.report.virtual.up_bytes
            elif isinstance(event, Evaluated):
                found = event.figures["accuracy"]
    return {"accuracy": round(found, 4), "up_MB": round(up / 1e6, 2), "cpu_s": round(time.thread_time() - started, 1)}


def accuracy(
    task: str,
    *,
    root: str,
    rows: list[str],
    seeds: int,
    rounds: int | None,
    known: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """A row for each method, with each seed's figures, added to ``known`` rows; ``save`` is called after each.

    ``gain``: mean accuracy minus that of sending everything at the same sparsity and by the same server.
    """
    rounds = rounds or TASKS[task]["rounds"]
    for row in rows:
        by_seed = {}
        for seed in range(seeds):
            by_seed[str(seed)] = run(configuration(task, row, root=root, seed=seed, rounds=rounds))
            print(f"  {task}, {row}, seed {seed}: {by_seed[str(seed)]}", flush=True)
        found = [each["accuracy"] for each in by_seed.values()]
        known[row] = {
            "accuracy": round(statistics.fmean(found), 4),
            "deviation": round(statistics.stdev(found), 4) if len(found) > 1 else None,
            "up_MB": round(statistics.fmean(each["up_MB"] for each in by_seed.values()), 2),
            "by_seed": by_seed,
        }
        sparsity, rule, _, server = ROWS[row]
        whole = next((r for r, about in ROWS.items() if about == (sparsity, "all", 0.0, server) and r in known), None)
        if whole and whole != row and rule:
            known[row]["gain"] = round(known[row]["accuracy"] - known[whole]["accuracy"], 4)
        save({"rounds": rounds, "rows": known})
    return {"rounds": rounds, "rows": known}
