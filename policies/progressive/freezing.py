"""Whether a block has converged, by its effective movement (``learning.movement``).

Independent noise has an effective movement of 1 / sqrt(window), and a steady drift one of 1. A block is calm in a round if its
movement is near the noise floor, below ``LEVEL`` times it, and no longer falls: the slope of a least-squares line through the
last values is below a threshold. (The slope alone is also flat at the very start, where all weights still drift.) ProFL (arXiv
2404.13349) uses the slope; its thresholds are not known to us.
"""

import math
from collections.abc import Sequence

LEVEL = 1.5  # of the noise floor


def slope(values: Sequence[float]) -> float:
    """The slope of the least-squares line through equally spaced values; 0 for fewer than two."""
    count = len(values)
    if count < 2:
        return 0.0
    middle, mean = (count - 1) / 2, sum(values) / count
    rise = sum((position - middle) * (value - mean) for position, value in enumerate(values))
    return rise / sum((position - middle) ** 2 for position in range(count))


def is_calm(movement: Sequence[float], *, window: int, fitted: int, most_slope: float) -> bool:
    """Whether the newest of these movements is at the noise floor and does not fall any more.

    ``window``: of the movement, in versions. ``fitted``: values that the line goes through; there must be as many.
    """
    if len(movement) < fitted:
        return False
    return movement[-1] < LEVEL / math.sqrt(window) and abs(slope(movement[-fitted:])) < most_slope
