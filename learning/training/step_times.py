"""Measures training steps in each precision and layout that a configuration leaves open, and which of them is taken.

    warm-up     a step of each: what is built or loaded once, such as oneDNN's primitives, does not count
    turns       a few steps of each in turn, so that a disturbance meets all of them; the median of the turns counts

Time is that of the thread: what else the machine does, which may take the processor away, does not count either. For large
models a whole step takes a quarter of a second, so an alternative that is far behind has no further turn.
"""

import statistics
import time
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from ..spec import Layout, MeasuredForm, Precision, Training

Steps = Callable[[int], object]  # makes so many training steps

_TURNS = (3, 7)  # least and most
_TURN_S = 0.01  # steps that are shorter are repeated, eight times at most
_MOST_STEPS = 8
_LONG_S = 0.8  # of all turns so far: from here on there are no more than the least
_BEHIND = 1.5  # times the fastest turn
_BEHIND_WARM, _BEHIND_WARM_S = 2.5, 0.25  # the same for the warm-up, of which short ones say nothing
_LEAST_GAIN = 1.1


def alternatives(training: Training, *, layouts: bool, bf16: bool) -> list[Training]:
    """``training`` in each precision and layout that it leaves open, the plainest first; itself alone if it leaves none.

    ``layouts``: whether the model has weights to which a layout applies. ``bf16``: whether bf16 is considered.
    """
    precisions: Sequence[Precision] = [training.precision]
    if training.precision == "auto":
        precisions = ["float32", "bf16"] if bf16 else ["float32"]
    forms: Sequence[Layout] = [training.layout]
    if training.layout == "auto":
        forms = ["contiguous", "channels_last"] if layouts else ["contiguous"]
    return [replace(training, precision=precision, layout=layout) for precision in precisions for layout in forms]


def step_times(steps: Sequence[Steps], *, now: Callable[[], float] = time.thread_time) -> list[float | None]:
    """Seconds of a training step of each alternative, the median of its turns; None for one that raises an error.

    Those of an alternative that was given up are its turns until then, or its warm-up.
    """
    turns: dict[int, list[float]] = {}

    def timed(alternative: int, count: int) -> float | None:
        started = now()
        try:
            steps[alternative](count)
        except Exception:  # a user's model may raise anything, and an operation may not exist in bf16
            return None
        return (now() - started) / count

    warm = {each: seconds for each in range(len(steps)) if (seconds := timed(each, 1)) is not None}
    if not warm:
        return [None] * len(steps)
    limit = max(_BEHIND_WARM * min(warm.values()), _BEHIND_WARM_S)
    left = [each for each, seconds in warm.items() if seconds <= limit]
    count = max(1, min(_MOST_STEPS, int(_TURN_S / max(min(warm.values()), 1e-6))))
    spent = 0.0
    for turn in range(_TURNS[1]):
        if turn >= _TURNS[0] and spent > _LONG_S:
            break
        for each in list(left):
            seconds = timed(each, count)
            if seconds is None:
                left.remove(each)
                turns.pop(each, None)
                warm.pop(each)
            else:
                turns.setdefault(each, []).append(seconds)
                spent += seconds * count
        best = {each: min(turns[each]) for each in left}  # a disturbance can only slow
        left = [each for each in left if best[each] <= _BEHIND * min(best.values())]
    return [statistics.median(turns.get(each, [warm[each]])) if each in warm else None for each in range(len(steps))]


def choose(seconds: Sequence[float | None]) -> int:
    """The alternative that is taken: the first, and so the plainest, that takes at most a tenth longer than the fastest.

    So equal speeds, and those that a repeated measurement might order otherwise, give the plain one. 0 if none has a time.
    """
    fastest = min((each for each in seconds if each is not None), default=0.0)
    return next((n for n, each in enumerate(seconds) if each is not None and each <= _LEAST_GAIN * fastest), 0)


def measured_form(options: Sequence[Training], seconds: Sequence[float | None]) -> MeasuredForm:
    """What is recorded of a measurement of these alternatives; without ``seconds``, of the only alternative."""
    chosen = options[choose(seconds)]
    assert chosen.precision != "auto"
    assert chosen.layout != "auto"
    return MeasuredForm(
        precision=chosen.precision,
        layout=chosen.layout,
        step_s={
            f"{each.precision}, {each.layout}": float(f"{taken:.3g}")
            for each, taken in zip(options, seconds, strict=bool(seconds))
            if taken is not None
        },
    )
