"""Where a run goes on from when its server has died, or a checkpoint cannot be put back: the newest checkpoint that can."""

from dataclasses import replace

from ..configuration.config import Config
from ..errors import RunError, ServerDied, UnfitCheckpoint
from ..storage.run_folder import RunFolder
from .resume import plan_saving
from .save_plan import SavePlan

_MOST_RESTARTS = 3  # of a server that dies again before the next checkpoint


class Recovery:
    """Keeps the plan of one run's checkpoints. ``plan``: the one to open the next session with; None where none are written.

    Whenever it has changed, the log of the run folder is cut to where the run goes on.
    """

    def __init__(self, config: Config, folder: RunFolder | None, *, resumes: bool) -> None:
        """At the beginning, or the newest checkpoint of a run that ``resumes``. Raises ``ConfigError``."""
        self._config, self._folder = config, folder
        self._restarts: list[int] = []  # versions from which a new server went on
        self._unfit: dict[int, str] = {}  # versions whose checkpoints could not be put back, and why
        self.plan = plan_saving(config, folder, resumes=resumes)

    def go_back(self, error: ServerDied | UnfitCheckpoint) -> None:
        """To the newest checkpoint that may do, or to the start of a run that had none; raises where there is no way.

        That is ``error`` itself, ``RunError`` without checkpoints, and ``ConfigError`` where none of them can be used.
        """
        if isinstance(error, UnfitCheckpoint):
            self._unfit[error.version] = error.why
            self.plan = self._plan_again()
            return
        if self._folder is None or self.plan is None:
            raise RunError(f"{error.message}; there is no checkpoint to go on from", stage="server") from error
        again = self._plan_again()
        self._restarts.append(version := again.manifest.version if again.manifest is not None else 0)
        if self._restarts.count(version) > _MOST_RESTARTS:
            raise error
        outcome = "it is replaced" if version else "it is replaced, and the run begins anew"
        self.plan = replace(again, notices=(f"{error.message}; {outcome}", *again.notices))

    def _plan_again(self) -> SavePlan:
        """The plan as the files are now, with the log cut to it."""
        again = plan_saving(self._config, self._folder, resumes=True, unfit=self._unfit)
        assert again is not None, "a run that writes checkpoints no longer does"
        return again
