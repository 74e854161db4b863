"""When a version closes, and the two errors that end a run at its close.

A run ends when all plans of a version have ended, one of them failed or was rejected, and nothing was ever delivered. It
also ends when every update of a version holds NaN or infinity because the model itself has diverged.
"""

import math
from collections.abc import Callable

from ..configuration.config import Config
from ..errors import RunError
from ..events import Evaluated
from .round import Round
from .run_history import OutcomeCounts, fault


def must_close(round_: Round, *, deadline_passed: bool, folded: int) -> bool:
    """Whether the version closes now. ``folded``: updates folded into it so far."""
    if deadline_passed:  # it counts from the first plan
        assert round_.dispatched
        return True
    if round_.close_at is not None and folded >= round_.close_at:
        return True
    return round_.complete and not round_.keep_open


def check_first_fault(round_: Round, counts: OutcomeCounts) -> None:
    """Raise ``RunError`` with the first fault if all plans of a round have ended and the run has delivered nothing so far."""
    first = round_.first_fault
    if first is not None and not round_.outstanding and not counts.delivered:
        raise fault(f"no device of this round delivered; the first fault: {first.error}", first)


def check_diverged(
    round_: Round,
    version: int,
    *,
    evaluated: Evaluated | None,
    evaluate: Callable[[], Evaluated | None],
    config: Config,
) -> None:
    """Raise ``RunError`` if every update of a round holds NaN or infinity because the model has diverged.

    That is so if the model's own loss is not finite; without an evaluation, if more than one device had a plan.
    ``evaluated``: the newest evaluation. ``evaluate``: called if that is of an earlier version.
    """
    if not round_.not_finite or round_.not_finite < round_.trainings:
        return
    if evaluated is None or evaluated.version != version:
        evaluated = evaluate()
    if evaluated is not None and math.isfinite(evaluated.figures["loss"]):
        return
    if evaluated is None and len(round_.plans_of) < 2:
        return
    loss = f"; its loss is {evaluated.figures['loss']:g}" if evaluated is not None else ""
    rates = (
        f"server.optimiser.learning_rate is {config.server.optimiser.learning_rate:g}, "
        f"training.optimiser.learning_rate {config.training.optimiser.learning_rate:g}"
    )
    raise RunError(
        f"all {round_.not_finite} updates of this round hold NaN or infinity, since the model of version {version} has "
        f"diverged{loss}; {rates}",
        round_=version,
        stage="close",
    )
