"""What the service sends to the driver: events in small batches, and the error that ended the run.

An error is sent as kind, sentence and trace, since the driver may be unable to import an exception of the user's code.
"""

import traceback

import msgspec

from ...actors.pool import WorkerFailure
from ...comms.errors import StoreFull
from ..errors import ConfigError, FedbonsaiError, RunError
from ..events import AnyEvent


class Fault(msgspec.Struct, frozen=True):
    """What ended a run: its kind ("config": a user's mistake; "run": expected; "bug"), a sentence, and where it happened.

    ``trace``: of a bug or of a user's code; else "".
    """

    kind: str
    text: str
    trace: str = ""
    device: int | None = None
    round: int | None = None
    stage: str = ""


class EventBatch(msgspec.Struct, frozen=True):
    """The events since the last step, in order; whether the run is over; and the error that ended it, if any."""

    events: list[AnyEvent]
    over: bool
    fault: Fault | None = None


def describe(error: Exception) -> Fault:
    """An exception as a fault, which can be sent to another process."""
    if isinstance(error, ConfigError):
        return Fault("config", str(error))
    if isinstance(error, RunError):
        return Fault("run", error.message, error.trace, error.device, error.round, error.stage)
    if isinstance(error, FedbonsaiError | WorkerFailure | StoreFull):
        return Fault("run", str(error))
    return Fault("bug", f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def exception(fault: Fault) -> Exception:
    """A fault as an exception, with its original trace."""
    if fault.kind == "config":
        return ConfigError(fault.text)
    error = RunError(fault.text, device=fault.device, round_=fault.round, stage=fault.stage)
    error.trace = fault.trace
    return error
