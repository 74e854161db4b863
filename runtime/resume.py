"""Going on with a run: which run, whether it is the same, and from which of its checkpoints.

Two runs are the same where they would come to the same bits: all settings are equal but those that only say how long,
where, and on what. So ``--resume auto`` is one command that starts a run, and goes on with it after whatever has ended it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..comms.channel import LocalChannel
from .config import Config, load_config
from .errors import ConfigError
from .run_folder import RunFolder, default_path, resolved
from .saver import SavePlan, open_checkpoints

# What a run that is resumed may have otherwise.
FREE = ("name", "stop", "checkpoint", "max_failures", "backend", "workers", "ray", "out")

Resume = str | Path | None


def open_folder(config: Config, resume: Resume, *, target: Path | None) -> tuple[RunFolder | None, bool]:
    """The run folder, and whether the run in it is resumed; None where nothing is written.

    ``target``: the folder that was named, if any. Raises ``ConfigError``.
    """
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
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"resume is {str(path)!r}, which is not the folder of a run")
        return path, True
    if target is not None:
        return target, (target / "config.yaml").is_file()
    found = [path.parent for path in Path("runs").glob("*/config.yaml")]
    for folder in sorted(found, key=lambda path: ((path / "config.yaml").stat().st_mtime, path), reverse=True):
        if not _ended(folder) and _is_same(folder, config):
            return folder, True
    return None, False


def check_same(folder: Path, config: Config) -> None:
    """Raise ``ConfigError``, with all that differs, where the run in ``folder`` is another than that of ``config``."""
    before, now = _identity(load_config(folder / "config.yaml")), _identity(config)
    differing = [f"{name} is {new}, and was {old}" for name, new, old in _differences(now, before)]
    if differing:
        listed = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise ConfigError(f"resume is {str(folder)!r}, which is another run: {listed}")


def plan_saving(config: Config, folder: RunFolder | None, *, resumes: bool) -> SavePlan | None:
    """Where checkpoints go, and the one to go on from; None where nothing is written. Cuts the folder's log to that.

    Raises ``ConfigError`` where there are checkpoints, but none is sound, or where the place holds those of another run.
    """
    settings = config.checkpoint
    place = settings.to or (str((folder.path / "checkpoints").absolute()) if folder is not None else None)
    if place is None or (settings.every is None and settings.seconds is None and not resumes):
        return None
    text = json.dumps(_identity(config), sort_keys=True)
    plan = SavePlan(place=place, settings=settings, run=hashlib.sha256(text.encode()).hexdigest()[:32])
    try:
        checkpoints = open_checkpoints(plan, channel=LocalChannel())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not resumes or folder is None:
        if not checkpoints.is_empty:
            raise ConfigError(
                f"checkpoint.to is {place!r}, which holds checkpoints already; resume their run, or name a new place"
            )
        return plan
    found = checkpoints.newest(most_events=folder.num_events)
    folder.cut(found.manifest.events if found.manifest is not None else 0)
    if found.manifest is None:
        return plan
    told = f"the run goes on after version {found.manifest.version}, from its checkpoint"
    return SavePlan(
        place=place, settings=settings, run=plan.run, manifest=found.manifest, notices=(*found.notices, told)
    )


def _identity(config: Config) -> dict[str, Any]:
    """What makes a run the same, as JSON would have it."""
    plain = {name: value for name, value in resolved(config).items() if name not in FREE}
    identity: dict[str, Any] = json.loads(json.dumps(plain))
    return identity


def _is_same(folder: Path, config: Config) -> bool:
    """Whether the run in a folder is that of ``config``."""
    try:
        check_same(folder, config)
    except ConfigError:  # another run, or a folder that somebody has changed
        return False
    return True


def _ended(folder: Path) -> bool:
    """Whether the run in a folder has ended by itself."""
    try:
        return bool(json.loads((folder / "summary.json").read_text())["status"] == "finished")
    except (OSError, ValueError, KeyError):
        return False


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
