"""Shared by all benchmark scripts: one way to write results, a description of the machine, means over seeds, medians.

A script passes its options to ``Results`` before it measures, and each figure that takes time to ``Results.row``:

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    add_options(parser)                                             # --save and --continue
    options = parser.parse_args()
    results = Results("name", options, seeds=range(3))
    by_seed = {str(seed): results.row(f"method, seed {seed}", run, seed=seed) for seed in range(3)}
    results.finish({"rows": {"method": over_seeds(by_seed)}})       # the last line of the output, as JSON

With ``--save`` the result is benchmarks/results/NAME.json, of ``--quick`` NAME_quick.json. It is refused if the checkout
differs from its commit, and holds under ``machine`` what is needed to make it again. Until it is complete, its rows are in
NAME.partial.json, which says ``"partial": true``; the same command with ``--continue`` measures the rows that it lacks.

Rows that depend on no machine's speed (accuracies, bytes, simulated seconds, memory), or that compare contenders among
themselves, may be measured one after the other, on several machines: a script that passes ``settings`` to ``Results`` saves
with each row the machine and the commit of its own, and ``--continue`` adds rows to a result that is interrupted or complete,
if its settings are the same.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "numpy", "ray")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--save`` and ``--continue``."""
    parser.add_argument(
        "--save", action="store_true", help="write the result to benchmarks/results; only of a clean commit"
    )
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="with --save: keep the rows that this command saved before it was interrupted, and measure the others",
    )


class Results:
    """The result of one call of a script, written row by row.

    ``settings``: what a row depends on beside its key, its machine and its commit, if rows of several machines may be in one
    result. Then ``--continue`` takes the rows of any.

    Ends the process with a sentence and exit code 2 if it may not be saved: the checkout has changes, or ``--continue`` finds
    no interrupted result of the same command, commit, machine and versions (with ``settings``: no result of these settings).
    """

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        *,
        seeds: Iterable[int] = (0,),
        settings: dict[str, Any] | None = None,
        folder: Path = RESULTS,
    ) -> None:
        self._save: bool = options.save
        self._settings = None if settings is None else json.loads(json.dumps(settings))
        name += "_quick" if getattr(options, "quick", False) else ""
        self._path, self._partial = folder / f"{name}.json", folder / f"{name}.partial.json"
        self._machine = machine() | {"seeds": list(seeds)}  # of the start: the checkout may change meanwhile
        self._rows: dict[str, Any] = {}
        self._machines: dict[str, dict[str, Any]] = {}  # of each row
        if self._save and (reason := _unsaveable()):
            refuse(f"--save needs a commit that holds the code: {reason}")
        if options.go_on and not self._save:
            refuse("--continue needs --save: rows are kept by it alone")
        if options.go_on and self._settings is None:
            self._take_interrupted()
        elif options.go_on:
            self._take_any()

    def __contains__(self, key: str) -> bool:
        """Whether a row is there already."""
        return key in self._rows

    def __getitem__(self, key: str) -> Any:
        """The figures of a row that is there already."""
        return self._rows[key]

    def row(self, key: str, measure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The figures of a row, as JSON holds them: those of the interrupted result, else what ``measure`` returns."""
        if key not in self._rows:
            # The figures of a result are the same whether it was interrupted or not.
            self._rows[key] = json.loads(json.dumps(measure(*args, **kwargs)))
            self._machines[key] = self._machine
            print(f"  {key}: {self._rows[key]}", flush=True)
            self._write(self._partial, {"partial": True} | self._kept() | {"machine": self._machine})
        return self._rows[key]

    def finish(self, result: dict[str, Any]) -> None:
        """Print the whole result as the last line; with ``--save`` it takes the place of the saved one."""
        ended = _commit()
        if ended != self._machine["commit"]:
            self._machine["commit_at_end"] = ended
        result = result | ({} if self._settings is None else {"measured": self._kept()}) | {"machine": self._machine}
        self._write(self._path, result)
        if self._save:
            self._partial.unlink(missing_ok=True)
        print(json.dumps(result), flush=True)

    def _write(self, path: Path, result: dict[str, Any]) -> None:
        """Write a file as a whole or not at all, with ``--save``."""
        if self._save:
            path.parent.mkdir(exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            unfinished.replace(path)

    def _kept(self) -> dict[str, Any]:
        """The rows, and where they do not depend on the machine, the settings and the machine of each."""
        if self._settings is None:
            return {"rows": self._rows}
        machines: list[dict[str, Any]] = []
        for machine in self._machines.values():
            if machine not in machines:
                machines.append(machine)
        of_row = {key: machines.index(self._machines[key]) for key in self._rows}
        return {"settings": self._settings, "rows": self._rows, "machine_of_row": of_row, "machines": machines}

    def _take_interrupted(self) -> None:
        """Take the rows of the interrupted result of the same command."""
        if not self._partial.exists():
            refuse(f"--continue finds no {self._partial.name} in {self._partial.parent.name}: nothing was interrupted")
        found = json.loads(self._partial.read_text(encoding="utf-8"))
        for field in self._machine.keys() | found["machine"].keys():
            before, now = found["machine"].get(field), self._machine.get(field)
            if before != now and field != "date":
                refuse(
                    f"--continue: {self._partial.name} has {field} {before!r}, not {now!r}; start again without --continue"
                )
        self._rows = found["rows"]

    def _take_any(self) -> None:
        """Take the rows of the interrupted result, else of the complete one, if it has the same settings."""
        path = self._partial if self._partial.exists() else self._path
        if not path.exists():
            refuse(f"--continue finds neither {self._partial.name} nor {path.name} in {path.parent.name}")
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found if path == self._partial else found.get("measured", {})
        if found.get("settings") != self._settings:
            refuse(
                f"--continue: {path.name} has settings {found.get('settings')!r}, not {self._settings!r}; start again "
                "without --continue"
            )
        self._rows = found["rows"]
        self._machines = {key: found["machines"][number] for key, number in found["machine_of_row"].items()}


def saved(name: str) -> Any:
    """A saved result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def refuse(sentence: str) -> NoReturn:
    """End the process with a sentence, for a mistake of the user."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def machine() -> dict[str, Any]:
    """Processor, its vector units, cores, versions, commit and command, on which figures depend."""
    import fedbonsai
    from fedbonsai.clusters.processor import numerics_here

    return {
        "cpu": _cpu(),
        "vectors": numerics_here()["processor"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
        "fedbonsai": fedbonsai.__version__,
        "commit": _commit(),
        "command": _command(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def _command(words: list[str]) -> str:
    """The command without paths of this machine, and without ``--continue``, which changes no figure."""
    kept = ["ROOT" if "/" in word else word for word in words[1:] if word != "--continue"]
    return shlex.join([Path(words[0]).name, *kept])


def _git(*arguments: str) -> str:
    """The output of a git command in this checkout; "" outside a repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.rstrip()


def _changes() -> list[str]:
    """Files that differ from the commit, or that it lacks; results do not count."""
    found = _git("status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results").splitlines()
    return [line[3:] for line in found]


def _commit() -> str:
    """The commit, with "-dirty" where the checkout differs from it."""
    return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if _changes() else "")


def _unsaveable() -> str:
    """Why a result may not be saved; "" if it may."""
    if not _git("rev-parse", "HEAD"):
        return "this is no git repository"
    changes = _changes()
    others = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
    return f"{changes[0]}{others} differs from it or is missing there; commit or remove that" if changes else ""


def over_seeds(by_seed: dict[str, dict[str, Any]], *, digits: int = 4) -> dict[str, Any]:
    """The mean of each figure over the seeds (None if a seed lacks it), the range of the accuracies, and each seed's figures.

    Figures that are no numbers are in ``by_seed`` alone.
    """
    runs = list(by_seed.values())
    found: dict[str, Any] = {}
    for key in runs[0]:
        values = [one[key] for one in runs]
        known = [value for value in values if isinstance(value, int | float)]
        if all(value is None or isinstance(value, int | float) for value in values):
            found[key] = round(statistics.fmean(known), digits) if len(known) == len(values) else None
    if found.get("accuracy") is not None:
        accuracies = [one["accuracy"] for one in runs]
        found["accuracy_spread"] = round(max(accuracies) - min(accuracies), 4)
    return found | {"by_seed": by_seed}


def median(values: list[float]) -> float:
    """The median, to a tenth of a millisecond."""
    return round(statistics.median(values), 4)
