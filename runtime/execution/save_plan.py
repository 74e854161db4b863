"""Where the checkpoints of a run go, and which one it goes on from: the driver decides it, the server carries it out."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ...comms.channel import LocalChannel
from ..checkpointing.checkpoints import Checkpoints
from ..checkpointing.folder import Manifest
from ..configuration.config import CheckpointSettings, Config
from ..errors import ConfigError, RunError, ServerDied, UnfitCheckpoint
from ..storage.files import open_files
from ..storage.run_folder import RunFolder
from .resume import identity_text

_MAX_RESTARTS = 3  # of a server that dies again before the next checkpoint
_NONE: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class SavePlan:
    """Where and when checkpoints of a run are written; of a resumed run, the one that it goes on from, and notices of that.

    ``run``: names what must be equal in all runs that share a checkpoint. ``token``: of the place, which was claimed.
    """

    place: str
    settings: CheckpointSettings
    run: str
    token: str = ""
    manifest: Manifest | None = None
    notices: tuple[str, ...] = ()


def open_checkpoints(plan: SavePlan, *, channel: Any) -> Checkpoints:
    """The checkpoints of a plan's place. Raises ``ValueError``."""
    files = open_files(plan.place)
    return Checkpoints(files, channel=channel, run=plan.run, settings=plan.settings, token=plan.token)


def plan_saving(
    config: Config, folder: RunFolder | None, *, resumes: bool, unfit: Mapping[int, str] = _NONE
) -> SavePlan | None:
    """The plan of a run's checkpoints; None if none are written. The folder's log is cut to the checkpoint to go on from.

    ``unfit``: versions whose checkpoints could not be restored, and why. Raises ``ConfigError`` if there are checkpoints, but
    none is sound, or if the place is not this run's own.
    """
    settings = config.checkpoint
    place = settings.to or (str((folder.path / "checkpoints").absolute()) if folder is not None else None)
    if place is None or (settings.every is None and settings.seconds is None and not resumes):
        return None
    run = hashlib.sha256(identity_text(config).encode()).hexdigest()[:32]
    plan = SavePlan(place=place, settings=settings, run=run)
    checkpoints = _open(plan)
    checkpoints.place.claim(resumes=resumes)
    plan = replace(plan, token=checkpoints.place.token)
    if not resumes or folder is None:
        return plan
    newest = checkpoints.newest(most_events=folder.log.num_events, unfit=unfit)
    folder.cut(newest.manifest.events if newest.manifest is not None else 0)
    notices = list(newest.notices)
    if newest.manifest is not None:
        notices.append(f"the run goes on after version {newest.manifest.version}, from its checkpoint")
    horizon = config.schedule.rounds
    if config.schedule.has_horizon and horizon is not None and horizon < config.stop.rounds:
        notices.append(
            f"stop.rounds is {config.stop.rounds}, and the schedule of the learning rate ends with round {horizon}, as when "
            f"the run began: from there on the rate is {config.schedule.final:g} of the first"
        )
    return replace(plan, manifest=newest.manifest, notices=tuple(notices))


def discard(folder: RunFolder | None, plan: SavePlan | None) -> None:
    """Remove what a run has written that never began, so that a corrected command can use the same names."""
    if plan is not None and plan.manifest is None:
        with suppress(OSError):  # it stays, and is empty
            _open(plan).place.release()
    if folder is not None:
        folder.discard()


class Recovery:
    """The plan of one run's checkpoints through deaths of its server. ``plan``: for the next session; None if none are written.

    Whenever it changes, the log of the run folder is cut to where the run goes on.
    """

    def __init__(self, config: Config, folder: RunFolder | None, *, resumes: bool) -> None:
        """From the beginning, or from the newest checkpoint of a run that ``resumes``. Raises ``ConfigError``."""
        self._config, self._folder = config, folder
        self._restarts: list[int] = []  # versions from which a new server went on
        self._unfit: dict[int, str] = {}  # versions whose checkpoints could not be restored, and why
        self.plan = plan_saving(config, folder, resumes=resumes)

    def go_back(self, error: ServerDied | UnfitCheckpoint) -> None:
        """Go back to the newest checkpoint that is sound, or to the beginning of a run that had none.

        Raises ``RunError`` after too many deaths from one checkpoint, and for a run without checkpoints; ``ConfigError`` if
        none of them can be used.
        """
        if isinstance(error, UnfitCheckpoint):
            self._unfit[error.version] = error.why
            self.plan = self._plan_again()
            return
        if self._folder is None or self.plan is None:
            raise RunError(f"{error.message}; there is no checkpoint to go on from", stage="server") from error
        plan = self._plan_again()
        self._restarts.append(version := plan.manifest.version if plan.manifest is not None else 0)
        if (deaths := self._restarts.count(version)) > _MAX_RESTARTS:
            where = f"from the checkpoint of version {version}" if version else "from the beginning"
            raise RunError(
                f"{error.message}; it is the death number {deaths} {where}, and no further server is started; "
                f"go on with --resume {str(self._folder.path)!r}",
                stage="server",
            ) from error
        outcome = "it is replaced" if version else "it is replaced, and the run begins anew"
        self.plan = replace(plan, notices=(f"{error.message}; {outcome}", *plan.notices))

    def _plan_again(self) -> SavePlan:
        """The plan by the files as they are now, with the log cut to it."""
        plan = plan_saving(self._config, self._folder, resumes=True, unfit=self._unfit)
        assert plan is not None, "a run that writes checkpoints no longer does"
        return plan


def _open(plan: SavePlan) -> Checkpoints:
    try:
        return open_checkpoints(plan, channel=LocalChannel())
    except ValueError as error:
        raise ConfigError(str(error)) from error
