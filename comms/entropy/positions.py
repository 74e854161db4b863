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
from .coders import StageReader, StageWriter
from .density import Classes
from .gaps import put_counts, put_gaps, take_counts, take_gaps
from .tables import Integers


class Blocks(NamedTuple):
    """All combinations of classes of all tensors, sorted by density class: where each begins in the sequence of all."""

    density: Integers  # class of each
    starts: Integers  # in the sequence of all entries, class after class; one more at the end
    tensor: Integers
    local: Integers  # number of the combination within its tensor
    rank_of: list[Integers]  # by tensor: the block of each combination that occurs
    occurring: list[Integers]  # by tensor: the combinations that occur, in order


class Axis(NamedTuple):
    """One axis of a tensor by class: which class each index has, its rank among its own, and the indices by class."""

    classes: Integers
    ranks: Integers
    order: Integers
    starts: Integers
    sizes: Integers


class View(NamedTuple):
    """A tensor's three axes."""

    axes: tuple[Axis, Axis, Axis]
    base: int


def view_of(classes: Classes) -> View:
    """The axes of a tensor, their classes counted from 0."""
    axes, base = [], classes.base
    for axis in range(3):
        own = classes.of(axis)
        low = int(own.min()) if len(own) else 0
        base += low
        own = own - low
        sizes = np.bincount(own, minlength=1)
        starts = np.cumsum(sizes) - sizes
        order = np.argsort(own.astype(np.uint8), kind="stable")
        ranks = np.empty(len(own), np.int64)
        ranks[order] = np.arange(len(own)) - np.repeat(starts, sizes)
        axes.append(Axis(own, ranks, order, starts, sizes))
    return View((axes[0], axes[1], axes[2]), base)


def blocks_of(views: list[View]) -> Blocks:
    """The blocks of all tensors, sorted by class, then tensor."""
    density, sizes, tensor, local = [], [], [], []
    for number, view in enumerate(views):
        a, b, c = (axis.sizes for axis in view.axes)
        size = (a[:, None, None] * b[:, None] * c).reshape(-1)
        total = np.arange(len(a))[:, None, None] + np.arange(len(b))[:, None] + np.arange(len(c)) + view.base
        used = np.flatnonzero(size)  # no more than the tensor has entries
        density.append(total.reshape(-1)[used])
        sizes.append(size[used])
        tensor.append(np.full(len(used), number))
        local.append(used)
    density_all, sizes_all = np.concatenate(density), np.concatenate(sizes)
    order = np.argsort(density_all, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    edges = [0, *accumulate(map(len, sizes))]
    return Blocks(
        density_all[order],
        np.concatenate([[0], np.cumsum(sizes_all[order])]),
        np.concatenate(tensor)[order],
        np.concatenate(local)[order],
        [rank[start:end] for start, end in pairwise(edges)],
        local,
    )


def put_positions(encoder: StageWriter, flats: list[Integers], views: list[View]) -> None:
    """Send the positions (sorted, flat) of each tensor."""
    blocks = blocks_of(views)
    places, keys = [], []
    for number, (flat, view) in enumerate(zip(flats, views, strict=True)):
        rows, columns, cells = view.axes
        width_of_row = len(columns.classes) * len(cells.classes)
        row = flat // width_of_row  # numpy's divmod is several times slower
        rest = flat - row * width_of_row
        # Of all (column, cell): combination of classes, entries of a row in it, and rank there.
        combination = (columns.classes[:, None] * len(cells.sizes) + cells.classes).reshape(-1)
        width = (columns.sizes[columns.classes][:, None] * cells.sizes[cells.classes]).reshape(-1)
        within = (columns.ranks[:, None] * cells.sizes[cells.classes] + cells.ranks).reshape(-1)
        local = rows.classes[row] * (len(columns.sizes) * len(cells.sizes)) + combination[rest]
        block_of = np.zeros(len(rows.sizes) * len(columns.sizes) * len(cells.sizes), np.int64)
        block_of[blocks.occurring[number]] = blocks.rank_of[number]
        block = block_of[local]
        places.append(blocks.starts[block] + rows.ranks[row] * width[rest] + within[rest])
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


def take_positions(decoder: StageReader, views: list[View], most: int) -> list[Integers]:
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


def _by_tensor(views: list[View], tensor: Integers) -> list[tuple[View, Integers]]:
    """Each view and the indices of its entries."""
    order = np.argsort(tensor.astype(np.uint16) if len(views) <= 1 << 16 else tensor, kind="stable")
    edges = np.searchsorted(tensor[order], np.arange(len(views) + 1))
    return [(view, order[edges[i] : edges[i + 1]]) for i, view in enumerate(views)]


def _flat(view: View, rank: Integers, local: Integers) -> Integers:
    """From rank within a combination of classes to sorted flat positions."""
    rows, columns, cells = view.axes
    columns_cells = len(columns.sizes) * len(cells.sizes)
    a, rest = np.divmod(local, columns_cells)
    b, c = np.divmod(rest, len(cells.sizes))
    row, rest = np.divmod(rank, columns.sizes[b] * cells.sizes[c])
    column, cell = np.divmod(rest, cells.sizes[c])
    row, column, cell = (
        axis.order[axis.starts[own] + place]
        for axis, own, place in ((rows, a, row), (columns, b, column), (cells, c, cell))
    )
    flat = (row * len(columns.classes) + column) * len(cells.classes) + cell
    there = np.zeros(len(rows.classes) * len(columns.classes) * len(cells.classes), np.bool_)
    there[flat] = True
    found: Integers = np.flatnonzero(there)
    return found


def _class_edges(blocks: Blocks) -> tuple[Integers, Integers]:
    """Where each density class starts in the sequence of all, and how many entries it has."""
    firsts = np.flatnonzero(np.diff(blocks.density, prepend=blocks.density[0] - 1))
    starts = blocks.starts[firsts]
    sizes = np.diff(np.append(starts, blocks.starts[-1]))
    return starts, sizes
