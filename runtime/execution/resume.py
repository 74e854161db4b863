"""Going on with a run: which run, whether it is the same, and from which of its checkpoints.

Two runs are the same where they would come to the same bits: all settings are equal but those that only say how long,
where, and on what. So ``--resume auto`` is one command that starts a run, and goes on with it after whatever has ended it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from ...clusters.units import shown
from ...clusters.yaml_text import parse_yaml
from ...comms.channel import LocalChannel
from ...learning.spec import LearningRateSchedule
from ..checkpointing.checkpoints import Checkpoints
from ..configuration.config import Config, load_config
from ..configuration.layers import path_problem
from ..errors import ConfigError
from ..storage.files import read_file
from ..storage.run_folder import RunFolder, default_path, is_run_folder, resolved
from .save_plan import SavePlan, open_checkpoints

# What a run that is resumed may have otherwise.
FREE = ("name", "stop", "checkpoint", "max_failures", "backend", "workers", "ray", "out")

Resume = str | Path | None

_NONE: Mapping[int, str] = MappingProxyType({})
_MOST_BYTES = 256 * 1024**2  # of a file that is read whole


def open_folder(config: Config, resume: Resume, *, target: Path | None) -> tuple[RunFolder | None, bool]:
    """The run folder, and whether the run in it is resumed; None where nothing is written.

    ``target``: the folder that was named, if any. Raises ``ConfigError``.
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
    """The run folder, and whether a run in it is to be resumed. ``target``: the folder that was named, if any.

    With "auto" it is the folder that was named, or, of those under ``runs/``, the newest with a run of this configuration that
    has not ended by itself. Raises ``ConfigError``.
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
    found = [(_modified(path), path.parent) for path in Path("runs").glob("*/config.yaml")]
    for _, folder in sorted(found, reverse=True):
        if is_run_folder(folder) and not _ended(folder) and _is_same(folder, config):
            return folder, True
    return None, False


def going_on(config: Config, folder: Path) -> Config:
    """``config`` for going on with the run in ``folder``: its schedule keeps the horizon that the run began with."""
    return msgspec.structs.replace(config, schedule=_schedule(config, _config_of(folder)))


def _schedule(config: Config, before: Config) -> LearningRateSchedule:
    """The schedule of a run that goes on: its horizon is the one that it began with, unless the configuration sets one."""
    began = before.schedule.within(before.stop.rounds)
    return config.schedule if began.rounds is None else config.schedule.within(began.rounds)


def check_same(folder: Path, config: Config) -> None:
    """Raise ``ConfigError``, with all that differs, where the run in ``folder`` is another than that of ``config``."""
    there = _config_of(folder)
    now = _identity(msgspec.structs.replace(config, schedule=_schedule(config, there)))
    before = _identity(there)
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


def plan_saving(
    config: Config, folder: RunFolder | None, *, resumes: bool, unfit: Mapping[int, str] = _NONE
) -> SavePlan | None:
    """Where checkpoints go, and the one to go on from; None where nothing is written. Cuts the folder's log to that.

    ``unfit``: versions whose checkpoints turned out to be damaged, and why. Raises ``ConfigError`` where there are checkpoints,
    but none is sound, or where the place is not this run's own.
    """
    settings = config.checkpoint
    place = settings.to or (str((folder.path / "checkpoints").absolute()) if folder is not None else None)
    if place is None or (settings.every is None and settings.seconds is None and not resumes):
        return None
    text = json.dumps(_identity(config), sort_keys=True)
    plan = SavePlan(place=place, settings=settings, run=hashlib.sha256(text.encode()).hexdigest()[:32])
    checkpoints = _checkpoints(plan)
    checkpoints.place.claim(resumes=resumes)
    plan = replace(plan, token=checkpoints.place.token)
    if not resumes or folder is None:
        return plan
    found = checkpoints.newest(most_events=folder.log.num_events, unfit=unfit)
    folder.cut(found.manifest.events if found.manifest is not None else 0)
    notices = list(found.notices)
    if found.manifest is not None:
        notices.append(f"the run goes on after version {found.manifest.version}, from its checkpoint")
    horizon = config.schedule.rounds
    if config.schedule.has_horizon and horizon is not None and horizon < config.stop.rounds:
        notices.append(
            f"stop.rounds is {config.stop.rounds}, and the schedule of the learning rate ends with round {horizon}, as when "
            f"the run began: from there on the rate is {config.schedule.final:g} of the first"
        )
    return replace(plan, manifest=found.manifest, notices=tuple(notices))


def discard(folder: RunFolder | None, plan: SavePlan | None) -> None:
    """Remove what a run has made that never began, so that the corrected command finds the names free."""
    if plan is not None and plan.manifest is None:
        with suppress(OSError):  # it stays, and is empty
            _checkpoints(plan).place.release()
    if folder is not None:
        folder.discard()


def _checkpoints(plan: SavePlan) -> Checkpoints:
    try:
        return open_checkpoints(plan, channel=LocalChannel())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _identity(config: Config) -> dict[str, Any]:
    """What makes a run the same, as JSON would have it."""
    plain = {name: value for name, value in resolved(config).items() if name not in FREE}
    identity: dict[str, Any] = json.loads(json.dumps(plain))
    return identity


def _is_same(folder: Path, config: Config) -> bool:
    """Whether the run in a folder is that of ``config``."""
    try:
        check_same(folder, config)
    except ConfigError:  # another run, or a folder that was changed
        return False
    return True


class _Summary(msgspec.Struct):
    """What of a summary says whether its run has ended."""

    status: str


def _ended(folder: Path) -> bool:
    """Whether the run in a folder has ended by itself. One whose summary cannot be read is taken for one that has not."""
    try:
        data = read_file(folder / "summary.json", most=_MOST_BYTES)
        return msgspec.json.decode(data, type=_Summary).status == "finished"
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _modified(path: Path) -> float:
    """When a file was written; of one that is gone, long ago."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


_MISSING = object()


def _differences(now: Any, before: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Settings that differ: name, now, before."""
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        for key in dict.fromkeys([*now, *before]):
            dotted = f"{name}.{key}" if name else str(key)
            yield from _differences(now.get(key, _MISSING), before.get(key, _MISSING), dotted)
    elif now != before:
        yield name, _short(now), _short(before)


def _short(value: Any) -> str:
    text = "not there" if value is _MISSING else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
