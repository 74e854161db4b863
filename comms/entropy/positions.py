"""Positions of the entries that are there, as gaps within each class of density.

All entries of one class, of all tensors, in order, are one sequence of coin tosses: its number of heads is sent, then the
gaps between heads (``gaps``). So a class costs what its true density says, and few classes serve many tensors. Within a
class, entries stand by combination of row, column and cell class, so that an entry's place in the sequence is arithmetic, and
the work is in proportion to what is there.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from ..errors import CorruptPacket
from .coders import StageReader, StageWriter, Symbols
from .density import Classes
from .gaps import put_counts, put_gaps, take_counts, take_gaps
from .tables import Integers


class DensityBlocks(NamedTuple):
    """All combinations of classes of all tensors, sorted by density class: where each begins in the sequence of all."""

    density: Symbols  # class of each
    starts: Integers  # in the sequence of all entries, class after class; one more at the end
    tensor: Symbols
    local: Symbols  # number of the combination within its tensor
    order: Integers  # what sorts them
    occurring: list[Symbols]  # by tensor: the combinations that occur, in order


class Axis(NamedTuple):
    """One axis of a tensor by class: how many indices each class has, and the indices in order of their class.

    ``classes``, ``order``: None where there is one class, so that an axis of a million takes no memory.
    """

    length: int
    classes: Symbols | None
    order: Integers | None
    starts: Integers
    sizes: Integers


class EntryView(NamedTuple):
    """A tensor's three axes."""

    axes: tuple[Axis, Axis, Axis]
    base: int


def view_of(classes: Classes) -> EntryView:
    """The axes of a tensor, their classes counted from 0."""
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
    return EntryView((axes[0], axes[1], axes[2]), base)


def blocks_of(views: list[EntryView]) -> DensityBlocks:
    """The blocks of all tensors, sorted by class, then tensor. Takes some 50 bytes for each, at most 23^3 for a tensor."""
    density, sizes, local = [], [], []
    for view in views:
        a, b, c = (axis.sizes for axis in view.axes)
        size = (a[:, None, None] * b[:, None] * c).reshape(-1)
        i, j, k = (np.arange(len(axis.sizes), dtype=np.int16) for axis in view.axes)
        total = (i[:, None, None] + j[:, None] + k + np.int16(view.base)).reshape(-1)
        used = np.flatnonzero(size)  # no more than the tensor has entries
        density.append(total[used])
        sizes.append(size[used])
        local.append(used.astype(np.int16))
    density_all, sizes_all = np.concatenate(density), np.concatenate(sizes)
    order = np.argsort(density_all, kind="stable")
    starts = np.zeros(len(order) + 1, np.int64)
    np.cumsum(sizes_all[order], out=starts[1:])
    tensor = np.repeat(np.arange(len(views), dtype=np.int32), [len(own) for own in local])
    return DensityBlocks(density_all[order], starts, tensor[order], np.concatenate(local)[order], order, local)


def put_positions(encoder: StageWriter, flats: list[Integers], views: list[EntryView]) -> None:
    """Send the positions (sorted, flat) of each tensor."""
    blocks = blocks_of(views)
    rank_of_block = np.empty(len(blocks.order), np.int64)
    rank_of_block[blocks.order] = np.arange(len(blocks.order))
    edges = pairwise(accumulate(map(len, blocks.occurring), initial=0))
    places, keys = [], []
    for flat, view, occurring, (start, end) in zip(flats, views, blocks.occurring, edges, strict=True):
        rows, columns, cells = view.axes
        row_class, row_rank = _classes_and_ranks(rows)
        column_class, column_rank = _classes_and_ranks(columns)
        cell_class, cell_rank = _classes_and_ranks(cells)
        width_of_row = columns.length * cells.length
        row = flat // width_of_row  # numpy's divmod is several times slower
        rest = flat - row * width_of_row
        # Of all (column, cell): combination of classes, entries of a row in it, and rank there.
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
    put_counts(encoder, counts)
    previous = np.empty_like(place)
    previous[1:] = place[:-1]
    heads = (ends - counts)[counts > 0]
    previous[heads] = starts[counts > 0] - 1
    gaps = place - previous - 1
    put_gaps(encoder, gaps, counts, sizes)


def take_positions(decoder: StageReader, views: list[EntryView], most: int) -> list[Integers]:
    """The positions of each tensor again, ``most`` in all. Raises ``CorruptPacket`` for what no sender sends."""
    blocks = blocks_of(views)
    starts, sizes = _class_edges(blocks)
    counts = take_counts(decoder, sizes)
    if counts.sum() > most:
        raise CorruptPacket(f"an entropy-coded stream says that {counts.sum()} entries are there, where {most} may be")
    gaps = take_gaps(decoder, counts, sizes)
    run = np.cumsum(gaps + 1)
    before = np.concatenate([[0], run])[np.cumsum(counts) - counts]  # what the classes before have added up to
    place = run - np.repeat(before, counts) - 1
    if (place >= np.repeat(sizes, counts)).any():
        raise CorruptPacket("an entropy-coded stream places an entry beyond the end of its class")
    place += np.repeat(starts, counts)
    block = np.searchsorted(blocks.starts, place, side="right") - 1
    rank, tensor, local = place - blocks.starts[block], blocks.tensor[block], blocks.local[block]
    return [_flat(view, rank[mine], local[mine]) for view, mine in _by_tensor(views, tensor)]


def _classes_and_ranks(axis: Axis) -> tuple[Integers, Integers]:
    """For the sender: which class each index has, counted from 0, and its rank among its own."""
    if axis.classes is None or axis.order is None:
        return np.zeros(axis.length, np.int64), np.arange(axis.length)
    ranks = np.empty(axis.length, np.int64)
    ranks[axis.order] = np.arange(axis.length) - np.repeat(axis.starts, axis.sizes)
    return axis.classes.astype(np.int64), ranks


def _by_tensor(views: list[EntryView], tensor: Symbols) -> list[tuple[EntryView, Integers]]:
    """Each view and the indices of its entries."""
    order = np.argsort(tensor.astype(np.uint16) if len(views) <= 1 << 16 else tensor, kind="stable")
    edges = np.searchsorted(tensor[order], np.arange(len(views) + 1))
    return [(view, order[edges[i] : edges[i + 1]]) for i, view in enumerate(views)]


def _flat(view: EntryView, rank: Integers, local: Symbols) -> Integers:
    """From rank within a combination of classes to sorted flat positions."""
    rows, columns, cells = view.axes
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
    there = np.zeros(rows.length * columns.length * cells.length, np.bool_)
    there[flat] = True
    found: Integers = np.flatnonzero(there)
    return found


def _class_edges(blocks: DensityBlocks) -> tuple[Integers, Integers]:
    """Where each density class starts in the sequence of all, and how many entries it has."""
    firsts = np.flatnonzero(np.diff(blocks.density, prepend=blocks.density[0] - 1))
    starts = blocks.starts[firsts]
    sizes = np.diff(np.append(starts, blocks.starts[-1]))
    return starts, sizes
