"""Which entries of a sparse tensor are likely to be there: a class of density for each output channel, input channel and cell.

A tensor is looked at as rows x columns x cells (output channel, input channel, position in the kernel). Large entries of
an update crowd into some of each, and about independently: the odds that an entry is there are near 2^-(base + row + column
+ cell) with small whole numbers for each index of each axis (a model of rank one in the odds, after the independence model
of contingency tables). The sender fits these numbers by descent, one axis after the other, against what they cost to send;
the receiver needs only the numbers, never the odds, since the true count of each class is sent (``positions``).
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .tables import Integers

Floats = npt.NDArray[np.float64]
Shape3 = tuple[int, int, int]

MAX_STEP = 15  # classes are within ± this of their tensor's base
BASES = 64
_CENTRE = 10  # base 10 means odds of one
_ODDS = BASES + 6 * MAX_STEP
_CELLS_OF_MATRIX = (1, 4, 16)
_SWEEPS = 2


@dataclass
class Classes:
    """Base and, for each of three axes, a class for each index (None: all 0)."""

    shape: Shape3
    base: int
    axes: list[Integers | None] = field(default_factory=lambda: [None, None, None])

    def of(self, axis: int) -> Integers:
        """The classes of one axis."""
        classes = self.axes[axis]
        return np.zeros(self.shape[axis], np.int64) if classes is None else classes


def shapes_of(shape: tuple[int, ...]) -> list[Shape3]:
    """Ways to look at a tensor as rows x columns x cells; the first is always there.

    The columns of a matrix may be a flattened map: groups of them share a class, and cells are the places in a group.
    """
    items = int(np.prod(shape, dtype=np.int64))
    if len(shape) < 2 or not items:
        return [(1, items, 1)]
    if len(shape) > 2:
        return [(shape[0], shape[1], items // (shape[0] * shape[1]))]
    cells = [c for c in _CELLS_OF_MATRIX if shape[1] % c == 0 and (c == 1 or shape[1] >= 256)]
    return [(shape[0], shape[1] // c, c) for c in cells]


def fit(flat: Integers, shape: Shape3) -> tuple[Classes, float]:
    """Classes for the entries at ``flat`` positions, and about how many bits these positions then cost, classes included."""
    items, count = int(np.prod(shape)), len(flat)
    none, bits_none = plain(count, shape), _order0_bits(count, items)
    if max(shape) == items or count < 8:
        return none, bits_none
    row, rest = np.divmod(flat, shape[1] * shape[2])
    column, cell = np.divmod(rest, shape[2])
    indices = (row, column, cell)
    classes, bits, side = plain(count, shape), bits_none, [0.0, 0.0, 0.0]
    for sweep in range(_SWEEPS):
        for axis in range(3):
            if shape[axis] > 1 and (sweep == 0 or classes.axes[axis] is not None):
                bits, side[axis] = _descend(classes, axis, indices)
    return (classes, bits + sum(side)) if bits + sum(side) < bits_none else (none, bits_none)


def plain(count: int, shape: Shape3) -> Classes:
    """No classes: all entries alike."""
    return Classes(shape, int(np.clip(round(_CENTRE - _log2_odds(count, int(np.prod(shape)))), 0, BASES - 1)))


def _descend(classes: Classes, axis: int, indices: tuple[Integers, ...]) -> tuple[float, float]:
    """Choose one axis anew, the others held: the bits of the positions, and of this axis' classes (0 where not worth it)."""
    others = [a for a in range(3) if a != axis]
    outer = classes.of(others[0]), classes.of(others[1])
    low = int(outer[0].min() + outer[1].min())
    width = int(outer[0].max() + outer[1].max()) - low + 1
    # How many entries, and how many of them are there, for each index of the axis and each sum of the others' classes.
    sums = outer[0][indices[others[0]]] + outer[1][indices[others[1]]] - low
    here = np.bincount(indices[axis] * width + sums, minlength=classes.shape[axis] * width).reshape(-1, width)
    first, second = (np.bincount(o - o.min()) for o in outer)
    all_of = np.convolve(first, second)[:width]
    present, absent = _bits_of_odds()
    steps = np.arange(-MAX_STEP, MAX_STEP + 1)
    odds = np.clip(classes.base + 3 * MAX_STEP + low + np.arange(width)[:, None] + steps, 0, _ODDS - 1)
    costs = here @ present[odds] + (all_of - here) @ absent[odds]
    with_side = costs + _step_bits(steps)
    chosen = with_side.argmin(1)
    each = np.arange(len(costs))
    bits, side = float(costs[each, chosen].sum()), 24.0 + float(_step_bits(steps[chosen]).sum())
    without = float(costs[:, MAX_STEP].sum())
    if without <= bits + side:
        classes.axes[axis] = None
        return without, 0.0
    classes.axes[axis] = steps[chosen]
    return bits, side


@lru_cache(maxsize=1)
def _bits_of_odds() -> tuple[Floats, Floats]:
    """What an entry costs that is there, and one that is not, by its class (shifted by three steps)."""
    log_odds = _CENTRE + 3 * MAX_STEP - np.arange(_ODDS, dtype=np.float64)
    return np.logaddexp2(0, -log_odds), np.logaddexp2(0, log_odds)


def _step_bits(steps: Integers) -> Any:
    """About what a class costs to send."""
    return 1.0 + 1.2 * np.abs(steps)


def _log2_odds(count: int, items: int) -> float:
    """Logarithm of the odds that an entry is there."""
    return float(np.log2((count + 0.5) / (items - count + 0.5)))


def _order0_bits(count: int, items: int) -> float:
    """``items`` times the entropy of the density."""
    if not 0 < count < items:
        return 0.0
    share = count / items
    return -items * float(share * np.log2(share) + (1 - share) * np.log2(1 - share))
