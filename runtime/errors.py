"""What a run raises.

FedbonsaiError
├── ConfigError      a user's mistake: one sentence with field, value and what is allowed (exit code 2)
├── ClusterError     the cluster cannot be reached, or lacks what the run needs (exit code 2)
└── RunError         the run cannot go on: carries device, round and stage where they are known (exit code 1)
    ├── ServerDied   the server's actor is gone: a run with checkpoints goes on with another
    └── UnfitCheckpoint   a checkpoint whose files are sound cannot be put back: the run goes on from the one before

Damaged, which no run raises: a checkpoint is not what was written, and the one before it is used.
"""

import traceback


class FedbonsaiError(Exception):
    """Anything that ends a run."""

    exit_code = 1


class ConfigError(FedbonsaiError):
    """A user's mistake in the configuration or on the command line."""

    exit_code = 2


class ClusterError(FedbonsaiError):
    """The cluster cannot be reached, or lacks what the run needs."""

    exit_code = 2


class RunError(FedbonsaiError):
    """The run cannot go on."""

    def __init__(self, message: str, *, device: int | None = None, round_: int | None = None, stage: str = "") -> None:
        """``message`` is printed after where it happened: device, round and stage, as far as they are known."""
        where = [f"device {device}"] if device is not None else []
        where += [f"round {round_}"] if round_ is not None else []
        where += [f"stage {stage}"] if stage else []
        super().__init__(f"{', '.join(where)}: {message}" if where else message)
        self.message, self.device, self.round, self.stage = message, device, round_, stage
        self.trace = ""  # of a user's code or of a bug, in whichever process it was raised

    @classmethod
    def of(
        cls, error: Exception, *, device: int | None = None, round_: int | None = None, stage: str = ""
    ) -> "RunError":
        """What another exception ended, with its trace."""
        found = cls(f"{type(error).__name__}: {error}", device=device, round_=round_, stage=stage)
        found.trace = "".join(traceback.format_exception(error))
        return found


class ServerDied(RunError):
    """The server's actor is gone, and with it all that no checkpoint holds."""

    def __init__(self, message: str) -> None:
        """``message``: how it died."""
        super().__init__(message, stage="server")


class UnfitCheckpoint(RunError):
    """The checkpoint of ``version`` has the files that were written, and yet is not one of this run."""

    def __init__(self, version: int, why: str) -> None:
        """``why``: what is wrong with it, as a part of a sentence."""
        super().__init__(f"the checkpoint of version {version} is damaged ({why})", stage="checkpoint")
        self.version, self.why = version, why

    def __reduce__(self) -> tuple[type["UnfitCheckpoint"], tuple[int, str]]:
        """It is raised in the server's process, and travels to the driver's."""
        return UnfitCheckpoint, (self.version, self.why)


class Damaged(Exception):
    """A checkpoint, or a file of one, is not what was written. A part of a sentence."""
