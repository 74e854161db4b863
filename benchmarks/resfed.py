"""Accuracy against bytes of dense FedAvg, compressed weights and the residual rules on digits, on the same data and seeds.

    python benchmarks/resfed.py --quick     all rows, one seed, 20 and 40 rounds, in under a minute
    python benchmarks/resfed.py --save      all rows, three seeds, 60 and 120 rounds

There are runs in which all devices take part, and runs of twice as many rounds with 30 % in each. Differences of a few points
are not significant with one seed. All bytes of packets, plans and reports are counted from the first round on (``up_Mb`` and
``down_Mb`` are megabits for each device, in units of 10^6 bits, as in the paper). ``accuracy`` is the mean of the last five
rounds. A row holds means over the seeds (null if a seed lacks the figure), and each seed's figures in ``by_seed``. CIFAR-10:
resfed_cifar.py. The last line is JSON.
"""

import argparse
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedbonsai
from common import Results, add_options, over_seeds
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.policies.decision import Decision
from fedbonsai.runtime.events import Evaluated, VersionClosed
from msgspec.structs import replace

CLIENTS = 10
SPARSE = ("topk", {"density": 0.01}), ("ternary", {}), ("uniform", {"roles": ["vector"]}), ("entropy", {})


@dataclass(frozen=True)
class CompressedWeights:
    """The baseline of the paper: the same compression applied to the weights, on the uplink only."""

    def init(self) -> None:
        """No state."""

    def decide(self, view: Any, state: None, decision: Decision) -> tuple[Decision, None]:
        """Makes each plan upload compressed weights instead of differences."""
        codecs = tuple(CodecSpec(name, options) for name, options in SPARSE)
        plans = [replace(p, upload=replace(p.upload, payload="weights"), codec_up=codecs) for p in decision.plans]
        return replace(decision, plans=tuple(plans)), None


ROWS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "weights": {"name": "resfed:CompressedWeights"},
    "delta_1%": {"name": "residuals", "up": "delta", "density": 0.01},
    "delta_0.7%": {"name": "residuals", "up": "delta", "density": 0.007},
    "delta_0.5%": {"name": "residuals", "up": "delta", "density": 0.005},
    "delta_normalised": {"name": "residuals", "up": "delta", "density": 0.01, "scope": "normalised"},
    "drift": {"name": "residuals", "up": "drift", "density": 0.01},
    "stationary": {"name": "residuals", "up": "stationary", "density": 0.01},
    "half_step": {"name": "residuals", "up": "half_step", "down": "half_step", "density": 0.01},
}
QUICK_ROWS = ("dense", "weights", "delta_1%", "drift", "stationary", "half_step")
DEVICE = {"name": "device", "count": CLIENTS, "flop_per_s": 1e10, "memory_bytes": 10**10, "up_bytes_per_s": 1e6,
          "down_bytes_per_s": 1e6}  # fmt: skip
COMMON: dict[str, Any] = {
    "preset": "fedavg",
    "fleet": {"classes": [DEVICE]},
    # Normalisation by statistics of the batch, in all rows (docs/policies.md).
    "server": {"statistics": "batch"},
}
DIGITS: dict[str, Any] = {
    "model": "digits_cnn",
    "data": {"name": "digits", "partition": {"name": "classes", "classes_per_device": 2}},
    "training": {"epochs": 2, "batch_size": 32, "optimiser": {"learning_rate": 0.05, "momentum": 0.9}},
    "backend": "inline",
}


def run(row: str, config: dict[str, Any], *, cohort: float, target: float, verbose: bool = False) -> dict[str, Any]:
    """Runs a row to its end. Returns its accuracy, and rounds and bytes until it first reached ``target``."""
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
            if verbose:
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


def digits(results: Results, rows: list[str], *, rounds: int, seeds: range, target: float) -> dict[str, Any]:
    """All rows with full and with 30 % participation: means over the seeds, and percentage points behind dense."""
    counts = {1.0: rounds, 0.3: 2 * rounds}
    print(f"digits, {rounds} rounds of all devices and {2 * rounds} of 30 %, {_named(seeds)}", flush=True)
    keys = {
        (participation, row, seed): f"{participation:g} {row}, seed {seed}"
        for participation in counts
        for row in rows
        for seed in seeds
    }
    with ProcessPoolExecutor(2) as pool:
        running = {
            pool.submit(one_seed, row, participation, counts[participation], seed, target): key
            for (participation, row, seed), key in keys.items()
            if key not in results
        }
        for future in as_completed(running):
            results.row(running[future], future.result)
    result: dict[str, Any] = {}
    for participation in counts:
        result[f"{participation:g}"] = {
            row: over_seeds({str(seed): results[keys[participation, row, seed]] for seed in seeds}, digits=5)
            for row in rows
        }
    for by_row in result.values():
        for found in by_row.values() if "dense" in by_row else ():
            found["points_behind_dense"] = round(100 * (by_row["dense"]["accuracy"] - found["accuracy"]), 2)
    return {"target": target, "participation": result}


def _named(seeds: range) -> str:
    """The seeds, in words."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and few rounds")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all, with --quick some")
    parser.add_argument(
        "--rounds", type=int, help="with all devices; default: 60, with --quick 20; twice as many with 30 %%"
    )
    parser.add_argument("--seeds", type=int, help="how many; default: 3, with --quick 1")
    add_options(parser)
    options = parser.parse_args()
    rows = options.rows or list(QUICK_ROWS if options.quick else ROWS)
    seeds = range(options.seeds or (1 if options.quick else 3))
    sys.path.insert(0, str(Path(__file__).parent))  # so that other processes can import CompressedWeights
    results = Results("resfed", options, seeds=seeds)
    results.finish(
        digits(results, rows, rounds=options.rounds or (20 if options.quick else 60), seeds=seeds, target=0.9)
    )


if __name__ == "__main__":
    main()
