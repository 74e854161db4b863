"""Virtual environments of the contenders: made once, kept in a cache folder, and rebuilt when their requirements change.

Torch, torchvision and numpy have the versions of constraints.txt in each; all else follows the requirements of the contender.
An installation that would bring torch's CUDA packages (gigabytes) is refused: training is on the processor.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("torch", "torchvision", "numpy")  # pinned for all: equal kernels
PYTHON = "3.11"


class NotInstalled(RuntimeError):
    """An environment could not be made; the message is the reason."""


@dataclass(frozen=True)
class Environment:
    """What to install. ``distribution``: whose version is reported. ``options``: of pip."""

    name: str
    requirements: tuple[str, ...]
    distribution: str
    options: tuple[str, ...] = ()
    all_constraints: bool = False
    note: str = ""


ENVIRONMENTS = {
    each.name: each
    for each in (
        Environment("bare", ("torch", "numpy"), "torch"),
        Environment("pfl", ("torch", "numpy", "pfl==0.6.0"), "pfl"),
        Environment("flower", ("torch", "numpy", "flwr[simulation]>=1.41.0"), "flwr"),
        Environment(
            "blazefl",
            ("torch", "numpy", "blazefl[contrib]==2.0.3"),
            "blazefl",
            options=("--ignore-requires-python",),
            note="the newest version whose source runs under Python 3.11, although it declares 3.12; 3.0.0 needs 3.14",
        ),
        Environment("fedbonsai", ("-e", str(ROOT)), "fedbonsai", all_constraints=True),
    )
}


def python_of(name: str, *, folder: Path) -> Path:
    """The interpreter of an environment, whether or not it exists."""
    return folder / name / "bin" / "python"


def is_made(name: str, *, folder: Path) -> bool:
    """Whether the environment exists, with the requirements of today."""
    stamp = folder / name / "made.json"
    return stamp.exists() and json.loads(stamp.read_text()) == _wanted(ENVIRONMENTS[name])


def make(name: str, *, folder: Path, torch_index: str | None) -> Path:
    """The interpreter of the environment, which is made if it does not exist. Raises ``NotInstalled`` with the reason."""
    environment = ENVIRONMENTS[name]
    python = python_of(name, folder=folder)
    if is_made(name, folder=folder):
        return python
    wanted = _wanted(environment)
    print(f"  {name}: installing {' '.join(environment.requirements)} into {folder / name}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    _run([_base_python(), "-m", "venv", "--clear", str(folder / name)])
    with tempfile.TemporaryDirectory() as scratch:
        constraints, report = Path(scratch) / "constraints.txt", Path(scratch) / "report.json"
        constraints.write_text("\n".join(wanted["constraints"]) + "\n")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", str(constraints)]
        pip += [*environment.options, *(["--extra-index-url", torch_index] if torch_index else [])]
        _run([*pip, "--dry-run", "--report", str(report), *environment.requirements])
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        if cuda := sorted(item["name"] for item in found if item["name"].startswith(("nvidia-", "cuda-"))):
            raise NotInstalled(
                f"torch would come as its CUDA build, with {len(cuda)} packages such as {cuda[0]}; name an index of CPU builds "
                "with --torch-index"
            )
        _run([*pip, *environment.requirements])
    (folder / name / "made.json").write_text(json.dumps(wanted))
    return python


def versions(python: Path | str, distributions: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, by distribution; those that are not installed are left out."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "known = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: known[n] for n in sys.argv[1:] if n in known} | {'python': sys.version.split()[0]}))"
    )
    command = [str(python), "-c", code, *distributions]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=_environment())
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _wanted(environment: Environment) -> dict[str, list[str]]:
    """What the stamp of a finished environment holds."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    if not environment.all_constraints:
        lines = [line for line in lines if re.split(r"[=; ]", line)[0] in SHARED]
    return {"requirements": [*environment.options, *environment.requirements], "constraints": lines}


def _base_python() -> str:
    """An interpreter of the version that all environments have: the one that runs this script, if it is that."""
    if sys.version_info[:2] == tuple(int(part) for part in PYTHON.split(".")):
        return sys.executable
    return f"python{PYTHON}"


def _environment() -> dict[str, str]:
    """Variables of this process, without packages of its own."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _run(command: list[str]) -> None:
    """Run a command. Raises ``NotInstalled`` with the last lines that it wrote if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    except FileNotFoundError as error:
        raise NotInstalled(f"{command[0]} is not there") from error
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("WARNING")]
        raise NotInstalled(" ".join(lines[-2:])[-400:])
