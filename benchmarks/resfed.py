"""Accuracy against bytes: dense FedAvg, compressed weights, differences and the residual rules, on the same data and seeds.

    python benchmarks/resfed.py --quick               digits, few rounds, in under a minute
    python benchmarks/resfed.py                       digits, 60 and 120 rounds
    python benchmarks/resfed.py --data ROOT           ResFed's network on CIFAR-10, on Ray, to 70 %
    python benchmarks/resfed.py --data ROOT --rows delta

Every byte of every packet, plan and report counts, from the first one on (``up_Mb`` and ``down_Mb`` are megabits for each
client, in units of 10^6, as the paper counts). ``accuracy`` is the mean of the last five rounds. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedbonsai
from common import RESULTS, finish, machine
from fedbonsai.comms.codecs import CodecSpec
from fedbonsai.policies.decision import Decision
from fedbonsai.runtime.events import Evaluated, VersionClosed
from msgspec.structs import replace

CLIENTS = 10
SEEDS = 3
SPARSE = ("topk", {"density": 0.01}), ("ternary", {}), ("uniform", {"roles": ["vector"]}), ("entropy", {})


@dataclass(frozen=True)
class CompressedWeights:
    """The baseline of the paper: the same compressor on the weights themselves, up alone."""

    def init(self) -> None:
        """No state."""

    def decide(self, view: Any, state: None, decision: Decision) -> tuple[Decision, None]:
        """Weights instead of differences, compressed."""
        codecs = tuple(CodecSpec(name, options) for name, options in SPARSE)
        plans = [replace(p, upload=replace(p.upload, payload="weights"), codec_up=codecs) for p in decision.plans]
        return replace(decision, plans=tuple(plans)), None


ROWS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "weights": {"name": "resfed:CompressedWeights"},
    "delta": {"name": "residuals", "up": "delta"},
    "delta_0.5%": {"name": "residuals", "up": "delta", "density": 0.005},
    "drift": {"name": "residuals", "up": "drift"},
    "stationary": {"name": "residuals", "up": "stationary"},
    "half_step": {"name": "residuals", "up": "half_step", "down": "half_step"},
}
QUICK_ROWS = ("dense", "delta", "half_step")
FULL_ROWS = ("dense", "delta", "delta_0.5%", "half_step")
DEVICE = {"name": "device", "count": CLIENTS, "flop_per_s": 1e10, "memory_bytes": 10**10, "up_bytes_per_s": 1e6,
          "down_bytes_per_s": 1e6}  # fmt: skip
COMMON: dict[str, Any] = {
    "preset": "fedavg",
    "fleet": {"classes": [DEVICE]},
    # The same treatment of normalisation for all rows: statistics of the batch at hand (docs/policies.md).
    "server": {"statistics": "batch"},
}
DIGITS: dict[str, Any] = {
    "model": "digits_cnn",
    "data": {"name": "digits", "partition": {"name": "classes", "classes_per_device": 2}},
    "training": {"epochs": 2, "batch_size": 32, "optimiser": {"learning_rate": 0.05, "momentum": 0.9}},
    "backend": "inline",
}
CIFAR: dict[str, Any] = {
    "model": "resfed_cnn",
    "training": {
        "epochs": 1,
        "batch_size": 64,
        "optimiser": {"learning_rate": 0.01, "momentum": 0.9},
        "precision": "bf16",
        "channels_last": True,
    },
    "workers": 2,
}
CIFAR_DATA: dict[str, Any] = {"name": "cifar10", "partition": {"name": "classes", "classes_per_device": 5}}


def run(row: str, config: dict[str, Any], *, cohort: float, target: float, told: bool = False) -> dict[str, Any]:
    """One run to its end; what it reached, and what it had cost when it first reached ``target``."""
    started = time.perf_counter()
    closed: VersionClosed | None = None
    accuracies: list[float] = []
    reached: dict[str, Any] = {"rounds_to_target": None, "up_Mb": None, "down_Mb": None}
    policies = [{"name": "random", "cohort": cohort}, ROWS[row]]
    for event in fedbonsai.run(COMMON | config | {"name": row, "policy": [p for p in policies if p]}):
        if isinstance(event, VersionClosed):
            closed = event
        elif isinstance(event, Evaluated) and closed is not None:
            accuracies.append(event.figures["accuracy"])
            up, down = (8 * count / CLIENTS / 1e6 for count in (closed.up_bytes, closed.down_bytes))
            if told:
                print(f"  {row} round {closed.version}: {accuracies[-1]:.4f}, {up:.3f} Mb up, {down:.3f} down, "
                      f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
            if accuracies[-1] >= target and reached["rounds_to_target"] is None:
                reached = {"rounds_to_target": closed.version, "up_Mb": round(up, 5), "down_Mb": round(down, 5)}
    assert closed is not None
    return {
        "accuracy": round(statistics.fmean(accuracies[-5:]), 4),
        "best": round(max(accuracies), 4),
        "rounds": closed.version,
        **reached,
        "up_Mb_a_round": round(8 * closed.up_bytes / CLIENTS / closed.version / 1e6, 5),
        "down_Mb_a_round": round(8 * closed.down_bytes / CLIENTS / closed.version / 1e6, 5),
        "wall_s": round(time.perf_counter() - started, 1),
    }


def one_seed(row: str, participation: float, rounds: int, seed: int, target: float) -> dict[str, Any]:
    """One run on digits, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    config = DIGITS | {"seed": seed, "stop": {"rounds": rounds}}
    return run(row, config, cohort=participation, target=target)


def digits(rows: list[str], *, rounds: int, target: float) -> dict[str, Any]:
    """All rows, full and 30 % participation, three seeds; the means, and how far each row is behind dense."""
    result: dict[str, Any] = {}
    with ProcessPoolExecutor(2) as pool:
        jobs = {
            (participation, row): [
                pool.submit(one_seed, row, participation, rounds if participation == 1.0 else 2 * rounds, seed, target)
                for seed in range(SEEDS)
            ]
            for participation in (1.0, 0.3)
            for row in rows
        }
        for (participation, row), futures in jobs.items():
            found = [future.result() for future in futures]
            means = {key: _mean([one[key] for one in found]) for key in found[0]}
            means["accuracies"] = [one["accuracy"] for one in found]
            result.setdefault(f"{participation:g}", {})[row] = means
            print(f"  {participation:g} {row}: {means}", flush=True)
    for by_row in result.values():
        for means in by_row.values():
            means["points_behind_dense"] = round(100 * (by_row["dense"]["accuracy"] - means["accuracy"]), 2)
    return {"target": target, "participation": result}


def _mean(values: list[float | None]) -> float | None:
    """The mean; None where one of the seeds has no value."""
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 5) if len(known) == len(values) else None


def cifar(rows: list[str], *, root: str, rounds: int, seed: int) -> dict[str, Any]:
    """ResFed's network on CIFAR-10, ten clients with five cyclic classes each, to 70 %."""
    result = {}
    for row in rows:
        config = CIFAR | {
            "data": CIFAR_DATA | {"root": root},
            "stop": {"rounds": rounds, "accuracy": 0.7},
            "seed": seed,
        }
        result[row] = run(row, config, cohort=1.0, target=0.7, told=True) | {"commit": machine()["commit"]}
        print(json.dumps({row: result[row]}), flush=True)
    return {"target": 0.7, "rows": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--rows", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of CIFAR-10")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # where processes find CompressedWeights
    if args.data:
        rows = args.rows.split(",") if args.rows else list(FULL_ROWS)
        result = cifar(rows, root=args.data, rounds=args.rounds or 60, seed=args.seed)
        saved = RESULTS / "resfed_cifar.json"
        if args.save and saved.exists():  # rows of earlier calls, each with an hour of computing in it
            result["rows"] = json.loads(saved.read_text())["rows"] | result["rows"]
        finish(result, name="resfed_cifar", save=args.save)
        return
    rows = args.rows.split(",") if args.rows else list(QUICK_ROWS if args.quick else ROWS)
    result = digits(rows, rounds=args.rounds or (15 if args.quick else 60), target=0.9)
    finish(result, name="resfed_quick" if args.quick else "resfed", save=args.save)


if __name__ == "__main__":
    main()
