"""Which entries of a sparse tensor are likely to be there: a class of density for each output channel, input channel and cell.

A tensor is looked at as rows x columns x cells (output channel, input channel, position in the kernel). Large entries of
an update crowd into some of each, and about independently: the odds that an entry is there are near c^-(base + row + column
+ cell) with small whole numbers for each index of each axis (a model of rank one in the odds, after the independence model
of contingency tables). The sender fits these numbers by descent, one axis after the other, against what they cost to send;
the receiver needs only the numbers, never the odds, since the true count of each class is sent (``positions``).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .tables import Integers

Floats = npt.NDArray[np.float64]
Shape3 = tuple[int, int, int]

MAX_STEP = 11  # classes are within ± this of their tensor's base
BASES = 64
_CENTRE = 10  # base 10 means odds of one
_LOG2_STEP = 1.25  # what a class more does to the odds; the bytes hardly depend on it
_ODDS = BASES + 6 * MAX_STEP
_CELLS_OF_MATRIX = (4, 16, 49)
_MANY_COLUMNS = 1024
_FURTHER_SWEEPS = 1
_FEWEST = 8
_AXIS_BITS = 24.0
_INDEX_BITS = 0.8  # what a class costs at least


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

    Many columns may be a flattened map: groups of them then share a class, and cells are the places in a group.
    """
    items = int(np.prod(shape, dtype=np.int64))
    if len(shape) < 2 or not items:
        return [(1, items, 1)]
    if len(shape) > 2:
        return [(shape[0], shape[1], items // (shape[0] * shape[1]))]
    cells = [c for c in _CELLS_OF_MATRIX if shape[1] % c == 0 and shape[1] >= _MANY_COLUMNS]
    return [(shape[0], shape[1] // c, c) for c in cells or [1]]


def fit(flat: Integers, shape: tuple[int, ...]) -> tuple[Classes, float, int]:
    """Classes for the entries at sorted ``flat`` positions, about what these then cost in bits, and which view was taken."""
    shapes = shapes_of(shape)
    none, bits_none = plain(len(flat), shapes[0]), _order0_bits(len(flat), int(np.prod(shape, dtype=np.int64)))
    if max(shapes[0]) == np.prod(shape) or len(flat) < _FEWEST:
        return none, bits_none, 0
    descents = [_Descent(flat, view) for view in shapes]
    for descent in descents:
        descent.sweep(range(3))
    best = min(range(len(descents)), key=lambda view: descents[view].total_bits)
    for _ in range(_FURTHER_SWEEPS):
        descents[best].sweep([axis for axis in range(3) if descents[best].classes.axes[axis] is not None])
    found = descents[best]
    return (found.classes, found.total_bits, best) if found.total_bits < bits_none else (none, bits_none, 0)


def may_have_classes(indices: int, items: int, entries: int) -> bool:
    """Whether ``fit`` may give classes to so many indices of all axes, for no more than so many entries that are there.

    It does only where they cost less than the positions alone, which is log2(items / entries) + 1.45 bits an entry at most.
    """
    position_bits = (items // entries).bit_length() + 2 if entries else 0
    return entries >= _FEWEST and indices * _INDEX_BITS < entries * position_bits


def channel_gain_bits(there: npt.NDArray[np.bool_], shape: tuple[int, ...]) -> float:
    """What positions would cost less with a density for each row, or for each column: the larger of the two gains."""
    rows, columns, cells = shapes_of(shape)[0]
    by_row = np.count_nonzero(there.reshape(rows, -1), axis=1)
    by_column = np.count_nonzero(there.reshape(rows, columns, cells), axis=(0, 2))
    items = there.size
    costs = [sum(_order0_bits(int(c), items // len(counts)) for c in counts) for counts in (by_row, by_column)]
    return _order0_bits(int(by_row.sum()), items) - min(costs)


def plain(count: int, shape: Shape3) -> Classes:
    """No classes: all entries alike."""
    return Classes(
        shape, int(np.clip(round(_CENTRE - _log2_odds(count, int(np.prod(shape))) / _LOG2_STEP), 0, BASES - 1))
    )


class _Descent:
    """The sender's search: one axis is chosen anew while the others are held."""

    def __init__(self, flat: Integers, shape: Shape3) -> None:
        """Start without classes."""
        kernel = flat // shape[2]
        row = kernel // shape[1]
        self._indices = row, kernel - row * shape[1], flat - kernel * shape[2]
        self.classes = plain(len(flat), shape)
        self._bits, self._side_bits = 0.0, [0.0, 0.0, 0.0]

    @property
    def total_bits(self) -> float:
        """What the positions cost, and the classes."""
        return self._bits + sum(self._side_bits)

    def sweep(self, axes: Iterable[int]) -> None:
        """Choose each of these axes once."""
        for axis in axes:
            if self.classes.shape[axis] > 1:
                self._choose(axis)

    def _choose(self, axis: int) -> None:
        """The cheapest classes of one axis, or none where they would not pay."""
        first, second = (other for other in range(3) if other != axis)
        outer = self.classes.of(first), self.classes.of(second)
        low = int(outer[0].min() + outer[1].min())
        width = int(outer[0].max() + outer[1].max()) - low + 1
        # How many entries, and how many of them are there, for each index of the axis and each sum of the others' classes.
        place = self._indices[axis] * width + (outer[0] - low)[self._indices[first]] + outer[1][self._indices[second]]
        here = np.bincount(place, minlength=self.classes.shape[axis] * width).reshape(-1, width).astype(np.float64)
        counts = [np.bincount(own - own.min()) for own in outer]
        all_of = np.convolve(counts[0], counts[1])
        present, absent = _bits_of_odds()
        steps = np.arange(-MAX_STEP, MAX_STEP + 1)
        odds = np.clip(self.classes.base + 3 * MAX_STEP + low + np.arange(width)[:, None] + steps, 0, _ODDS - 1)
        costs = here @ (present - absent)[odds] + all_of @ absent[odds]
        chosen = (costs + _step_bits(steps)).argmin(1)
        bits = float(costs[np.arange(len(costs)), chosen].sum())
        side = _AXIS_BITS + float(_step_bits(steps[chosen]).sum())
        without = float(costs[:, MAX_STEP].sum())
        if bits + side < without:
            self.classes.axes[axis] = steps[chosen]
            self._bits, self._side_bits[axis] = bits, side
        else:
            self.classes.axes[axis] = None
            self._bits, self._side_bits[axis] = without, 0.0


@lru_cache(maxsize=1)
def _bits_of_odds() -> tuple[Floats, Floats]:
    """What an entry costs that is there, and one that is not, by its class (shifted by three steps)."""
    log_odds = _LOG2_STEP * (_CENTRE + 3 * MAX_STEP - np.arange(_ODDS, dtype=np.float64))
    return np.logaddexp2(0, -log_odds), np.logaddexp2(0, log_odds)


def _step_bits(steps: Integers) -> Any:
    """About what a class costs to send."""
    return _INDEX_BITS + 1.1 * np.abs(steps)


def _log2_odds(count: int, items: int) -> float:
    """Logarithm of the odds that an entry is there."""
    return float(np.log2((count + 0.5) / (items - count + 0.5)))


def _order0_bits(count: int, items: int) -> float:
    """``items`` times the entropy of the density."""
    if not 0 < count < items:
        return 0.0
    share = count / items
    return -items * float(share * np.log2(share) + (1 - share) * np.log2(1 - share))
