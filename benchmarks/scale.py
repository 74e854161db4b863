"""Ten thousand simulated devices on one machine: memory, and seconds per round, compared with a fleet of a hundred.

Each device's 32 samples are drawn from its own seed when it is chosen. 100 devices train in a round, on ``small`` (2.2
million parameters). ``everyone``: all devices train in every round, on ``digits_cnn`` (38,282 parameters), over residual
links in both directions, whose memory (three models per device, 4.6 GB) is kept within ``server.link_memory_bytes``, the
rest on disk; plans in flight, here 10,000, carry a copy besides. ``resyncs`` counts links whose memory was dropped.
``peak_memory_bytes`` is the largest sum of proportional set sizes over the run's whole process tree (driver, server, workers,
Ray's own processes), sampled four times a second. Resident pages of the object store are part of it: they are shared memory,
mapped by these processes.

    python benchmarks/scale.py --quick      4 rounds of 25, and 200 devices that all take part
    python benchmarks/scale.py --save
"""

import argparse
import os
import threading
import time
from pathlib import Path
from typing import Any

import fedbonsai
from common import Results, add_options, median
from fedbonsai.runtime.events import VersionClosed


class PeakMemory(threading.Thread):
    """Samples the proportional set size of this process and its descendants."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._over = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._over.wait(0.25):
            self.peak_bytes = max(self.peak_bytes, sum(proportional_bytes(pid) for pid in tree(os.getpid())))

    def stop(self) -> int:
        """Stop, and return the peak."""
        self._over.set()
        self.join()
        return self.peak_bytes


def tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def proportional_bytes(pid: int) -> int:
    """A process's share of the memory that it maps; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def measure(num_devices: int, *, rounds: int, **settings: Any) -> dict[str, Any]:
    """One run: seconds per round without the first, peak memory, seconds to the end of the first round, and bytes sent."""
    fleet_class = {"name": "device", "count": num_devices, "flop_per_s": 1e10, "memory_bytes": 10**9}
    fleet_class |= {"up_bytes_per_s": 1e7, "down_bytes_per_s": 1e7}
    memory = PeakMemory()
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
    walls, first = [], 0.0
    for event in run:
        if isinstance(event, VersionClosed):
            first = first or time.perf_counter() - start
            walls.append(event.wall_s)
    summary = run.summary
    assert summary["outcomes"]["done"] == sum(summary["outcomes"].values()), summary["outcomes"]
    return {
        "plans": summary["outcomes"]["done"],
        "round_s": median(walls[1:]),
        "peak_memory_bytes": memory.stop(),
        "first_round_s": round(first, 2),
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


def everyone() -> dict[str, Any]:
    """All devices train ``digits_cnn``, over residual links."""
    samples = {"shape": [1, 8, 8], "classes": 10, "samples_per_device": 32}
    return {
        "model": "digits_cnn",
        "data": {"name": "synthetic", "kwargs": samples},
        "policy": [{"name": "random", "cohort": 1.0}, {"name": "residuals"}],
        "server": {"statistics": "batch"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="10,000 simulated devices on one machine")
    parser.add_argument("--quick", action="store_true", help="4 rounds of 25, and 200 devices that all take part")
    add_options(parser)
    arguments = parser.parse_args()
    results = Results("scale", arguments)
    cohort, rounds, crowd = (25, 4, 200) if arguments.quick else (100, 20, 10_000)
    few = results.row("100", measure, 100, rounds=rounds, **some(cohort))
    many = results.row("10,000", measure, 10_000, rounds=rounds, **some(cohort))
    all_of_them = results.row("everyone", measure, crowd, rounds=3, **everyone())
    result: dict[str, Any] = {
        "devices": 10_000,
        "cohort": cohort,
        "rounds": rounds,
        **many,
        "round_s_100_devices": few["round_s"],
        "round_ratio": round(many["round_s"] / few["round_s"], 3),
        "peak_memory_bytes_100_devices": few["peak_memory_bytes"],
        "everyone": {
            "devices": crowd,
            "rounds": 3,
            **all_of_them,
            "up_bytes_an_update": round(all_of_them["up_bytes"] / all_of_them["plans"], 1),
        },
    }
    results.finish(result)


if __name__ == "__main__":
    main()
