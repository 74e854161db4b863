"""Positions of the nonzero entries, as gaps within each density class.

All entries of one density class, of all tensors, form one sequence. The number of its nonzero entries is sent, then the gaps
between them (``gaps``). So the cost follows the true density of the class, and few classes serve many tensors. A *block* is
the part of a sequence that has one tensor and one combination of row, column and cell class. Blocks are contiguous, so the
place of an entry in the sequence is computed arithmetically, and the work is proportional to the number of nonzero entries.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from ..errors import CorruptPacket
from .coders import SymbolReader, SymbolWriter
from .density import DensityClasses
from .gaps import put_counts, put_gaps, take_counts, take_gaps
from .tables import Integers, Symbols


class DensityBlocks(NamedTuple):
    """The blocks of all tensors, sorted by density class."""

    density: Symbols  # class of each block
    starts: Integers  # of each block, in the sequence of all classes one after another; one more for the end
    tensor: Symbols  # of each block
    local: Symbols  # number of the block's combination of classes within its tensor
    order: Integers  # sorts the blocks, from the order by tensor
    occurring: list[Symbols]  # by tensor: the combinations that occur, ascending


class Axis(NamedTuple):
    """One axis of a tensor and the classes of its indices.

    ``classes``: class of each index. ``order``: the indices, sorted by class. ``starts``, ``sizes``: first place in ``order``
    and number of indices, by class. ``classes`` and ``order`` are None for one class, so that a long axis takes no memory.
    """

    length: int
    classes: Symbols | None
    order: Integers | None
    starts: Integers
    sizes: Integers


class ClassedShape(NamedTuple):
    """The three axes of a tensor, and the density class of the combination of the lowest classes."""

    axes: tuple[Axis, Axis, Axis]
    base: int


def classed_shape(classes: DensityClasses) -> ClassedShape:
    """The axes of a tensor, with classes counted from 0."""
    axes, base = [], classes.base
    for axis in range(3):
        own, length = classes.axes[axis], classes.shape[axis]
        if own is None or not length:
            axes.append(Axis(length, None, None, np.zeros(1, np.int64), np.array([length])))
            continue
        low = int(own.min())
        base += low
        small = (own - low).astype(np.uint8)
        sizes = np.bincount(small)
        axes.append(Axis(length, small, np.argsort(small, kind="stable"), np.cumsum(sizes) - sizes, sizes))
    return ClassedShape((axes[0], axes[1], axes[2]), base)


def blocks_of(shapes: list[ClassedShape]) -> DensityBlocks:
    """The blocks of all tensors, by class, then tensor. Allocates some 50 bytes a block; a tensor has at most 23^3."""
    density, sizes, local = [], [], []
    for shape in shapes:
        a, b, c = (axis.sizes for axis in shape.axes)
        size = (a[:, None, None] * b[:, None] * c).reshape(-1)
        i, j, k = (np.arange(len(axis.sizes), dtype=np.int16) for axis in shape.axes)
        total = (i[:, None, None] + j[:, None] + k + np.int16(shape.base)).reshape(-1)
        used = np.flatnonzero(size)  # at most as many as the tensor has entries
        density.append(total[used])
        sizes.append(size[used])
        local.append(used.astype(np.int16))
    density_all, sizes_all = np.concatenate(density), np.concatenate(sizes)
    order = np.argsort(density_all, kind="stable")
    starts = np.zeros(len(order) + 1, np.int64)
    np.cumsum(sizes_all[order], out=starts[1:])
    tensor = np.repeat(np.arange(len(shapes), dtype=np.int32), [len(own) for own in local])
    return DensityBlocks(density_all[order], starts, tensor[order], np.concatenate(local)[order], order, local)


def put_positions(writer: SymbolWriter, flats: list[Integers], shapes: list[ClassedShape]) -> None:
    """Writes the positions (sorted, flat) of the nonzero entries of each tensor."""
    blocks = blocks_of(shapes)
    rank_of_block = np.empty(len(blocks.order), np.int64)
    rank_of_block[blocks.order] = np.arange(len(blocks.order))
    edges = pairwise(accumulate(map(len, blocks.occurring), initial=0))
    places, keys = [], []
    for flat, shape, occurring, (start, end) in zip(flats, shapes, blocks.occurring, edges, strict=True):
        rows, columns, cells = shape.axes
        row_class, row_rank = _classes_and_ranks(rows)
        column_class, column_rank = _classes_and_ranks(columns)
        cell_class, cell_rank = _classes_and_ranks(cells)
        width_of_row = columns.length * cells.length
        row = flat // width_of_row  # numpy's divmod is several times slower
        rest = flat - row * width_of_row
        # For each (column, cell): its combination of classes, the entries of a row in it, and its rank among them.
        combination = (column_class[:, None] * len(cells.sizes) + cell_class).reshape(-1)
        width = (columns.sizes[column_class][:, None] * cells.sizes[cell_class]).reshape(-1)
        within = (column_rank[:, None] * cells.sizes[cell_class] + cell_rank).reshape(-1)
        local = row_class[row] * (len(columns.sizes) * len(cells.sizes)) + combination[rest]
        block_of = np.zeros(len(rows.sizes) * len(columns.sizes) * len(cells.sizes), np.int64)
        block_of[occurring] = rank_of_block[start:end]
        block = block_of[local]
        places.append(blocks.starts[block] + row_rank[row] * width[rest] + within[rest])
        keys.append(block)
    key = np.concatenate(keys)
    narrow = key.astype(np.uint16) if len(blocks.density) <= 1 << 16 else key  # numpy sorts 16 bits by radix
    place = np.concatenate(places)[np.argsort(narrow, kind="stable")]
    starts, sizes = _class_edges(blocks)
    ends = np.searchsorted(place, starts + sizes)
    counts = np.diff(ends, prepend=0)
    put_counts(writer, counts)
    previous = np.empty_like(place)
    previous[1:] = place[:-1]
    firsts = (ends - counts)[counts > 0]
    previous[firsts] = starts[counts > 0] - 1
    gaps = place - previous - 1
    put_gaps(writer, gaps, counts, sizes)


def take_positions(reader: SymbolReader, shapes: list[ClassedShape], most: int) -> list[Integers]:
    """Reads the positions of ``put_positions``. Raises ``CorruptPacket`` for more than ``most``, or for impossible ones."""
    blocks = blocks_of(shapes)
    starts, sizes = _class_edges(blocks)
    counts = take_counts(reader, sizes)
    if counts.sum() > most:
        raise CorruptPacket(
            f"an entropy-coded stream has {counts.sum()} nonzero entries, where at most {most} are expected"
        )
    gaps = take_gaps(reader, counts, sizes)
    run = np.cumsum(gaps + 1)
    before = np.concatenate([[0], run])[np.cumsum(counts) - counts]  # the sum over all earlier classes
    place = run - np.repeat(before, counts) - 1
    if (place >= np.repeat(sizes, counts)).any():
        raise CorruptPacket("an entropy-coded stream places an entry beyond the end of its class")
    place += np.repeat(starts, counts)
    block = np.searchsorted(blocks.starts, place, side="right") - 1
    rank, tensor, local = place - blocks.starts[block], blocks.tensor[block], blocks.local[block]
    return [_flat(shape, rank[own], local[own]) for shape, own in _by_tensor(shapes, tensor)]


def _classes_and_ranks(axis: Axis) -> tuple[Integers, Integers]:
    """For the sender: the class of each index, and its rank within the class."""
    if axis.classes is None or axis.order is None:
        return np.zeros(axis.length, np.int64), np.arange(axis.length)
    ranks = np.empty(axis.length, np.int64)
    ranks[axis.order] = np.arange(axis.length) - np.repeat(axis.starts, axis.sizes)
    return axis.classes.astype(np.int64), ranks


def _by_tensor(shapes: list[ClassedShape], tensor: Symbols) -> list[tuple[ClassedShape, Integers]]:
    """Each tensor's axes, and the indices of its entries."""
    order = np.argsort(tensor.astype(np.uint16) if len(shapes) <= 1 << 16 else tensor, kind="stable")
    edges = np.searchsorted(tensor[order], np.arange(len(shapes) + 1))
    return [(shape, order[edges[i] : edges[i + 1]]) for i, shape in enumerate(shapes)]


def _flat(shape: ClassedShape, rank: Integers, local: Symbols) -> Integers:
    """Sorted flat positions of entries that are given by block and rank within the block."""
    rows, columns, cells = shape.axes
    local = local.astype(np.int64)
    columns_cells = len(columns.sizes) * len(cells.sizes)
    a, rest = np.divmod(local, columns_cells)
    b, c = np.divmod(rest, len(cells.sizes))
    row, rest = np.divmod(rank, columns.sizes[b] * cells.sizes[c])
    column, cell = np.divmod(rest, cells.sizes[c])
    row, column, cell = (
        place if axis.order is None else axis.order[axis.starts[own] + place]
        for axis, own, place in ((rows, a, row), (columns, b, column), (cells, c, cell))
    )
    flat = (row * columns.length + column) * cells.length + cell
    nonzero = np.zeros(rows.length * columns.length * cells.length, np.bool_)
    nonzero[flat] = True
    positions: Integers = np.flatnonzero(nonzero)
    return positions


def _class_edges(blocks: DensityBlocks) -> tuple[Integers, Integers]:
    """Start of each density class in the sequence of all classes, and its number of entries."""
    firsts = np.flatnonzero(np.diff(blocks.density, prepend=blocks.density[0] - 1))
    starts = blocks.starts[firsts]
    sizes = np.diff(np.append(starts, blocks.starts[-1]))
    return starts, sizes
