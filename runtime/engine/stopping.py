"""The stop rules of a run, and which evaluation is the best so far."""

import math
from collections.abc import Mapping
from typing import ClassVar

from ...learning.spec import CountOrZero
from ..configuration.config import Stop


class Stopping:
    """Applies the rules. The best evaluation has the highest accuracy; without accuracies, the lowest loss."""

    SAVED: ClassVar = {"_best": float | None, "_since_best": CountOrZero}  # in a checkpoint
    NOT_SAVED = ("_rules",)

    def __init__(self, rules: Stop) -> None:
        """No evaluation has taken place."""
        self._rules = rules
        self._best: float | None = None
        self._since_best = 0

    def note(self, figures: Mapping[str, float]) -> bool:
        """Record an evaluation; returns whether it is the best so far.

        An evaluation is never the best if its loss is NaN, or its accuracy (without accuracies, its loss) is not finite.
        """
        score = figures["accuracy"] if "accuracy" in figures else -figures["loss"]
        valid = not math.isnan(figures["loss"]) and math.isfinite(score)
        better = valid and (self._best is None or score > self._best)
        self._best = score if better else self._best
        self._since_best = 0 if better else self._since_best + 1
        return better

    def reason(
        self, *, version: int, time_s: float, num_bytes: int, evaluation: Mapping[str, float] | None
    ) -> str | None:
        """Why the run ends now, or None.

        ``num_bytes``: bytes of training, up and down. ``evaluation``: figures of this version, None if it was not evaluated.
        """
        rules = self._rules
        if evaluation is not None:
            if rules.accuracy is not None and evaluation.get("accuracy", 0.0) >= rules.accuracy:
                return f"accuracy {evaluation['accuracy']:.4f} reached the target {rules.accuracy:g}"
            if rules.loss is not None and evaluation["loss"] <= rules.loss:
                return f"loss {evaluation['loss']:.4f} reached the target {rules.loss:g}"
            if rules.patience is not None and self._since_best >= rules.patience:
                return f"no better evaluation in {rules.patience}"
        if version >= rules.rounds:
            return f"{rules.rounds} rounds"
        if rules.virtual_s is not None and time_s >= rules.virtual_s:
            return f"{rules.virtual_s:g} virtual seconds"
        if rules.bytes is not None and num_bytes >= rules.bytes:
            return f"{rules.bytes} bytes"
        return None
