"""The run folder: everything that is needed to understand, check and repeat a run, readable at any time during the run.

fedbonsai.json     marks the folder as a run's (``marker``); in a folder without it nothing is ever replaced or removed
config.yaml        resolved configuration: loads again to the same run
environment.json   versions, commit, platform, processor
measured.json      measurements before the first round that decide settings such as ``training.layout: auto``
events.jsonl       every event, one per line, flushed as it happens (``event_log``)
summary.json       results; written at the end, also of an interrupted run
best.safetensors, final.safetensors
                   weights as they are evaluated; under ``training.sparsity`` best.master and final.master.safetensors too, the
                   dense weights
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import yaml

from ...clusters.processor import numerics_here
from ...comms.codec import Array
from ..configuration.config import Config
from ..errors import ConfigError, RunError
from ..events import AnyEvent
from . import event_log, marker
from .event_log import EventLog
from .files import read_file

PACKAGES = ("fedbonsai", "torch", "torchvision", "ray", "numpy", "msgspec", "lz4", "xxhash", "safetensors")

_MEASURED = "measured.json"
_MOST_BYTES = 1024**2  # of measured.json
_FIRST = ("config.yaml", "environment.json", event_log.NAME, marker.NAME)  # the files that exist before a run begins


class RunFolder:
    """Writes the folder of one run. ``log``: its events."""

    def __init__(self, path: Path, config: Config, *, resumes: bool = False) -> None:
        """Create the folder. Raises ``ConfigError`` if it cannot be written, or is not empty.

        ``resumes``: open the folder of a run that is resumed; its config.yaml is not changed.
        """
        self.path = path
        self._claimed = False
        self._made: list[Path] = []  # this folder and those of its parents that did not exist, innermost first
        try:
            if not resumes:
                self._claim()
            self.log = EventLog(path)
            if not resumes:
                (path / "config.yaml").write_text(yaml.safe_dump(resolved(config), sort_keys=False))
                (path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        except OSError as error:
            self.discard()
            raise ConfigError(f"out is {str(path)!r}, which cannot be written: {error.strerror}") from error

    def _claim(self) -> None:
        """Create the folder, or take an empty one. Of two runs that find it empty one succeeds: it creates the marker."""
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        if any(self.path.iterdir()):
            raise ConfigError(f"out is {str(self.path)!r}, which is not empty; name a new folder")
        with (self.path / marker.NAME).open("xb") as file:
            self._claimed = True
            file.write(marker.encode(marker.new_marker("run")))

    def discard(self) -> None:
        """Remove the folder of a run that never began, so that the corrected command can use the name.

        The folder is kept if it holds other files than those created here, and if the run was resumed.
        """
        if hasattr(self, "log"):
            self.log.close()
        with suppress(OSError):  # a folder that cannot be listed or removed is kept
            if self._claimed and {entry.name for entry in self.path.iterdir()} <= set(_FIRST):
                for name in _FIRST:
                    (self.path / name).unlink(missing_ok=True)
                self._claimed = False
            for folder in self._made:
                folder.rmdir()  # fails for a folder that is not empty

    def note(self, event: AnyEvent) -> None:
        """Append an event to the log."""
        with self._reported():
            self.log.note(event)

    def cut(self, num_events: int) -> None:
        """Keep only the first so many events of the log; a resumed run repeats those after them."""
        with self._reported():
            self.log.cut(num_events)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json atomically."""
        self._write_json("summary.json", summary)

    @property
    def measured(self) -> dict[str, Any]:
        """What was measured at the start of the run; empty if nothing was. Raises ``ConfigError`` for an unreadable file."""
        path = self.path / _MEASURED
        try:
            found: dict[str, Any] = msgspec.json.decode(read_file(path, most=_MOST_BYTES), type=dict[str, Any])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(
                f"{str(path)!r} cannot be read: {error}; it holds what the run measured at its start"
            ) from error
        return found

    def write_measured(self, measured: dict[str, Any]) -> None:
        """Write measured.json atomically."""
        self._write_json(_MEASURED, measured)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        partial = self.path / f"{name}.partial"
        with self._reported():
            partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
            partial.replace(self.path / name)

    def write_weights(self, name: str, data: Array) -> None:
        """Write ``name``.safetensors atomically. ``data``: its bytes."""
        partial = self.path / f"{name}.safetensors.partial"
        with self._reported():
            partial.write_bytes(data.data)
            partial.replace(self.path / f"{name}.safetensors")

    @property
    def closed(self) -> bool:
        """Whether the log is closed."""
        return self.log.closed

    def close(self) -> None:
        """Close the log."""
        with self._reported():
            self.log.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn a failed write (a full disk, a removed folder) into a ``RunError``."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"out is {str(self.path)!r}, which can no longer be written: {reason}; make room there, and resume the run",
                stage="write",
            ) from error


def is_run_folder(path: Path) -> bool:
    """Whether a folder has the marker of a run folder."""
    try:
        found = marker.decode(read_file(path / marker.NAME, most=marker.MOST_BYTES))
    except OSError:
        return False
    return found is not None and found.kind == "run"


def resolved(config: Config) -> dict[str, Any]:
    """The configuration with its fleet and the horizon of its schedule written out, so that it needs no other file."""
    schedule = config.schedule.within(config.stop.rounds)
    return config.to_dict() | {"fleet": config.load_fleet().to_dict(), "schedule": msgspec.to_builtins(schedule)}


def default_path(config: Config) -> Path:
    """A new folder under ``runs/``, named after the run and the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.-]+", "-", config.name)[:50]  # a run may be named with characters that a file name cannot hold
    base = Path("runs") / f"{name}-{stamp}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = Path(f"{base}-{number}")
    return path


def environment() -> dict[str, Any]:
    """Versions of the packages that the run depends on, the commit if known, and the platform."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "numerics": numerics_here(),
        "cpus": os.cpu_count(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that the package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # git is not installed, or fails: the commit is unknown
        return None
    return result.stdout.strip()
