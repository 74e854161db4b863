"""Shared by all benchmark scripts: the description of the machine, medians, and the last line."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def _git(*arguments: str) -> str:
    """The output of a git command in this checkout; "" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions and commit, on which figures depend."""
    import torch

    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)benchmarks/results"]
    commit = _git("describe", "--always", "--abbrev=12") + ("-dirty" if _git(*changed) else "")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        # Paths of this machine are not published.
        "command": " ".join([Path(sys.argv[0]).name, *("ROOT" if "/" in word else word for word in sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
    }


def median(values: list[float]) -> float:
    """The median, to a tenth of a millisecond."""
    return round(statistics.median(values), 4)


def finish(result: dict[str, Any], *, name: str, save: bool) -> None:
    """Print the result as the last line; ``save`` also writes it to benchmarks/results."""
    result = result | {"machine": machine()}
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result), flush=True)
