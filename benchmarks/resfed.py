"""Accuracy against bytes: dense FedAvg, compressed weights, differences and the residual rules, on the same data and seeds.

    python benchmarks/resfed.py --quick               digits, full and 30 % participation, three seeds
    python benchmarks/resfed.py --data ROOT           ResFed's network on CIFAR-10, to 70 %
    python benchmarks/resfed.py --data ROOT --rows dense,delta

Every byte of every packet and plan message counts, from the first one on (``up_Mb`` and ``down_Mb`` are megabits for each
client, in units of 10^6, as the paper counts). ``accuracy`` is the mean of the last five rounds. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import fedbonsai
from common import RESULTS, finish
from fedbonsai.runtime.events import Evaluated, VersionClosed

CLIENTS = 10
COMMON: dict[str, Any] = {
    "preset": "fedavg",
    "fleet": {"classes": [{"name": "device", "count": CLIENTS, "flop_per_s": 1e10, "memory_bytes": 10**10,
                           "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}]},
    "server": {"statistics": "batch"},
}  # fmt: skip
CIFAR: dict[str, Any] = {
    "model": "resfed_cnn",
    "training": {
        "epochs": 1,
        "batch_size": 64,
        "optimiser": {"learning_rate": 0.01, "momentum": 0.9},
        "precision": "bf16",
        "channels_last": True,
    },
}
CIFAR_DATA: dict[str, Any] = {"name": "cifar10", "partition": {"name": "classes", "classes_per_device": 5}}


def residuals(**fields: Any) -> dict[str, Any]:
    """A row of the policy of that name."""
    return {"policy": [{"name": "random", "cohort": 1.0}, {"name": "residuals", **fields}]}


ROWS: dict[str, dict[str, Any]] = {
    "dense": {},
    "delta": residuals(up="delta"),
    "half_step": residuals(up="half_step", down="half_step"),
}


def run(config: dict[str, Any], *, target: float) -> dict[str, Any]:
    """One run to its end; what it reached, and what it had cost when it first reached ``target``."""
    started = time.perf_counter()
    closed: VersionClosed | None = None
    accuracies: list[float] = []
    reached: dict[str, Any] = {"rounds_to_target": None, "up_Mb": None, "down_Mb": None}
    run = fedbonsai.run(config)
    for event in run:
        if isinstance(event, VersionClosed):
            closed = event
        elif isinstance(event, Evaluated) and closed is not None:
            accuracies.append(event.figures["accuracy"])
            up, down = (8 * count / CLIENTS / 1e6 for count in (closed.up_bytes, closed.down_bytes))
            print(f"  {config['name']} round {closed.version}: {accuracies[-1]:.4f}, {up:.3f} Mb up, {down:.3f} down, "
                  f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
            if accuracies[-1] >= target and reached["rounds_to_target"] is None:
                reached = {"rounds_to_target": closed.version, "up_Mb": round(up, 4), "down_Mb": round(down, 4)}
    assert closed is not None
    return {
        "accuracy": round(statistics.fmean(accuracies[-5:]), 4),
        "best": max(accuracies),
        "rounds": closed.version,
        **reached,
        "up_Mb_a_round": round(8 * closed.up_bytes / CLIENTS / closed.version / 1e6, 5),
        "down_Mb_a_round": round(8 * closed.down_bytes / CLIENTS / closed.version / 1e6, 5),
        "wall_s": round(time.perf_counter() - started, 1),
    }


def full(args: argparse.Namespace) -> dict[str, Any]:
    """ResFed's network on CIFAR-10, ten clients with five cyclic classes each, to 70 %."""
    rows = {}
    for name in args.rows.split(","):
        config = COMMON | CIFAR | ROWS[name] | {
            "name": name,
            "data": CIFAR_DATA | {"root": args.data},
            "stop": {"rounds": args.rounds, "accuracy": 0.7},
            "seed": args.seed,
            "workers": 2,
        }  # fmt: skip
        rows[name] = run(config, target=0.7)
        print(json.dumps({name: rows[name]}), flush=True)
    saved = RESULTS / "resfed.json"
    if args.save and saved.exists():  # rows of an earlier call, each with hours of computing in it
        rows = json.loads(saved.read_text())["rows"] | rows
    return {"mode": "full", "target": 0.7, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    finish(full(args), name="resfed", save=args.save)


if __name__ == "__main__":
    main()
