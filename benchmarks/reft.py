"""What REFT, HeteroFL and FedRolex reach beside FedAvg on unequal devices.

    python benchmarks/reft.py --quick               one round of each method; digits, a few rows and rounds
    python benchmarks/reft.py --save                the same; digits with all rows and three seeds

``fleet``: ten devices, five of speed 1, two of 1/2, and one each of 1/4, 1/8 and 1/16. ``stragglers``: one round in which each
has as many samples and its transfers take no time; ``spread``: simulated seconds of the slowest device by those of the median
one; ``past_deadline``: devices of the preset ``reft`` that took longer than the median device does for the whole model.

``training``: the same fleet with links of 1 MB/s, all devices in every round; labels by a Dirichlet distribution with alpha
0.1; a tenth of the samples is public, and no device has it in any row. All rows have the same training settings.
``smallest``: FedAvg with the narrowest width of the row reft on all devices. ``seconds`` are simulated, bytes are those of
all packets, plans and reports; ``task_MB`` is between the server and its distiller. ``times_sooner``: FedAvg's seconds to the
target by the row's, of the same seed (aim: at least 3), and ``times_the_MB``: the row's bytes to the target by FedAvg's;
``times_shorter``: FedAvg's seconds for all rounds by the row's. ``gain_of_distillation``: accuracy with it minus that
without, of narrow and of whole parts, paired by seed. Runs share the cores. What a width itself costs: widths.py.

The last line is JSON.
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import fedbonsai
from common import Results, add_options, over_seeds
from fedbonsai.runtime.events import Evaluated, PlanEnded, VersionClosed

SPEEDS = {1.0: 5, 1 / 2: 2, 1 / 4: 1, 1 / 8: 1, 1 / 16: 1}  # and the number of devices of each
LEVELS = [1.0, 0.5, 0.25, 0.125, 0.0625]


def stragglers() -> dict[str, Any]:
    """One round of FedAvg and one of the preset ``reft``, without its distillation: the spread of the devices' seconds."""
    link = {"up_bytes_per_s": 1e15, "down_bytes_per_s": 1e15, "memory_bytes": 10**10}
    common: dict[str, Any] = {
        "model": "resfed_cnn",
        "data": {
            "name": "synthetic",
            "kwargs": {"shape": [3, 32, 32], "classes": 10, "samples_per_device": 8},
        },
        "fleet": fleet(50e9, link),
        "training": {"epochs": 1, "batch_size": 8},
        "evaluation": {"where": "none"},
        "backend": "inline",
        "stop": {"rounds": 1},
    }
    seconds = {}
    for name, chain in (("fedavg", []), ("reft", policies("reft_no_distillation", {}))):
        events = list(fedbonsai.run(common | {"policy": [{"name": "all"}, *chain]}))
        reports = [event.report for event in events if isinstance(event, PlanEnded)]
        assert len(reports) == sum(SPEEDS.values())
        seconds[name] = [report.virtual.seconds for report in reports]
    deadline = statistics.median_low(seconds["fedavg"])
    found: dict[str, Any] = {
        f"spread_{name}": round(max(each) / statistics.median(each), 2) for name, each in seconds.items()
    }
    return found | {"past_deadline": sum(each > 1.0001 * deadline for each in seconds["reft"])}


def policies(row: str, distillation: dict[str, Any]) -> list[dict[str, Any]]:
    """The policy list of a row; ``distillation``: settings of that policy."""
    by_level = {"name": "width", "levels": LEVELS, "unit": "width", "min_channels": 1, "scaled": True}
    reft = {"name": "width", "rule": "deadline", "too_slow": "fewer_steps"}
    slowest = {"name": "width", "rule": "fixed", "widths": {f"class{n}": 0.25 for n, _ in enumerate(SPEEDS)}}
    chains: dict[str, list[dict[str, Any]]] = {
        "fedavg": [],
        "smallest": [slowest | {"channels": "prefix"}],
        "heterofl": [by_level | {"channels": "prefix"}],
        "fedrolex": [by_level | {"channels": "rolling", "refresh": 1}],
        "reft_no_distillation": [reft],
        "reft_no_width": [distillation],
        "reft": [reft, distillation],
    }
    return chains[row]


ROWS = ("fedavg", "smallest", "heterofl", "fedrolex", "reft_no_distillation", "reft_no_width", "reft")
# A tenth of the digits is public: about 140 samples. A tenth of these is too few to tell a better student from a worse one.
DISTILLATION = {"name": "distillation", "class_prior": 1.0, "steps": 100, "held_out": 0.3}
DIGITS: dict[str, Any] = {
    "model": "digits_cnn",
    "training": {"epochs": 2, "batch_size": 16, "optimiser": {"learning_rate": 0.02}},
    "backend": "inline",
}
MEGABYTE = {"up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6, "memory_bytes": 10**9}


def fleet(flop_per_s: float, link: dict[str, Any]) -> dict[str, Any]:
    """Ten devices of five classes; ``flop_per_s``: of the fastest."""
    classes = [
        {"name": f"class{n}", "count": count, "flop_per_s": speed * flop_per_s, **link}
        for n, (speed, count) in enumerate(SPEEDS.items())
    ]
    return {"classes": classes}


def run(row: str, config: dict[str, Any], *, target: float) -> dict[str, Any]:
    """One run: its accuracy, and what it took, also until it first reached ``target``."""
    started, closed, accuracies = time.perf_counter(), None, list[float]()
    reached: dict[str, Any] = {"rounds_to_target": None, "seconds_to_target": None, "MB_to_target": None}
    policy = [{"name": "random", "cohort": 1.0}, *policies(row, DISTILLATION)]
    for event in fedbonsai.run(config | {"name": row, "policy": policy}):
        if isinstance(event, VersionClosed):
            closed = event
        elif isinstance(event, Evaluated) and closed is not None:
            accuracies.append(event.figures["accuracy"])
            if accuracies[-1] >= target and reached["rounds_to_target"] is None:
                megabytes = round((closed.up_bytes + closed.down_bytes) / 1e6, 2)
                reached = {"rounds_to_target": closed.version, "seconds_to_target": round(event.time_s, 1),
                           "MB_to_target": megabytes}  # fmt: skip
    assert closed is not None
    return {
        "accuracy": round(statistics.fmean(accuracies[-3:]), 4),
        "best": round(max(accuracies), 4),
        "seconds": round(closed.time_s, 1),
        "up_MB": round(closed.up_bytes / 1e6, 2),
        "down_MB": round(closed.down_bytes / 1e6, 2),
        "task_MB": round(closed.task_bytes / 1e6, 2),
        **reached,
        "wall_s": round(time.perf_counter() - started, 1),
    }


def training(
    results: Results,
    common: dict[str, Any],
    *,
    rows: list[str],
    seeds: range,
    target: float,
) -> dict[str, Any]:
    """A row for each method: the mean over the seeds, and each seed's figures; as many runs at once as cores."""
    keys = {(row, seed): f"{row}, seed {seed}" for row in rows for seed in seeds}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        running = {
            pool.submit(run, row, common | {"seed": seed}, target=target): key
            for (row, seed), key in keys.items()
            if key not in results
        }
        for future in as_completed(running):
            results.row(running[future], future.result)
    result = {}
    for row in rows:
        by_seed = {str(seed): results[keys[row, seed]] for seed in seeds}
        if "fedavg" in rows:
            by_seed = {
                seed: figures | beside(results[keys["fedavg", int(seed)]], figures) for seed, figures in by_seed.items()
            }
        result[row] = over_seeds(by_seed)
    return result


def beside(fedavg: dict[str, Any], figures: dict[str, Any]) -> dict[str, float | None]:
    """Ratios of a row and FedAvg, of one seed; None where one of them has not reached the target."""

    def ratio(over: float | None, under: float | None) -> float | None:
        return round(over / under, 2) if over and under else None

    return {
        "times_sooner": ratio(fedavg["seconds_to_target"], figures["seconds_to_target"]),
        "times_the_MB": ratio(figures["MB_to_target"], fedavg["MB_to_target"]),
        "times_shorter": ratio(fedavg["seconds"], figures["seconds"]),
    }


def gain(of: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """What one row's accuracy is above another's, seed by seed, beside the standard deviations over the seeds."""
    pairs = zip(of["by_seed"].values(), over["by_seed"].values(), strict=True)
    gains = [round(one["accuracy"] - other["accuracy"], 4) for one, other in pairs]
    return {
        "by_seed": gains,
        "mean": round(statistics.fmean(gains), 4),
        "stdev": round(statistics.stdev(gains), 4) if len(gains) > 1 else None,
        **{
            f"accuracy_stdev_{name}": round(statistics.stdev(f["accuracy"] for f in row["by_seed"].values()), 4)
            for name, row in (("with", of), ("without", over))
            if len(gains) > 1
        },
    }


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    add_options(parser)
    options = parser.parse_args()
    seeds = range(options.seeds or (1 if options.quick else 3))
    rounds, target = options.rounds or (4 if options.quick else 50), 0.9
    data = {"name": "digits", "partition": {"name": "dirichlet", "alpha": 0.1}, "public_share": 0.1}
    common = DIGITS | {"data": data, "fleet": fleet(1e9, MEGABYTE), "stop": {"rounds": rounds}}
    common |= {"server": {"statistics": "batch"}}
    results = Results("reft", options, seeds=seeds)
    chosen = options.rows or (["fedavg", "heterofl", "reft"] if options.quick else list(ROWS))
    rows = training(results, common, rows=chosen, seeds=seeds, target=target)
    gains = {
        name: gain(rows[of], rows[over])
        for name, of, over in (
            ("narrow", "reft", "reft_no_distillation"),
            ("whole", "reft_no_width", "fedavg"),
        )
        if of in rows and over in rows
    }
    settings = {"data": "digits", "model": common["model"], "rounds": rounds, "seeds": len(seeds), "target": target}
    found = {"training": settings | {"rows": rows, "gain_of_distillation": gains}}
    results.finish(found | {"stragglers": results.row("stragglers", stragglers)})


if __name__ == "__main__":
    main()
