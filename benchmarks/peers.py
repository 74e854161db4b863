"""fedbonsai beside other simulators and bare PyTorch at equal work: first round, later rounds, memory, and a killed worker.

    python benchmarks/peers.py --quick          bare loops, fedbonsai, and peers whose environment exists; small; under a minute
    python benchmarks/peers.py --save           all; environments are made when they are missing
    python benchmarks/peers.py --save --continue [--nets N,...] [--formats F,...]       rows that are missing
        [--environments FOLDER] [--torch-index URL] [--only NAME ...] [--repetitions N]

Each contender runs in a virtual environment and in processes of its own (benchmarks/rivals): Python 3.11; torch, torchvision
and numpy as in constraints.txt. One that cannot be installed is a row with the reason; to measure it later, start again.

The work: FedAvg, ten of 100 devices a round, 100 images of 3x32x32 each, one epoch in batches of 32, SGD with learning rate
0.01 and momentum 0.9. ``small`` has 2.2 million parameters, 8.6 MB. Images, labels and initial weights are sealed to files that
all load. As many workers as cores, with one torch thread each; data in memory; nothing is logged or evaluated. Local loops are
those of rivals/work.py; pfl and fedbonsai have their own.

``check``: all ten devices of ten in one round of one batch each. The loss of every device's first batch agrees between
contenders, and so does the new model (the sum of squares of its parameters). In each run the optimiser steps are counted.

A row is one network in one format with all contenders, on one machine; a result may hold rows of several, each with its
machine. The order is rotated between repetitions, and contenders run one at a time. ``first_s``: from the start of the process
to the end of the first round, imports included. ``steady_s``: median of the later rounds. Both are medians over repetitions;
all values are beside them. ``peak_mb``: largest sum of the proportional set sizes of the process tree, in a further run that is
not timed; ``cpu_round_s``: processor seconds of the tree in its second round. In it, with ``resfed_cnn``, the process that has
worked most is killed in the third round (``killed``): the number of clients whose results were in the model of that round, and
of the next.

``bare``: PyTorch alone, no transport and no aggregation; "tuned" has the settings of the C library's allocator that
fedbonsai's workers have. ``of_bare``: seconds of bare processes over those of fedbonsai in each repetition; median. Aims:
0.97 times with ``resfed_cnn`` and 0.95 times with ``small``.
``ahead``: seconds of the fastest peer over those of fedbonsai.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import Results, add_options, median
from fedbonsai.clusters import allocator
from fedbonsai.learning.models import build
from fedbonsai.learning.seeds import derive
from fedbonsai.learning.spec import Call
from processes import MARK, PeakMemory, Tree, name_of

RIVALS = Path(__file__).resolve().parent / "rivals"
sys.path.insert(0, str(RIVALS))
from environments import ENVIRONMENTS, NotInstalled, is_made, make, python_of, versions  # noqa: E402
from work import NETS, Work  # noqa: E402

CORES = len(os.sched_getaffinity(0))
SAMPLES = 100
ROUNDS = {"small": 13, "resfed_cnn": 4}  # of a run; memory that a contender touches in its first rounds is then mapped
FORMATS = {"float32": {}, "channels_last": {"channels_last": True}, "bf16": {"channels_last": True, "bf16": True}}
# The settings of ``keep_freed_memory`` and ``HUGE_PAGES``, as the C library reads them from the environment.
ALLOCATOR = {
    "GLIBC_TUNABLES": ":".join(
        [
            allocator.HUGE_PAGES["GLIBC_TUNABLES"],
            f"glibc.malloc.mmap_threshold={allocator.MMAP_BYTES}",
            f"glibc.malloc.trim_threshold={allocator.TRIM_BYTES}",
            f"glibc.malloc.top_pad={allocator.PAD_BYTES}",
        ]
    )
}


@dataclass(frozen=True)
class Contender:
    """A way to run the work. ``threads``: of torch, in each process (None: its own choice)."""

    name: str
    environment: str
    script: str
    mode: str
    threads: int | None = 1
    tuned: bool = False
    launcher: tuple[str, ...] = ()

    @property
    def is_peer(self) -> bool:
        """Whether it is neither bare nor fedbonsai."""
        return self.environment not in ("bare", "fedbonsai")


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={CORES}")
CONTENDERS = [
    *(
        Contender(f"bare, {name}{', tuned' if tuned else ''}", "bare", "run_bare.py", mode, threads, tuned)
        for name, mode, threads in (("1 thread", "", 1), ("all threads", "", CORES), ("processes", "processes", 1))
        for tuned in (False, True)
    ),
    Contender("pfl, 1 process", "pfl", "run_pfl.py", "", CORES),
    Contender("pfl, processes", "pfl", "run_pfl.py", "processes", launcher=TORCHRUN),
    Contender("flower", "flower", "run_flower.py", ""),
    Contender("blazefl, processes", "blazefl", "run_blazefl.py", "processes"),
    Contender("blazefl, threads", "blazefl", "run_blazefl.py", "threads"),
    Contender("fedbonsai, in process", "fedbonsai", "run_fedbonsai.py", "inline", None),
    Contender("fedbonsai, in process, all threads", "fedbonsai", "run_fedbonsai.py", "inline", CORES),
    Contender("fedbonsai, Ray", "fedbonsai", "run_fedbonsai.py", "ray", None),
]
QUICK = ("bare, processes", "pfl, processes", "flower", "blazefl, threads", "fedbonsai, in process", "fedbonsai, Ray")
BARE, BARE_TUNED, OURS = "bare, processes", "bare, processes, tuned", "fedbonsai, Ray"


# Variables of this process that would change a contender: threads, another Ray, and modules compiled at each start.
DROPPED = ("OMP_", "MKL_", "RAY_", "PYTHONDONTWRITEBYTECODE", "GLIBC_TUNABLES")


class Failed(RuntimeError):
    """A contender ended without finishing; the message is what it wrote last."""


class Started:
    """A contender at work, and the lines that it has written."""

    def __init__(self, contender: Contender, python: Path, work: Work, lines: Path) -> None:
        self.contender, self.lines, self._errors = contender, lines, lines.with_suffix(".err")
        mark = uuid.uuid4().hex
        environment = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
        environment |= {"PYTHONPATH": os.pathsep.join([str(RIVALS), *_own_path(contender)]), "PYTHONWARNINGS": "ignore"}
        environment |= {"OMP_NUM_THREADS": str(contender.threads)} if contender.threads else {}
        environment |= ALLOCATOR if contender.tuned else {}
        environment |= {"WORK": replace(work, mode=contender.mode).seal(), "LINES": str(lines), MARK: mark}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}
        command = [str(python), *contender.launcher, str(RIVALS / contender.script)]
        with open(self._errors, "wb") as errors:
            environment["STARTED"] = repr(time.time())
            self.root = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, cwd=lines.parent
            )
        self.tree = Tree(self.root.pid, mark)

    def read(self) -> list[dict[str, Any]]:
        """The lines so far."""
        return [json.loads(line) for line in self.lines.read_text().splitlines()] if self.lines.exists() else []

    def wait(self, count: int, *, limit_s: float) -> list[dict[str, Any]]:
        """Wait for ``count`` lines. Raises ``Failed`` if the contender ends before, or takes longer."""
        until = time.monotonic() + limit_s
        while len(found := self.read()) < count:
            if self.root.poll() is not None and len(found := self.read()) < count:
                raise Failed(f"ended with exit code {self.root.returncode}: {self.last_words()}")
            if time.monotonic() > until:
                raise Failed(f"no progress within {limit_s:.0f} s")
            time.sleep(0.05)
        return found

    def last_words(self) -> str:
        """The last line that it printed."""
        written = [
            line for line in self._errors.read_text(errors="replace").splitlines() if any(map(str.isalpha, line))
        ]
        return written[-1].strip()[-300:] if written else "it printed nothing"


def _own_path(contender: Contender) -> list[str]:
    """fedbonsai is run from this checkout by the path of the process that measures, if it is found by that."""
    return [os.environ["PYTHONPATH"]] if contender.environment == "fedbonsai" and "PYTHONPATH" in os.environ else []


class Bench:
    """Runs contenders, one at a time."""

    def __init__(self, pythons: dict[str, Path], folder: Path, rows: Path) -> None:
        """``folder``: for sealed files and lines. ``rows``: receives each figure as soon as it is there."""
        self.pythons, self.folder, self._rows, self._number = pythons, folder, rows, 0

    def start(self, contender: Contender, work: Work) -> Started:
        """Start a run."""
        self._number += 1
        folder = self.folder / str(self._number)
        folder.mkdir()
        return Started(contender, self.pythons[contender.environment], work, folder / "lines")

    def finished(self, contender: Contender, work: Work) -> list[dict[str, Any]]:
        """All lines of a whole run. Raises ``Failed``."""
        run = self.start(contender, work)
        try:
            return run.wait(work.rounds + 1, limit_s=60 + 60 * work.rounds)
        finally:
            _end(run, grace_s=10)

    def note(self, **figures: Any) -> None:
        """Print a figure, and append it to the rows."""
        line = json.dumps(figures)
        print(f"  {line}", flush=True)
        with open(self._rows, "a") as file:
            file.write(line + "\n")

    def timed(self, contender: Contender, work: Work) -> dict[str, Any]:
        """Seconds of the first and of the later rounds, first losses, and new model.

        Raises ``Failed`` if the contender does not finish, or unless all clients made all steps in each round.
        """
        *rounds, end = self.finished(contender, work)
        steps = work.cohort * -(-SAMPLES // work.batch)
        for line in rounds:
            if (line["clients"], line["steps"]) != (work.cohort, steps):
                raise Failed(f"{line['clients']} clients made {line['steps']} steps, not {work.cohort} and {steps}")
        ends = [line["at_s"] for line in rounds]
        return {
            "first_s": round(ends[0], 3),
            "steady_s": median([after - before for before, after in pairwise(ends)]) if len(ends) > 1 else None,
            "steps": steps,
            "losses": sorted(round(loss, 4) for loss in end["losses"]),
            "norm": end["norm"],
        }

    def observed(self, contender: Contender, work: Work, *, kill: bool) -> dict[str, Any]:
        """Peak memory of the first rounds, processor seconds of the second, and then what a killed worker costs."""
        run = self.start(contender, replace(work, rounds=5 if kill else 3))
        memory = PeakMemory(run.tree)
        memory.start()
        found: dict[str, Any] = {}
        try:
            run.wait(1, limit_s=240)
            before = run.tree.all_cpu_s()
            lines = run.wait(2, limit_s=240)
            found["cpu_round_s"] = round(run.tree.all_cpu_s() - before, 2)
            round_s = lines[1]["at_s"] - lines[0]["at_s"]
            if not kill:
                run.wait(3, limit_s=60 + 20 * round_s)
            found["peak_mb"] = round(memory.stop() / 1e6)
            if kill:
                found["killed"] = self._kill(run, found["cpu_round_s"], limit_s=60 + 10 * round_s)
        finally:
            memory.stop()
            _end(run, grace_s=0 if kill else 10)
        return found

    def _kill(self, run: Started, round_cpu_s: float, *, limit_s: float) -> dict[str, Any]:
        """Kill the busiest process but the root in the third round, which takes about ``round_cpu_s`` in all processes."""
        worker = self._busiest(run, least_s=0.3 * round_cpu_s / CORES)
        if worker is None:
            return {"worker": None, "outcome": "has no process that could be killed but itself"}
        found: dict[str, Any] = {"worker": name_of(worker), "went_on": False}
        killed_at = time.time()
        os.kill(worker, signal.SIGKILL)
        try:
            found["clients"] = run.wait(3, limit_s=limit_s)[2]["clients"]
            found["closed_after_s"] = round(time.time() - killed_at, 2)
            found |= {"clients_next": run.wait(4, limit_s=limit_s)[3]["clients"], "went_on": True}
        except Failed as error:
            found["outcome"] = str(error)
        return found

    def _busiest(self, run: Started, *, least_s: float) -> int | None:
        """Wait until a process but the root has worked ``least_s`` in this round, but not longer than the round."""
        before, lines = run.tree.cpu_s(), len(run.read())
        while run.root.poll() is None:
            grown = {number: seconds - before.get(number, 0.0) for number, seconds in run.tree.cpu_s().items()}
            grown.pop(run.root.pid, None)
            if len(run.read()) > lines:
                break
            if grown and max(grown.values()) >= least_s:
                return max(grown, key=grown.__getitem__)
            time.sleep(0.02)
        return None


def _end(run: Started, *, grace_s: float) -> None:
    """Give the run time to end by itself, then end what is left of it."""
    until = time.monotonic() + grace_s
    while run.root.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    for _ in range(50):
        if not (left := run.tree.processes()):
            break
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.1)
    run.root.wait()


def seal(folder: Path, nets: list[str], devices: int) -> None:
    """Write the images, labels and initial weights that all contenders load; the weights are those that fedbonsai draws."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((devices, SAMPLES, 3, 32, 32), generator=generator)
    labels = torch.randint(0, 10, (devices, SAMPLES), generator=generator)
    torch.save({"images": images, "labels": labels}, folder / "shards.pt")
    for net in nets:
        model = build(Call(net), seed=derive(0, "model"), outputs=10)
        torch.save(model.state_dict(), folder / f"{net}.pt")


def environments(arguments: argparse.Namespace) -> Iterator[tuple[str, Path | None, str]]:
    """Each environment with its interpreter, or None and the reason."""
    folder: Path = arguments.environments
    for name in dict.fromkeys(contender.environment for contender in arguments.contenders):
        if is_made(name, folder=folder):
            yield name, python_of(name, folder=folder), ""
        elif arguments.quick and name in ("bare", "fedbonsai"):
            yield name, Path(sys.executable), ""
        elif arguments.quick:
            yield name, None, "its environment was not made before; --quick makes none"
        else:
            try:
                yield name, make(name, folder=folder, torch_index=arguments.torch_index), ""
            except NotInstalled as error:
                yield name, None, f"could not be installed: {error}"


def whole(work: Work) -> Work:
    """The work in which all contenders must agree: all devices take part, each with all of its samples as one batch."""
    return replace(work, devices=work.cohort, batch=SAMPLES)


def compare(bench: Bench, contenders: list[Contender], work: Work, *, repetitions: int) -> dict[str, dict[str, Any]]:
    """Times of all contenders at one work, by name. A contender that fails has an ``error``, and does not run again."""
    found: dict[str, dict[str, Any]] = {contender.name: {"first": [], "steady": []} for contender in contenders}
    for repetition in range(repetitions):
        turn = repetition * len(contenders) // repetitions
        for contender in contenders[turn:] + contenders[:turn]:
            row = found[contender.name]
            if "error" in row:
                continue
            about = {"contender": contender.name, "net": work.net, "repetition": repetition}
            try:
                figures = bench.timed(contender, work)
            except Failed as error:
                found[contender.name] = {"error": str(error)}
                bench.note(**about, error=str(error))
                continue
            row["first"].append(figures["first_s"])
            row["steady"].append(figures["steady_s"])
            row |= {key: figures[key] for key in ("steps", "losses", "norm")}
            bench.note(**about, **figures)
    for row in found.values():
        if row.get("first"):
            row["first_s"] = median(row["first"])
            row["steady_s"] = median(row["steady"]) if work.rounds > 1 else None
    return found


def agreement(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Largest relative differences of first losses and of new models between contenders. Exits if they did other work."""
    able = {name: row for name, row in rows.items() if "error" not in row}
    norms = [row["norm"] for row in able.values() if row["norm"] is not None]
    losses = zip(*(row["losses"] for row in able.values()), strict=True)
    apart = max(((max(each) - min(each)) / min(each) for each in losses), default=0.0)
    models = (max(norms) - min(norms)) / min(norms) if norms else 0.0
    if apart > 1e-3 or models > 1e-4:
        raise SystemExit(
            f"the contenders did not do the same work: losses differ by {apart:.1e}, models by {models:.1e}"
        )
    return {"contenders": sorted(able), "losses_apart": float(f"{apart:.1e}"), "models_apart": float(f"{models:.1e}")}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What fedbonsai reaches against bare processes and against the fastest peer."""
    found: dict[str, Any] = {}
    ours = rows.get(OURS, {})
    for key, bare in (("of_bare", BARE), ("of_bare_tuned", BARE_TUNED)):
        if ours.get("steady") and rows.get(bare, {}).get("steady"):
            each = [theirs / mine for theirs, mine in zip(rows[bare]["steady"], ours["steady"], strict=False)]
            found |= {key: round(statistics.median(each), 3), f"{key}_all": [round(value, 3) for value in each]}
    peers = {contender.name for contender in CONTENDERS if contender.is_peer}
    for key in ("first_s", "steady_s"):
        theirs = {name: rows[name][key] for name in peers & rows.keys() if key in rows[name]}
        if theirs:
            fastest = min(theirs, key=theirs.__getitem__)
            mine = {name: rows[name][key] for name in rows if name.startswith("fedbonsai") and key in rows[name]}
            found[f"ahead_{key}"] = {
                "fastest_peer": fastest,
                **{name: round(theirs[fastest] / value, 3) for name, value in mine.items()},
            }
    return found


def parse() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedbonsai" / "peers"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, once, float32; makes no environment")
    parser.add_argument("--environments", type=Path, default=cache, metavar="FOLDER", help="kept; default: %(default)s")
    parser.add_argument("--torch-index", metavar="URL", help="a further index, with torch's builds for processors")
    parser.add_argument("--nets", default="resfed_cnn,small")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose name starts with one of these")
    parser.add_argument("--repetitions", type=int, default=3)
    add_options(parser)
    arguments = parser.parse_args()
    wanted = tuple(arguments.only or [""])
    arguments.contenders = [each for each in CONTENDERS if each.name.startswith(wanted)]
    if not arguments.contenders:
        parser.error(
            f"--only: no contender starts with {arguments.only}; there are {[each.name for each in CONTENDERS]}"
        )
    if arguments.quick:
        arguments.nets, arguments.formats, arguments.repetitions = "small", "float32", 1
        arguments.contenders = [each for each in arguments.contenders if each.name in QUICK]
    arguments.nets, arguments.formats = arguments.nets.split(","), arguments.formats.split(",")
    return arguments


def main() -> None:
    arguments = parse()
    devices, cohort = (4, 4) if arguments.quick else (100, 10)
    settings = {"devices": devices, "cohort": cohort, "workers": CORES, "repetitions": arguments.repetitions}
    rounds = dict.fromkeys(ROUNDS, 3) if arguments.quick else ROUNDS
    settings |= {"rounds": rounds, "contenders": [each.name for each in arguments.contenders]}
    results = Results("peers", arguments, settings=settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of a contender are ended
    wanted = [(net, name) for net in arguments.nets for name in arguments.formats if f"{net}, {name}" not in results]
    pythons: dict[str, Path] = {}
    about: dict[str, Any] = {"versions": {}, "missing": {}}
    for name, python, reason in environments(arguments) if wanted else ():
        if python is None:
            about["missing"][name] = reason
            print(f"  {name}: {reason}", flush=True)
        else:
            pythons[name] = python
            about["versions"][name] = versions(python, ("torch", "numpy", "ray", ENVIRONMENTS[name].distribution))
            if note := ENVIRONMENTS[name].note:
                about["versions"][name]["note"] = note
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        arguments.environments.mkdir(parents=True, exist_ok=True)
        bench = Bench(pythons, Path(scratch), arguments.environments / "rows.jsonl")
        seal(Path(scratch), arguments.nets, devices)
        for net, name in wanted:
            work = Work(
                folder=scratch, net=net, rounds=rounds[net], devices=devices, cohort=cohort, batch=32, workers=CORES
            )
            kill = net == "resfed_cnn"
            found = results.row(f"{net}, {name}", row, bench, arguments, about, work, name, kill=kill)
            bench.note(net=net, format=name, **found["ratios"])
    rows = [
        ({"net": net, "format": name}, results[f"{net}, {name}"])
        for net in NETS
        for name in FORMATS
        if f"{net}, {name}" in results
    ]
    results.finish(
        settings
        | {
            "check": [key | found["check"] for key, found in rows],
            "rows": [
                key | {"contender": contender, **figures}
                for key, found in rows
                for contender, figures in found["contenders"].items()
            ],
            "ratios": [key | found["ratios"] for key, found in rows],
        }
    )


def row(
    bench: Bench, arguments: argparse.Namespace, about: dict[str, Any], work: Work, name: str, *, kill: bool
) -> dict[str, Any]:
    """All contenders with one network in one format: whether they did the same work, their figures, and ratios.

    In float32 with memory and, if ``kill``, a killed worker.
    """
    present = [each for each in arguments.contenders if each.environment in bench.pythons]
    rows: dict[str, dict[str, Any]] = {
        each.name: {"error": about["missing"][each.environment]}
        for each in arguments.contenders
        if each.environment in about["missing"]
    }
    if arguments.quick:
        found = checked = compare(bench, present, whole(work), repetitions=1)
    else:
        checked = compare(bench, present, replace(whole(work), rounds=1), repetitions=1)
        rows |= {contender: figures for contender, figures in checked.items() if "error" in figures}
        able = [each for each in present if "error" not in checked[each.name]]
        found = compare(bench, able, replace(work, **FORMATS[name]), repetitions=arguments.repetitions)
        if name == "float32":
            observe(bench, able, work, found, kill=kill)
    rows |= {
        contender: {key: value for key, value in figures.items() if key not in ("losses", "norm")}
        for contender, figures in found.items()
    }
    return {**about, "check": agreement(checked), "contenders": rows, "ratios": ratios(rows)}


def observe(
    bench: Bench, contenders: list[Contender], work: Work, rows: dict[str, dict[str, Any]], *, kill: bool
) -> None:
    """Add memory, and what a killed worker costs, to the rows of contenders that finished."""
    for contender in contenders:
        if "error" in rows[contender.name]:
            continue
        try:
            found = bench.observed(contender, work, kill=kill)
        except Failed as error:
            found = {"observed_error": str(error)}
        rows[contender.name] |= found
        bench.note(contender=contender.name, net=work.net, **found)


if __name__ == "__main__":
    main()
