"""Exceptions of a run.

FedbonsaiError
├── ConfigError      a user's mistake: one sentence with field, value and what is allowed (exit code 2)
├── ClusterError     the cluster cannot be reached, or lacks what the run needs (exit code 2)
└── RunError         the run cannot continue: carries device, round and stage where they are known (exit code 1)
    ├── ServerDied   the server's actor died: a run with checkpoints continues with a new one
    └── UnfitCheckpoint   a checkpoint with intact files cannot be restored: the run continues from an earlier one

Damaged, which is internal: a checkpoint is corrupt, and an earlier one is used.
"""

import traceback


class FedbonsaiError(Exception):
    """Base class of all errors that end a run."""

    exit_code = 1


class ConfigError(FedbonsaiError):
    """A user's mistake in the configuration or on the command line."""

    exit_code = 2


class ClusterError(FedbonsaiError):
    """The cluster cannot be reached, or lacks what the run needs."""

    exit_code = 2


class RunError(FedbonsaiError):
    """The run cannot continue."""

    def __init__(self, message: str, *, device: int | None = None, round_: int | None = None, stage: str = "") -> None:
        """``message`` is printed after device, round and stage, as far as they are known."""
        where = [f"device {device}"] if device is not None else []
        where += [f"round {round_}"] if round_ is not None else []
        where += [f"stage {stage}"] if stage else []
        super().__init__(f"{', '.join(where)}: {message}" if where else message)
        self.message, self.device, self.round, self.stage = message, device, round_, stage
        self.trace = ""  # traceback of a user's code or of a bug, in the process where it was raised

    @classmethod
    def of(
        cls, error: Exception, *, device: int | None = None, round_: int | None = None, stage: str = ""
    ) -> "RunError":
        """A ``RunError`` for another exception, with its traceback."""
        run_error = cls(f"{type(error).__name__}: {error}", device=device, round_=round_, stage=stage)
        run_error.trace = "".join(traceback.format_exception(error))
        return run_error


class ServerDied(RunError):
    """The server's actor died, and its state since the last checkpoint is lost."""

    def __init__(self, message: str) -> None:
        """``message``: how it died."""
        super().__init__(message, stage="server")


class UnfitCheckpoint(RunError):
    """The checkpoint of ``version`` has intact files, but its contents do not fit this run."""

    def __init__(self, version: int, why: str) -> None:
        """``why``: what is wrong with it, as a clause."""
        super().__init__(f"the checkpoint of version {version} is damaged ({why})", stage="checkpoint")
        self.version, self.why = version, why

    def __reduce__(self) -> tuple[type["UnfitCheckpoint"], tuple[int, str]]:
        """For pickling: it is raised in the server's process and sent to the driver's."""
        return UnfitCheckpoint, (self.version, self.why)


class Damaged(Exception):
    """A checkpoint, or a file of one, is corrupt. Its message is a clause."""
