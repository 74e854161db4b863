"""Integer frequency tables, computed alike on every machine.

A table is an array of frequencies, not negative, that sum to ``TOTAL``; symbol s costs log2(TOTAL / table[s]) bits. All
tables are computed in integers: floating-point logarithms and powers may differ between machines in the last bit, and one
different bit in a table makes the rest of a stream unreadable.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

PRECISION_BITS = 14
TOTAL = 1 << PRECISION_BITS
_FIXED_POINT_BITS = 30
_MANTISSA_BITS = 3
LEVELS = 1 + (48 << _MANTISSA_BITS)  # of counts below 2^48

Symbols = npt.NDArray[Any]  # integers of any width, not negative
Table = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]


def normalise(weights: npt.ArrayLike) -> Table:
    """The table with frequencies in proportion to ``weights`` (not negative, not all 0). Only weight 0 gets frequency 0."""
    weights = np.asarray(weights, np.int64)
    present = weights > 0
    spare = TOTAL - int(present.sum())
    frequencies = present + weights * spare // int(weights.sum())
    frequencies[np.argmax(weights)] += TOTAL - int(frequencies.sum())
    table: Table = frequencies.astype(np.uint32)
    return table


@lru_cache(maxsize=8)
def peaked(alphabet: int) -> Table:
    """A table for folded signed numbers (see ``fold``): the frequency of number d falls off as 1 / (4 + d^2)."""
    distance = (np.arange(alphabet, dtype=np.int64) + 1) >> 1
    return normalise((1 << 24) // (4 + distance * distance))


def fold(signed: Integers) -> Integers:
    """Maps 0, -1, 1, -2, 2, ... to 0, 1, 2, 3, 4, ..."""
    return np.where(signed < 0, -2 * signed - 1, 2 * signed)


def unfold(folded: Integers) -> Integers:
    """The inverse of ``fold``."""
    return np.where(folded & 1, -(folded + 1) >> 1, folded >> 1)


def level_of(counts: Integers) -> Integers:
    """Counts (below 2^48) as levels: floating-point numbers with three mantissa bits, exact below 16, else within 6 %."""
    exponent = np.frexp(counts.astype(np.float64))[1].astype(np.int64) - 1  # exact: counts have less than 53 bits
    mantissa = (counts << _MANTISSA_BITS >> np.maximum(exponent, 0)) - (1 << _MANTISSA_BITS)
    return np.where(counts > 0, 1 + (exponent << _MANTISSA_BITS) + mantissa, 0)


def count_of(levels: Integers) -> Integers:
    """The count of a level: 0 for level 0, else at least 1."""
    exponent, mantissa = np.divmod(np.maximum(levels - 1, 0), 1 << _MANTISSA_BITS)
    return np.where(levels > 0, (mantissa + (1 << _MANTISSA_BITS)) << exponent >> _MANTISSA_BITS, 0)


def power(positions: int, nonzeros: int, exponent: int) -> int:
    """(1 - nonzeros / positions)^exponent in fixed point (30 bits), by repeated squaring."""
    base = ((positions - nonzeros) << _FIXED_POINT_BITS) // positions
    result = 1 << _FIXED_POINT_BITS
    while exponent:
        if exponent & 1:
            result = result * base >> _FIXED_POINT_BITS
        base = base * base >> _FIXED_POINT_BITS
        exponent >>= 1
    return result


@lru_cache(maxsize=256)
def geometric(ratio: int, size: int) -> Table:
    """The table of ``size`` symbols, each ``ratio`` (fixed point, at most 1) times as frequent as the one before."""
    weights, weight = [], 1 << _FIXED_POINT_BITS
    for _ in range(size):
        weights.append(max(weight, 1))
        weight = weight * ratio >> _FIXED_POINT_BITS
    return normalise(weights)


def halves(positions: int, nonzeros: int) -> int:
    """The smallest b (at most 40) for which (1 - nonzeros / positions)^(2^b) is at most 5/8. Gaps are divided by 2^b."""
    value, bits = power(positions, nonzeros, 1), 0
    while value > 5 << (_FIXED_POINT_BITS - 3) and bits < 40:
        value = value * value >> _FIXED_POINT_BITS
        bits += 1
    return bits
