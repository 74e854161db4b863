"""What the engine's service gives the driver: events in small batches, and the error that ended the run.

An error crosses as (kind, sentence, trace): an exception of the user's code may not be importable on the driver's side.
"""

import traceback

import msgspec

from ...actors.pool import WorkerFailure
from ...comms.errors import StoreFull
from ..errors import ConfigError, FedbonsaiError, RunError
from ..events import AnyEvent


class Fault(msgspec.Struct, frozen=True):
    """What ended a run: "config" (a user's mistake), "run" (expected), or "bug"; the sentence, and where it happened.

    ``trace``: of a bug, or of a user's code; "" where the sentence says all.
    """

    kind: str
    text: str
    trace: str = ""
    device: int | None = None
    round: int | None = None
    stage: str = ""


class EventBatch(msgspec.Struct, frozen=True):
    """Events since the last step, in order; whether the run is over; what ended it, if it did not end well."""

    events: list[AnyEvent]
    over: bool
    fault: Fault | None = None


def describe(error: Exception) -> Fault:
    """An exception, ready to cross to another process."""
    if isinstance(error, ConfigError):
        return Fault("config", str(error))
    if isinstance(error, RunError):
        return Fault("run", error.message, error.trace, error.device, error.round, error.stage)
    if isinstance(error, FedbonsaiError | WorkerFailure | StoreFull):
        return Fault("run", str(error))
    return Fault("bug", f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def exception(fault: Fault) -> Exception:
    """A fault as an exception of this process, with its original trace."""
    if fault.kind == "config":
        return ConfigError(fault.text)
    error = RunError(fault.text, device=fault.device, round_=fault.round, stage=fault.stage)
    error.trace = fault.trace
    return error
