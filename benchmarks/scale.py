"""Ten thousand simulated devices on one machine: memory, and seconds per round, compared with smaller fleets.

Each device's 32 samples are drawn from its own seed when it is chosen. 100 devices train in a round, on ``small`` (2.2
million parameters), of fleets of 100 and of 10,000.

``everyone``: all devices train in every round, on ``digits_cnn`` (38,282 parameters), over residual links in both directions.
Between rounds a device's record is its unsent error, one model (153 kB, 1.5 GB for 10,000), within
``server.link_memory_bytes``, the rest on disk; a plan in flight has the one before and the one after. The model that devices
hold is stored once. ``everyone_100`` and ``everyone_1000`` are the same in fleets of 100 and 1,000, and ``growth`` is the
exponent of the server's processor seconds a round from the smallest fleet to the largest (1: proportional to the number of
devices; the smallest fleet includes what does not depend on it).

``returning``: a tenth of 1,000 devices, drawn at random, trains in each round, over the same links, so that devices return
after long absences and are sent all residuals that they missed, ``residuals_a_plan`` on average. Each residual is sealed once,
and opened once by each worker. Only the second half of the rounds counts.

``resyncs`` counts links whose memory was dropped. ``peak_memory_bytes`` is the largest sum of proportional set sizes over the
run's whole process tree (driver, server, workers, Ray's own processes), sampled every fifth of a second, or less often where
reading them takes long. Resident pages of the object store are part of it: they are shared memory, mapped by these processes.
``server_cpu_s`` and ``worker_cpu_s``: processor seconds a round of the server's process, and of all workers' together; the
first round, in which nothing is opened, does not count.

    python benchmarks/scale.py --quick      few rounds and devices
    python benchmarks/scale.py --save
"""

import argparse
import contextlib
import math
import os
import time
from typing import Any

import fedbonsai
from common import Results, add_options, median
from fedbonsai.runtime.events import PlanEnded, VersionClosed
from processes import PeakMemory, Tree, name_of


def cpu_s() -> dict[str, float]:
    """Processor seconds so far of the run's server and of its workers, found by the names that Ray gives them."""
    found = {"server": 0.0, "worker": 0.0}
    for number, seconds in Tree(os.getpid()).cpu_s().items():
        with contextlib.suppress(OSError):  # it has ended
            name = name_of(number)
            for kind, actor in (("server", "ray::ServerActor"), ("worker", "ray::WorkerActor")):
                if name.startswith(actor):
                    found[kind] += seconds
    return found


def measure(num_devices: int, *, rounds: int, skipped: int = 1, **settings: Any) -> dict[str, Any]:
    """One run: seconds per round, peak memory, seconds to the end of the first round, processor seconds, and bytes sent.

    ``skipped``: first rounds that do not count in seconds.
    """
    fleet_class = {"name": "device", "count": num_devices, "flop_per_s": 1e10, "memory_bytes": 10**9}
    fleet_class |= {"up_bytes_per_s": 1e7, "down_bytes_per_s": 1e7}
    memory = PeakMemory(Tree(os.getpid()))
    memory.start()
    start = time.perf_counter()
    run = fedbonsai.run(
        {
            "name": f"scale-{num_devices}",
            "fleet": {"classes": [fleet_class]},
            "training": {"batch_size": 32},
            "evaluation": {"where": "none"},
            "stop": {"rounds": rounds},
        }
        | settings,
        backend="ray",
    )
    walls, used, missed, first, last = [], [], 0, 0.0, dict[int, int]()
    for event in run:
        if isinstance(event, VersionClosed):
            first = first or time.perf_counter() - start
            walls.append(event.wall_s)
            used.append(cpu_s())
        elif isinstance(event, PlanEnded):
            plan = event.report.plan
            missed += (plan.version - last.get(plan.device, 0)) * (plan.version >= skipped)
            last[plan.device] = plan.version
    summary = run.summary
    assert summary["outcomes"]["done"] == sum(summary["outcomes"].values()), summary["outcomes"]
    counted = rounds - skipped
    server_s, worker_s = ((used[-1][kind] - used[skipped - 1][kind]) / counted for kind in ("server", "worker"))
    plans = summary["outcomes"]["done"]
    return {
        "plans": plans,
        "round_s": median(walls[skipped:]),
        "peak_memory_bytes": memory.stop(),
        "first_round_s": round(first, 2),
        "server_cpu_s": round(server_s, 3),
        "worker_cpu_s": round(worker_s, 3),
        "server_ms_a_plan": round(1000 * server_s * rounds / plans, 3),
        "worker_ms_a_plan": round(1000 * worker_s * rounds / plans, 3),
        "missed_a_plan": round(missed * rounds / plans / counted, 2),
        "up_bytes": summary["up_bytes"],
        "down_bytes": summary["down_bytes"],
        "resyncs": summary["resyncs"],
    }


def some(cohort: int) -> dict[str, Any]:
    """A cohort of all devices trains ``small``."""
    samples = {"shape": [3, 32, 32], "classes": 10, "samples_per_device": 32}
    return {
        "model": "small",
        "data": {"name": "synthetic", "kwargs": samples},
        "policy": [{"name": "random", "cohort": cohort}],
    }


def linked(cohort: float) -> dict[str, Any]:
    """A share of the devices trains ``digits_cnn``, over residual links."""
    samples = {"shape": [1, 8, 8], "classes": 10, "samples_per_device": 32}
    return {
        "model": "digits_cnn",
        "data": {"name": "synthetic", "kwargs": samples},
        "policy": [{"name": "random", "cohort": cohort}, {"name": "residuals", "density": 0.01}],
        "server": {"statistics": "batch"},
    }


def of_links(num_devices: int, rounds: int, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run over residual links."""
    figures["residuals_a_plan"] = figures.pop("missed_a_plan")
    per_update = round(figures["up_bytes"] / figures["plans"], 1)
    return {"devices": num_devices, "rounds": rounds, **figures, "up_bytes_an_update": per_update}


def main() -> None:
    parser = argparse.ArgumentParser(description="10,000 simulated devices on one machine")
    parser.add_argument("--quick", action="store_true", help="few rounds and devices")
    add_options(parser)
    arguments = parser.parse_args()
    results = Results("scale", arguments)
    cohort, rounds = (25, 4) if arguments.quick else (100, 20)
    fleets = (20, 50, 200) if arguments.quick else (100, 1_000, 10_000)
    returning, long = (100, 10) if arguments.quick else (1_000, 40)
    few = results.row("100", measure, 100, rounds=rounds, **some(cohort))
    many = results.row("10,000", measure, 10_000, rounds=rounds, **some(cohort))
    many = {name: value for name, value in many.items() if name != "missed_a_plan"}  # its links have no memory
    everyone = {
        count: of_links(count, 3, results.row(f"everyone, {count}", measure, count, rounds=3, **linked(1.0)))
        for count in fleets
    }
    absent = results.row("returning", measure, returning, rounds=long, skipped=long // 2, **linked(0.1))
    least, middle, most = fleets
    growth = math.log(everyone[most]["server_cpu_s"] / everyone[least]["server_cpu_s"]) / math.log(most / least)
    result: dict[str, Any] = {
        "devices": 10_000,
        "cohort": cohort,
        "rounds": rounds,
        **many,
        "round_s_100_devices": few["round_s"],
        "round_ratio": round(many["round_s"] / few["round_s"], 3),
        "peak_memory_bytes_100_devices": few["peak_memory_bytes"],
        "everyone": everyone[most] | {"growth": round(growth, 3)},
        "everyone_100": everyone[least],
        "everyone_1000": everyone[middle],
        "returning": of_links(returning, long, absent),
    }
    results.finish(result)


if __name__ == "__main__":
    main()
