"""Which run is resumed, and whether it has the same configuration.

Two runs are the same if they would come to the same bits: all settings are equal except those that say only how long the run
is, where it runs, and on what. So ``--resume auto`` is one command that starts a run, and resumes it after whatever ended it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...clusters.units import shown
from ...clusters.yaml_text import parse_yaml
from ...learning.spec import LearningRateSchedule
from ..configuration.config import Config, load_config
from ..configuration.layers import path_problem
from ..errors import ConfigError
from ..storage.files import read_file
from ..storage.run_folder import RunFolder, default_path, is_run_folder, resolved

# Settings in which a run that is resumed may differ.
FREE = ("name", "stop", "checkpoint", "max_failures", "backend", "workers", "ray", "out")

Resume = str | Path | None

_MOST_BYTES = 256 * 1024**2  # of a file that is read as a whole


def open_folder(config: Config, resume: Resume, *, target: Path | None) -> tuple[RunFolder | None, bool]:
    """The run folder, and whether the run in it is resumed; None if nothing is written.

    ``target``: the folder that the user named, if any. Raises ``ConfigError``.
    """
    for name, given in (("out", target), ("resume", resume)):
        if given is not None and (problem := path_problem(str(given))):
            raise ConfigError(f"{name} is {shown(str(given))}, {problem}")
    path, resumes = choose_folder(config, resume, target=target)
    if path is None:
        return (RunFolder(default_path(config), config), False) if resume == "auto" else (None, False)
    if resumes:
        check_same(path, config)
    return RunFolder(path, config, resumes=resumes), resumes


def choose_folder(config: Config, resume: Resume, *, target: Path | None) -> tuple[Path | None, bool]:
    """The run folder, and whether a run in it is resumed. ``target``: as in ``open_folder``.

    With "auto" it is ``target``, or else the newest folder under ``runs/`` whose run has this configuration and has not
    finished. Raises ``ConfigError``.
    """
    if resume is None:
        return target, False
    if resume != "auto":
        path = Path(resume)
        if target is not None and target.absolute() != path.absolute():
            raise ConfigError(f"resume is {str(path)!r}, and out is {str(target)!r}; a run goes on in its own folder")
        if not is_run_folder(path):
            raise ConfigError(f"resume is {str(path)!r}, which is not the folder of a run")
        return path, True
    if target is not None:
        return target, is_run_folder(target)
    folders = [(_modified(path), path.parent) for path in Path("runs").glob("*/config.yaml")]
    for _, folder in sorted(folders, reverse=True):
        if is_run_folder(folder) and not _has_finished(folder) and _is_same(folder, config):
            return folder, True
    return None, False


def going_on(config: Config, folder: Path) -> Config:
    """``config`` for resuming the run in ``folder``: the schedule keeps the horizon that the run began with."""
    return msgspec.structs.replace(config, schedule=_schedule(config, _config_of(folder)))


def _schedule(config: Config, before: Config) -> LearningRateSchedule:
    """The schedule of a resumed run: its horizon is the one that it began with, unless the configuration sets one."""
    began = before.schedule.within(before.stop.rounds)
    return config.schedule if began.rounds is None else config.schedule.within(began.rounds)


def check_same(folder: Path, config: Config) -> None:
    """Raise ``ConfigError``, with all that differs, if the run in ``folder`` is not the run of ``config``."""
    saved = _config_of(folder)
    now = _identity(msgspec.structs.replace(config, schedule=_schedule(config, saved)))
    before = _identity(saved)
    differing = [f"{name} is {new}, and was {old}" for name, new, old in _differences(now, before)]
    if differing:
        listed = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise ConfigError(f"resume is {str(folder)!r}, which is another run: {listed}")


def _config_of(folder: Path) -> Config:
    """The configuration of the run in a folder. Raises ``ConfigError``."""
    try:
        raw = parse_yaml(read_file(folder / "config.yaml", most=_MOST_BYTES).decode())
    except (OSError, ValueError) as error:
        raise ConfigError(f"resume is {str(folder)!r}, whose config.yaml cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"resume is {str(folder)!r}, whose config.yaml is no mapping of settings")
    return load_config(raw)


def identity_text(config: Config) -> str:
    """The settings that two runs must share to be the same, as text."""
    return json.dumps(_identity(config), sort_keys=True)


def _identity(config: Config) -> dict[str, Any]:
    """The settings that two runs must share to be the same, as plain JSON values."""
    plain = {name: value for name, value in resolved(config).items() if name not in FREE}
    identity: dict[str, Any] = json.loads(json.dumps(plain))
    return identity


def _is_same(folder: Path, config: Config) -> bool:
    """Whether the run in a folder is the run of ``config``."""
    try:
        check_same(folder, config)
    except ConfigError:  # another run, or a folder that was edited
        return False
    return True


class _Summary(msgspec.Struct):
    """The field of a summary that says whether its run has finished."""

    status: str


def _has_finished(folder: Path) -> bool:
    """Whether the run in a folder has finished. A run whose summary cannot be read counts as one that has not."""
    try:
        data = read_file(folder / "summary.json", most=_MOST_BYTES)
        return msgspec.json.decode(data, type=_Summary).status == "finished"
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _modified(path: Path) -> float:
    """When a file was written; 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


_MISSING = object()


def _differences(now: Any, before: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """The settings that differ: name, new value, old value."""
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        for key in dict.fromkeys([*now, *before]):
            dotted = f"{name}.{key}" if name else str(key)
            yield from _differences(now.get(key, _MISSING), before.get(key, _MISSING), dotted)
    elif now != before:
        yield name, _short(now), _short(before)


def _short(value: Any) -> str:
    text = "not there" if value is _MISSING else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
