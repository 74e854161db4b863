"""The run folder: everything that is needed to understand, check and repeat a run, readable at any moment of it.

config.yaml        resolved configuration: loads again to the same run
environment.json   versions, commit, platform, processor
measured.json      what was measured before the first round and decides settings that were left open
events.jsonl       every event, one per line, flushed as it happens
summary.json       what it came to; rewritten at the end, also of an interrupted run
best.safetensors, final.safetensors
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import msgspec
import yaml

from ..clusters.processor import numerics_here
from .config import Config
from .errors import ConfigError, RunError
from .events import AnyEvent, read_event

PACKAGES = ("fedbonsai", "torch", "torchvision", "ray", "numpy", "msgspec", "lz4", "xxhash", "safetensors")


_EVENTS, _MEASURED = "events.jsonl", "measured.json"


class RunFolder:
    """Writes the folder of one run."""

    def __init__(self, path: Path, config: Config, *, resumes: bool = False) -> None:
        """Create the folder; raises ``ConfigError`` when it cannot be written or holds something already.

        ``resumes``: the folder of a run that goes on. Its log is cut by ``cut``, and what it was stays told in config.yaml.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if resumes:
                self._events: TextIO = (path / _EVENTS).open("a", encoding="utf-8")
                self._lock()
                return
            if any(path.iterdir()):
                raise ConfigError(f"out is {str(path)!r}, which is not empty; name a new folder")
            # First, and only if it is not there: of two runs that found the folder empty, one gets it.
            self._events = (path / _EVENTS).open("x", encoding="utf-8")
            self._lock()
            (path / "config.yaml").write_text(yaml.safe_dump(resolved(config), sort_keys=False))
            (path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"out is {str(path)!r}, which cannot be written: {error.strerror}") from error

    @property
    def num_events(self) -> int:
        """Whole lines of the log."""
        with (self.path / _EVENTS).open("rb") as file:
            return sum(line.endswith(b"\n") for line in file)

    def cut(self, num_events: int) -> None:
        """Keep so many events of the log, in one step: those after them will happen again."""
        partial = self.path / f"{_EVENTS}.partial"
        with self._told():
            with (self.path / _EVENTS).open("rb") as whole, partial.open("wb") as kept:
                kept.writelines(islice(whole, num_events))
                kept.flush()
                os.fsync(kept.fileno())
            partial.replace(self.path / _EVENTS)
            self._events.close()
            self._events = (self.path / _EVENTS).open("a", encoding="utf-8")
            self._lock()

    def events(self) -> Iterator[AnyEvent]:
        """The log, as events."""
        with (self.path / _EVENTS).open("rb") as file:
            for line in file:
                yield read_event(line)

    def note(self, event: AnyEvent) -> None:
        """Append an event."""
        with self._told():
            self._events.write(msgspec.json.encode(event).decode() + "\n")
            self._events.flush()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, in one step."""
        self._write_json("summary.json", summary)

    @property
    def measured(self) -> dict[str, Any]:
        """What was measured at the start of the run; empty where nothing was yet. Raises ``ConfigError``."""
        path = self.path / _MEASURED
        try:
            found: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                f"{str(path)!r} cannot be read: {error}; it holds what the run measured at its start"
            ) from error
        return found

    def write_measured(self, measured: dict[str, Any]) -> None:
        """Write measured.json, in one step."""
        self._write_json(_MEASURED, measured)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        partial = self.path / f"{name}.partial"
        with self._told():
            partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
            partial.replace(self.path / name)

    def write_weights(self, name: str, tensors: dict[str, Any], *, metadata: dict[str, str]) -> None:
        """Write ``name``.safetensors, in one step."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        partial = self.path / f"{name}.safetensors.partial"
        with self._told(SafetensorError):
            save_file(tensors, partial, metadata=metadata)
            partial.replace(self.path / f"{name}.safetensors")

    @property
    def closed(self) -> bool:
        """Whether all has been written."""
        return self._events.closed

    def close(self) -> None:
        """No more events."""
        with self._told():
            self._events.close()

    def _lock(self) -> None:
        """Of two processes that write one folder, the second is told so. The lock goes with its process."""
        try:
            import fcntl
        except ImportError:  # not a POSIX system: there is no such lock
            return
        try:
            fcntl.flock(self._events, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._events.close()
            raise ConfigError(f"out is {str(self.path)!r}, which another process is writing") from error

    @contextmanager
    def _told(self, *others: type[Exception]) -> Iterator[None]:
        """A write that fails (a full disk, a folder that is gone) ends the run in one sentence.

        ``others``: what a library raises in place of an ``OSError``.
        """
        kinds: tuple[type[Exception], ...] = (OSError, *others)
        try:
            yield
        except kinds as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(
                f"out is {str(self.path)!r}, which can no longer be written: {reason}; make room there, and resume the run",
                stage="write",
            ) from error


def resolved(config: Config) -> dict[str, Any]:
    """The configuration with its fleet written out, so that it does not depend on a file elsewhere."""
    return config.to_dict() | {"fleet": config.load_fleet().to_dict()}


def default_path(config: Config) -> Path:
    """A new folder under ``runs/``, named after the run and the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.-]+", "-", config.name)[:50]  # a name may hold anything, a file name may not
    base = Path("runs") / f"{name}-{stamp}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = Path(f"{base}-{number}")
    return path


def environment() -> dict[str, Any]:
    """Versions of what the run depends on, the commit where there is one, and the platform."""
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
    root = Path(__file__).resolve().parent.parent
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
    except (OSError, subprocess.SubprocessError):  # no git here: the commit is then not known
        return None
    return result.stdout.strip()
