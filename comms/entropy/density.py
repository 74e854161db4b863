"""Where the nonzero entries of a sparse tensor are likely: a density class for each output channel, input channel and cell.

A tensor is viewed as rows x columns x cells (output channel, input channel, position in the kernel). The large entries of an
update concentrate in some indices of each axis, about independently of the other axes: the odds that an entry is nonzero are
near c^-(base + row + column + cell), with a small integer (the class) for each index of each axis. This is a model of rank
one in the odds, after the independence model of contingency tables. The density class of an entry is the sum base + row +
column + cell. The sender fits the classes by descent, one axis after the other, and counts what they cost to send. The
receiver needs the classes but not the odds, since the true count of each density class is sent (``positions``).
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

MAX_STEP = 11  # classes of an axis are from -11 to 11
BASES = 64
_CENTRE = 10  # density class 10 means odds of one
_LOG2_STEP = 1.25  # log2 of the odds ratio between two classes; the bytes hardly depend on it
_ODDS = BASES + 6 * MAX_STEP
_CELLS_OF_MATRIX = (4, 16, 49)  # numbers of cells that are tried for a matrix of many columns
_MANY_COLUMNS = 1024
_FURTHER_SWEEPS = 1
_FEWEST = 8  # nonzero entries; with fewer there are no classes
_AXIS_BITS = 24.0  # cost of having classes on an axis
_INDEX_BITS = 0.8  # least cost of a class


@dataclass
class DensityClasses:
    """The density model of a tensor: a base and, for each of three axes, a class for each index (None: all 0)."""

    shape: Shape3
    base: int
    axes: list[Integers | None] = field(default_factory=lambda: [None, None, None])

    def of(self, axis: int) -> Integers:
        """The classes of one axis."""
        classes = self.axes[axis]
        return np.zeros(self.shape[axis], np.int64) if classes is None else classes


def shapes_of(shape: tuple[int, ...]) -> list[Shape3]:
    """The views of a tensor as rows x columns x cells; there is at least one.

    A matrix of many columns may be the weights of a flattened feature map. Its columns are then also viewed as groups: a
    group shares a class, and the cells are the places in a group.
    """
    items = int(np.prod(shape, dtype=np.int64))
    if len(shape) < 2 or not items:
        return [(1, items, 1)]
    if len(shape) > 2:
        return [(shape[0], shape[1], items // (shape[0] * shape[1]))]
    cells = [c for c in _CELLS_OF_MATRIX if shape[1] % c == 0 and shape[1] >= _MANY_COLUMNS]
    return [(shape[0], shape[1] // c, c) for c in cells or [1]]


def fit(flat: Integers, shape: tuple[int, ...]) -> tuple[DensityClasses, float, int]:
    """Fits classes to the nonzero entries at sorted ``flat`` positions.

    Returns the classes, the estimated cost of positions and classes in bits, and the number of the view.
    """
    shapes = shapes_of(shape)
    without, bits_without = plain(len(flat), shapes[0]), _order0_bits(len(flat), int(np.prod(shape, dtype=np.int64)))
    if max(shapes[0]) == np.prod(shape) or len(flat) < _FEWEST:
        return without, bits_without, 0
    descents = [_Descent(flat, view) for view in shapes]
    for descent in descents:
        descent.sweep(range(3))
    best = min(range(len(descents)), key=lambda view: descents[view].total_bits)
    for _ in range(_FURTHER_SWEEPS):
        descents[best].sweep([axis for axis in range(3) if descents[best].classes.axes[axis] is not None])
    descent = descents[best]
    if descent.total_bits < bits_without:
        return descent.classes, descent.total_bits, best
    return without, bits_without, 0


def may_have_classes(indices: int, items: int, entries: int) -> bool:
    """Whether ``fit`` may return classes for ``indices`` indices of all axes, given at most ``entries`` nonzero entries.

    It does so only if the classes cost less than positions without classes, which cost at most log2(items / entries) + 1.45
    bits an entry.
    """
    position_bits = (items // entries).bit_length() + 2 if entries else 0
    return entries >= _FEWEST and indices * _INDEX_BITS < entries * position_bits


def channel_gain_bits(nonzero: npt.NDArray[np.bool_], shape: tuple[int, ...]) -> float:
    """Bits that positions save with a density for each row, or with one for each column: the larger of the two.

    0 for a vector, which has no classes.
    """
    rows, columns, cells = shapes_of(shape)[0]
    if max(rows, columns, cells) == nonzero.size:
        return 0.0
    by_row = np.count_nonzero(nonzero.reshape(rows, -1), axis=1)
    by_column = np.count_nonzero(nonzero.reshape(rows, columns, cells), axis=(0, 2))
    items = nonzero.size
    costs = [sum(_order0_bits(int(c), items // len(counts)) for c in counts) for counts in (by_row, by_column)]
    return _order0_bits(int(by_row.sum()), items) - min(costs)


def plain(count: int, shape: Shape3) -> DensityClasses:
    """The model without classes: one density for all entries."""
    return DensityClasses(
        shape, int(np.clip(round(_CENTRE - _log2_odds(count, int(np.prod(shape))) / _LOG2_STEP), 0, BASES - 1))
    )


class _Descent:
    """The sender's search for classes: coordinate descent, one axis at a time."""

    def __init__(self, flat: Integers, shape: Shape3) -> None:
        """Starts without classes."""
        kernel = flat // shape[2]
        row = kernel // shape[1]
        self._indices = row, kernel - row * shape[1], flat - kernel * shape[2]
        self.classes = plain(len(flat), shape)
        self._bits, self._side_bits = 0.0, [0.0, 0.0, 0.0]

    @property
    def total_bits(self) -> float:
        """Estimated cost of positions and classes."""
        return self._bits + sum(self._side_bits)

    def sweep(self, axes: Iterable[int]) -> None:
        """Chooses the classes of each of these axes once."""
        for axis in axes:
            if self.classes.shape[axis] > 1:
                self._choose(axis)

    def _choose(self, axis: int) -> None:
        """Sets one axis to its cheapest classes, or to none if they cost more than they save."""
        first, second = (other for other in range(3) if other != axis)
        outer = self.classes.of(first), self.classes.of(second)
        low = int(outer[0].min() + outer[1].min())
        width = int(outer[0].max() + outer[1].max()) - low + 1
        # For each index of the axis and each sum of the others' classes: nonzero entries, and all entries.
        group = self._indices[axis] * width + (outer[0] - low)[self._indices[first]] + outer[1][self._indices[second]]
        num_nonzero = (
            np.bincount(group, minlength=self.classes.shape[axis] * width).reshape(-1, width).astype(np.float64)
        )
        counts = [np.bincount(own - own.min()) for own in outer]
        num_all = np.convolve(counts[0], counts[1])
        present, absent = _bits_of_odds()
        steps = np.arange(-MAX_STEP, MAX_STEP + 1)
        odds = np.clip(self.classes.base + 3 * MAX_STEP + low + np.arange(width)[:, None] + steps, 0, _ODDS - 1)
        costs = num_nonzero @ (present - absent)[odds] + num_all @ absent[odds]
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
    """Cost of a nonzero entry, and of a zero, by density class (shifted by three times ``MAX_STEP``)."""
    log_odds = _LOG2_STEP * (_CENTRE + 3 * MAX_STEP - np.arange(_ODDS, dtype=np.float64))
    return np.logaddexp2(0, -log_odds), np.logaddexp2(0, log_odds)


def _step_bits(steps: Integers) -> Any:
    """Estimated cost of sending a class."""
    return _INDEX_BITS + 1.1 * np.abs(steps)


def _log2_odds(count: int, items: int) -> float:
    """Base-2 logarithm of the odds that an entry is nonzero."""
    return float(np.log2((count + 0.5) / (items - count + 0.5)))


def _order0_bits(count: int, items: int) -> float:
    """``items`` times the entropy of the density ``count / items``."""
    if not 0 < count < items:
        return 0.0
    share = count / items
    return -items * float(share * np.log2(share) + (1 - share) * np.log2(1 - share))
