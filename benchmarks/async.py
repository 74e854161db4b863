"""Asynchronous rounds: virtual seconds to a target accuracy, the server's memory, and its throughput in updates.

    python benchmarks/async.py --quick      one seed, in under a minute
    python benchmarks/async.py --save       three seeds

``seconds``: virtual seconds until digits_cnn has an accuracy of 95 %, on ten devices of which five have speed 1, two 1/2,
and one each 1/4, 1/8 and 1/16, and every fifth plan is lost. Synchronous rounds; rounds closed at seven updates of ten
(``over_selection``); rounds closed by a deadline that devices of 1/4 and slower would miss, which are left out
(``deadline``) or send the work that they have done by then (``partial_work``); FedBuff (every fourth update closes a
version) and FedAsync; means over the seeds, each seed's seconds in ``seconds_by_seed`` and their range in ``seconds_spread``.
``speedup``: synchronous over the faster asynchronous one; ``times_faster``: a row's seconds over another's.

``memory``: resident bytes of the process that runs server and devices, at rounds 500 and 1,000, of FedBuff with residual links
in both directions, and their growth. (Before, what a worker keeps of opened residuals fills, up to 64 MB.)
``memory_by_devices``: the same of a fleet of 10 and of 1,000 after 100 rounds of ten; ``budget``: bytes of memory that links
may take; ``remembered``: bytes of the links of all devices that took part.

``updates_per_s``: plans that train nothing, a model of 1 MB, every update closes a version; all steps of each: model
sealed, opened, update sealed, opened, folded, applied. On Ray with two workers, and in process. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fedbonsai
import torch
from common import Results, add_options
from fedbonsai.runtime.events import Evaluated, PlanEnded, VersionClosed

TARGET = 0.95
SPEEDS = {1: 5, 2: 2, 4: 1, 8: 1, 16: 1}  # number of devices by the divisor n of their speed
LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 5e6, "down_bytes_per_s": 5e6, "latency_s": 0.005}
FAST_FLOP_PER_S = 1e9
STALENESS = {"rule": "polynomial", "a": 0.5}
POLYNOMIAL = {"server": {"staleness": STALENESS}}
BUFFER = 4
LINKS_BUDGET = 8 * 2**20


def fleet(dropout: float) -> dict[str, Any]:
    """The ten devices."""
    lost = {"dropout": dropout} if dropout else {}
    return {
        "classes": [
            {"name": f"1/{slower}", "count": count, "flop_per_s": FAST_FLOP_PER_S / slower} | LINK | lost
            for slower, count in SPEEDS.items()
        ]
    }


METHODS: dict[str, dict[str, Any]] = {
    "synchronous": {"policy": [{"name": "random", "cohort": 1.0}]},
    "over_selection": {"policy": [{"name": "random", "cohort": 1.0}, {"name": "closing", "at": 7}]},
    "deadline": {},  # set to the time of devices of 1/2, which is measured first
    "partial_work": {},
    "fedbuff": {"policy": [{"name": "asynchronous", "buffer": BUFFER}]} | POLYNOMIAL,
    "fedasync": {
        "policy": [{"name": "asynchronous", "buffer": 1}],
        "server": {"staleness": STALENESS, "optimiser": {"learning_rate": 0.6}},
    },
}


def seconds_to_target(method: str, *, seed: int, most: int) -> float | None:
    """Virtual seconds at which the target was reached; None if not, within the updates of ``most`` rounds of all devices."""
    config: dict[str, Any] = {
        "backend": "inline",
        "seed": seed,
        "model": "digits_cnn",
        "data": {"name": "digits", "partition": {"name": "iid"}},
        "fleet": fleet(0.2),
        "training": {"epochs": 2, "batch_size": 16, "optimiser": {"learning_rate": 0.05, "momentum": 0.9}},
        "stop": {"rounds": most * {"fedbuff": 3, "fedasync": 10}.get(method, 1), "accuracy": TARGET},
    }
    config |= METHODS[method]
    if not config.get("policy"):
        everyone = {"name": "random", "cohort": 1.0}
        seconds = 1.05 * longest(config | {"policy": [everyone]}, slower=2)
        partial = method == "partial_work"
        selection = everyone if partial else {"name": "deadline", "deadline_s": seconds}
        config["policy"] = [selection, {"name": "closing", "after_s": seconds, "partial": partial}]
    for event in fedbonsai.run(config):
        if isinstance(event, Evaluated) and (event.figures.get("accuracy") or 0.0) >= TARGET:
            return event.time_s
    return None


def longest(config: dict[str, Any], *, slower: int) -> float:
    """Virtual seconds of a plan on the devices with this divisor of the speed."""
    run = fedbonsai.run(config | {"stop": {"rounds": 1}, "fleet": fleet(0.0)})
    ended = [event for event in run if type(event).__name__ == "PlanEnded"]
    return max(event.report.virtual.seconds for event in ended if event.fleet_class == f"1/{slower}")


def resident_bytes() -> int:
    """Memory that this process uses now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(first: int, last: int) -> dict[str, Any]:
    """Memory of this process at two rounds; runs in a new process."""
    config = {
        "backend": "inline",
        "model": "digits_cnn",
        "data": {"name": "digits"},
        "fleet": fleet(0.0),
        "training": {"steps": 1, "batch_size": 16},
        "policy": [{"name": "asynchronous", "buffer": BUFFER}, {"name": "residuals", "density": 0.01}],
        "server": {"staleness": STALENESS, "statistics": "batch"},
        "evaluation": {"where": "none"},
        "stop": {"rounds": last},
    }
    found: dict[int, int] = {}
    for event in fedbonsai.run(config):
        if isinstance(event, VersionClosed) and event.version in (first, last):
            found[event.version] = resident_bytes()
    growth = found[last] / found[first] - 1
    return {f"round_{first}": found[first], f"round_{last}": found[last], "growth": round(growth, 4)}


def memory_of(devices: int, rounds: int) -> dict[str, int]:
    """Memory of this process after a number of rounds of ten devices; runs in a new process."""
    config = {
        "backend": "inline",
        "model": "digits_cnn",
        "data": {"name": "digits", "partition": {"name": "iid"}},
        "fleet": {"classes": [{"name": "device", "count": devices, "flop_per_s": FAST_FLOP_PER_S} | LINK]},
        "training": {"steps": 1, "batch_size": 16},
        "policy": [{"name": "random", "cohort": 10}, {"name": "residuals", "density": 0.01}],
        "server": {"statistics": "batch", "link_memory_bytes": LINKS_BUDGET},
        "evaluation": {"where": "none"},
        "stop": {"rounds": rounds},
    }
    seen = set()
    run = fedbonsai.run(config)
    for event in run:
        if isinstance(event, PlanEnded):
            seen.add(event.report.plan.device)
        if isinstance(event, VersionClosed) and event.version == rounds:
            found = resident_bytes()
    return {"took_part": len(seen), "bytes": found, "remembered": 2 * 4 * len(seen) * run.summary["parameters"]}


def in_a_process(what: str) -> Any:
    """The result of a function of this file in a new process."""
    code = f"import importlib, json; print(json.dumps(importlib.import_module('async').{what}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def updates_per_s(backend: str, codecs: dict[str, Any], *, rounds: int) -> float:
    """Updates folded per second, without the first tenth of the run."""
    config = {
        "backend": backend,
        "model": {"name": "torch.nn:Linear", "kwargs": {"in_features": 500, "out_features": 500}},
        "data": {"name": "synthetic", "kwargs": {"shape": [500], "classes": 500, "samples_per_device": 2}},
        "fleet": {"classes": [{"name": "device", "count": 10, "flop_per_s": 1e12} | LINK]},
        "training": {"epochs": 0},
        "policy": [{"name": "asynchronous"}],
        "codecs": codecs,
        "evaluation": {"where": "none"},
        "stop": {"rounds": rounds},
    } | POLYNOMIAL
    if backend == "ray":
        config["workers"] = 2
    started, warm = 0.0, rounds // 10
    ended = 0.0
    for event in fedbonsai.run(config):
        if isinstance(event, VersionClosed):
            ended = time.perf_counter()
            started = ended if event.version == warm else started
    return round((rounds - warm) / (ended - started), 1)


def times_faster(seconds: dict[str, float | None]) -> dict[str, float]:
    """By how many times the asynchronous methods are faster than synchronous rounds and than rounds with a deadline."""
    pairs = [(fast, slow) for slow in ("synchronous", "deadline") for fast in ("fedbuff", "fedasync")]
    found: dict[str, float] = {}
    for fast, slow in pairs:
        shorter, longer = seconds[fast], seconds[slow]
        if shorter is not None and longer is not None:
            found[f"{fast}_than_{slow}"] = round(longer / shorter, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer rounds")
    add_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(1 if args.quick else 3)
    results = Results("async", args, seeds=seeds)
    by_seed = {
        method: [results.row(f"{method}, seed {seed}", seconds_to_target, method, seed=seed, most=60) for seed in seeds]
        for method in METHODS
    }
    reached = {method: found for method, found in by_seed.items() if None not in found}
    seconds = {method: round(statistics.fmean(reached[method]), 2) if method in reached else None for method in METHODS}
    quicker = [value for value in (seconds["fedbuff"], seconds["fedasync"]) if value is not None]
    plain: dict[str, Any] = {}
    coded = {"up": [{"name": "uniform", "bits": 8}, "entropy"], "down": ["lz4"]}
    rate = {
        name: {
            backend: results.row(
                f"updates a second, {name}, {backend}",
                updates_per_s,
                backend,
                codecs,
                rounds=200 if args.quick else 1000,
            )
            for backend in ("inline", "ray")
        }
        for name, codecs in (("dense", plain), ("coded", coded))
    }
    few, many, rounds = (10, 40, 10) if args.quick else (10, 1000, 100)
    by_devices = {
        str(count): results.row(f"memory, {count} devices", in_a_process, f"memory_of({count}, {rounds})")
        for count in (few, many)
    }
    growth = by_devices[str(many)]["bytes"] / by_devices[str(few)]["bytes"] - 1
    result = {
        "target": TARGET,
        "seconds": seconds,
        "seconds_by_seed": by_seed,
        "seconds_spread": {method: round(max(found) - min(found), 2) for method, found in reached.items()},
        "times_faster": times_faster(seconds),
        "speedup": round(seconds["synchronous"] / min(quicker), 2) if quicker and seconds["synchronous"] else None,
        "memory": results.row("memory", in_a_process, "memory(50, 100)" if args.quick else "memory(500, 1000)"),
        "memory_by_devices": by_devices | {"budget": LINKS_BUDGET, "growth": round(growth, 4)},
        "updates_per_s": rate,
    }
    results.finish(result)


if __name__ == "__main__":
    main()
