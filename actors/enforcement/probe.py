"""The measured memory of a plan: the smallest limit of the data segment under which two of its steps run, by bisection.

The data segment has no high-water mark, and sampling it misses what is allocated for a moment within an operation (sampled
73 MB where 120 MB were not enough). So the limit itself is the instrument, and a plan that is admitted by the result has run
under it.
"""

from collections.abc import Callable

_RESOLUTION = 0.02  # of the result
_LEAST_BYTES = 256 << 10
_MOST_DOUBLINGS = 6


def smallest_limit(fits: Callable[[int], bool], *, guess: int, resolution: float = _RESOLUTION) -> int:
    """The smallest limit that fits, to a share ``resolution`` of it or 256 KiB, rounded up to one that was tried and did fit.

    ``guess``: the predicted limit; the nearer, the fewer trials. Raises ``ValueError`` if 64 times the guess does not fit.
    """
    high = max(guess, _LEAST_BYTES)
    low = 0
    if fits(high):
        # The prediction is seldom off by a quarter.
        for share in (0.9, 0.75, 0.5):
            lower = int(high * share)
            if not fits(lower):
                low = lower
                break
            high = lower
    else:
        low = high
        for _ in range(_MOST_DOUBLINGS):
            high = int(low * (1.15 if low == guess else 2))
            if fits(high):
                break
            low = high
        else:
            raise ValueError(
                f"a step does not fit {high / 1e6:,.0f} MB, and is predicted to need {guess / 1e6:,.0f} MB"
            )
    while high - low > max(resolution * high, _LEAST_BYTES):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
