"""Seconds from the start of a process to the end of its first round, by phase, beside those of its imports.

    python benchmarks/first_round.py --quick      once
    python benchmarks/first_round.py --save       three times, taking turns

The experiment is examples/digits.yaml, in process and on a local Ray; each run is a separate process, started as a user starts
it. ``torch`` is ``import torch`` alone, ``ray`` is ``import ray; ray.init()`` with two processors and without a dashboard,
``import torch`` after it: what a run in process and one on a local Ray take at least. (A local Ray of fedbonsai does not start
the process of the dashboard, which ``ray.init`` starts for reports of usage even without a dashboard.) ``phases``: seconds
since the start of the process at which each step of a run was over. Figures are medians. The first round of other simulators,
at equal work: peers.py.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import Results, add_options, median

HERE = Path(__file__).parent
PRINT_SECONDS = "; import os, time; print(time.time() - float(os.environ['STARTED']))"
TORCH = "import torch" + PRINT_SECONDS
RAY = (
    "import ray; ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR'); import torch"
    + PRINT_SECONDS
)


def child(backend: str) -> None:
    """A run in a new process: prints the times at which phases and rounds ended."""
    phases: dict[str, float] = {}

    def note(name: str) -> None:
        phases.setdefault(name, round(time.time() - float(os.environ["STARTED"]), 3))

    note("python has started")
    import fedbonsai
    from fedbonsai.runtime.events import RoundStarted, RunStarted, VersionClosed

    digits = str(HERE.parent / "examples" / "digits.yaml")
    run = fedbonsai.run(digits, backend=backend, settings=["stop.rounds=4", "stop.accuracy=null"])
    note("the configuration is checked")
    if backend == "ray":
        _watch_ray(note)
    rounds: list[float] = []
    for event in run:
        if isinstance(event, RunStarted):
            note("server and first worker are there")
        elif isinstance(event, RoundStarted):
            note("the first plans are out")
        elif isinstance(event, VersionClosed):
            note("the first round is over")
            rounds.append(event.wall_s)
    print(json.dumps({"first_s": phases["the first round is over"], "round_s": rounds[1:], "phases": phases}))


def _watch_ray(note: Callable[[str], None]) -> None:
    """Record when the local Ray has started, this process is connected, and bundles are reserved."""
    from fedbonsai.clusters.ray_backend.local_ray import LocalRay

    address = LocalRay.address

    def started(local: LocalRay) -> str:
        found = address(local)
        note("a local Ray has started")
        from fedbonsai.clusters.ray_backend.placement import Reservation

        wait = Reservation.wait

        def reserved(reservation: Reservation, **settings: Any) -> Iterator[str]:
            note("the driver is connected")
            yield from wait(reservation, **settings)
            note("bundles are reserved")

        Reservation.wait = reserved  # type: ignore[method-assign]
        return found

    LocalRay.address = started  # type: ignore[method-assign]


def last_line(command: list[str]) -> Any:
    """The last line that a process prints."""
    environment = os.environ | {"STARTED": repr(time.time())}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once")
    add_options(parser)
    parser.add_argument("--child", choices=("inline", "ray"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    results = Results("first_round", args)
    own = [sys.executable, str(Path(__file__).resolve()), "--child"]
    contenders = {"in process": [*own, "inline"], "on Ray": [*own, "ray"]}
    last_line([sys.executable, "-c", TORCH])  # from here on the files are in the page cache
    least: dict[str, list[float]] = {"torch": [], "ray": []}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for repetition in range(1 if args.quick else 3):
        for name, code in (("torch", TORCH), ("ray", RAY)):
            least[name].append(results.row(f"{repetition}: {name}", last_line, [sys.executable, "-c", code]))
        for name, command in contenders.items():
            found[name].append(results.row(f"{repetition}: {name}", last_line, command))
    floor = {name: median(values) for name, values in least.items()}
    first = {name: median([each["first_s"] for each in runs]) for name, runs in found.items()}
    result = {
        "floor_s": floor,
        "first_s": first,
        "first_s_each": {name: [each["first_s"] for each in runs] for name, runs in found.items()},
        "round_s": {name: median([s for each in runs for s in each["round_s"]]) for name, runs in found.items()},
        "over_floor": {
            name: round(first[name] / floor[bound], 2) for name, bound in (("in process", "torch"), ("on Ray", "ray"))
        },
        "phases": {
            name: {phase: median([each["phases"][phase] for each in runs]) for phase in runs[0]["phases"]}
            for name, runs in found.items()
        },
    }
    results.finish(result)


if __name__ == "__main__":
    main()
