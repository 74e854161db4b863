"""When to stop, and which evaluation is the best so far."""

import math
from collections.abc import Mapping
from typing import ClassVar

from ...learning.spec import CountOrZero
from ..configuration.config import Stop


class Stopping:
    """Keeps the best evaluation: the highest accuracy where there is one, else the lowest loss."""

    SAVED: ClassVar = {"_best": float | None, "_since_best": CountOrZero}  # by a checkpoint
    NOT_SAVED = ("_rules",)

    def __init__(self, rules: Stop) -> None:
        """No evaluation yet."""
        self._rules = rules
        self._best: float | None = None
        self._since_best = 0

    def note(self, figures: Mapping[str, float]) -> bool:
        """Note an evaluation; whether it is the best so far. One whose loss or score is no number never is."""
        score = figures["accuracy"] if "accuracy" in figures else -figures["loss"]
        fit = not math.isnan(figures["loss"]) and math.isfinite(score)
        better = fit and (self._best is None or score > self._best)
        self._best = score if better else self._best
        self._since_best = 0 if better else self._since_best + 1
        return better

    def reason(
        self, *, version: int, time_s: float, num_bytes: int, evaluation: Mapping[str, float] | None
    ) -> str | None:
        """Why the run ends now, or None."""
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
