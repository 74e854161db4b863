"""Positions of the entries that are there, as gaps within each class of density.

All entries of one class, of all tensors, in order, are one sequence of coin tosses; its number of heads is sent, and the
gaps between heads follow a geometric law. gap mod 2^b and gap div 2^b are then independent (Golomb, 1966), so two small
tables code a gap exactly, and the work is in proportion to what is there rather than to all entries. Below 64 steps the
remainder's table is nearly flat, and further bits are sent as they are.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..errors import CorruptPacket
from .coders import StageReader, StageWriter, Symbols
from .density import Classes
from .tables import Integers, Table, geometric, halves, normalise, power

_MIDDLE_BITS = 6
_ESCAPE = 20  # a quotient as large is followed by 32 bits of what is beyond
_ESCAPED_BITS = 32
_ONE_SYMBOL = normalise([1])
_COUNT_BITS = 5  # of the length of a count: below 2^32 entries in a class


class Blocks(NamedTuple):
    """All combinations of classes of all tensors, sorted by density class: where each begins in the sequence of all."""

    density: Integers  # class of each
    starts: Integers  # in the sequence of all entries, class after class; one more at the end
    tensor: Integers
    local: Integers  # number of the combination within its tensor
    rank_of: list[Integers]  # by tensor, from the combination to the block


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
        density.append(total.reshape(-1))
        sizes.append(size)
        tensor.append(np.full(len(size), number))
        local.append(np.arange(len(size)))
    density_all, sizes_all = np.concatenate(density), np.concatenate(sizes)
    order = np.argsort(density_all, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    edges = np.cumsum([0, *map(len, sizes)])
    return Blocks(
        density_all[order],
        np.concatenate([[0], np.cumsum(sizes_all[order])]),
        np.concatenate(tensor)[order],
        np.concatenate(local)[order],
        [rank[start:end] for start, end in pairwise(edges)],
    )


def put_positions(encoder: StageWriter, flats: list[Integers], views: list[View]) -> None:
    """Send the positions (sorted, flat) of each tensor."""
    blocks = blocks_of(views)
    places, keys = [], []
    for number, (flat, view) in enumerate(zip(flats, views, strict=True)):
        rows, columns, cells = view.axes
        row, rest = np.divmod(flat, len(columns.classes) * len(cells.classes))
        # Of all (column, cell): combination of classes, entries of a row in it, and rank there.
        combination = (columns.classes[:, None] * len(cells.sizes) + cells.classes).reshape(-1)
        width = (columns.sizes[columns.classes][:, None] * cells.sizes[cells.classes]).reshape(-1)
        within = (columns.ranks[:, None] * cells.sizes[cells.classes] + cells.ranks).reshape(-1)
        local = rows.classes[row] * (len(columns.sizes) * len(cells.sizes)) + combination[rest]
        block = blocks.rank_of[number][local]
        places.append(blocks.starts[block] + rows.ranks[row] * width[rest] + within[rest])
        keys.append(block)
    key = np.concatenate(keys)
    narrow = key.astype(np.uint16) if len(blocks.density) <= 1 << 16 else key  # numpy sorts 16 bits by radix
    place = np.concatenate(places)[np.argsort(narrow, kind="stable")]
    starts, sizes = _class_edges(blocks)
    ends = np.searchsorted(place, starts + sizes)
    counts = np.diff(ends, prepend=0)
    _put_counts(encoder, counts)
    previous = np.empty_like(place)
    previous[1:] = place[:-1]
    heads = (ends - counts)[counts > 0]
    previous[heads] = starts[counts > 0] - 1
    gaps = place - previous - 1
    _put_gaps(encoder, gaps, counts, sizes)


def take_positions(decoder: StageReader, views: list[View]) -> list[Integers]:
    """The positions of each tensor again. Raises ``CorruptPacket`` for what no sender sends."""
    blocks = blocks_of(views)
    starts, sizes = _class_edges(blocks)
    counts = _take_counts(decoder, sizes)
    gaps = _take_gaps(decoder, counts, sizes)
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
    """Where each density class starts in the sequence of all, and how many entries it has; empty classes left out."""
    firsts = np.flatnonzero(np.diff(blocks.density, prepend=blocks.density[0] - 1))
    starts = blocks.starts[firsts]
    sizes = np.diff(np.append(starts, blocks.starts[-1]))
    return starts[sizes > 0], sizes[sizes > 0]


def _put_counts(encoder: StageWriter, counts: Integers) -> None:
    """Length in bits, then the bits below the first."""
    lengths = np.array([int(count).bit_length() for count in counts])
    rests = zip(counts.tolist(), lengths.tolist(), strict=True)
    encoder.put((lengths, _COUNT_BITS), *((np.array([count]), max(length - 1, 0)) for count, length in rests))


def _take_counts(decoder: StageReader, sizes: Integers) -> Integers:
    """The number of entries in each class that are there."""
    (lengths,) = decoder.take((len(sizes), _COUNT_BITS))
    rests = decoder.take(*((1, max(length - 1, 0)) for length in lengths.tolist()))
    counts = np.array(
        [
            int(rest[0]) + (1 << length - 1 if length else 0)
            for length, rest in zip(lengths.tolist(), rests, strict=True)
        ]
    )
    if (counts > sizes).any():
        raise CorruptPacket("an entropy-coded stream says that more entries are there than a class has")
    return counts


class _Law(NamedTuple):
    """How the gaps of a class are cut: quotient, middle bits, low bits."""

    quotient: Table
    middle: Table
    middle_bits: int
    low_bits: int


def _law(size: int, count: int) -> _Law:
    """The law of a class' gaps; tables of one symbol, which cost nothing, where all entries are there."""
    if count in (0, size):
        return _Law(_ONE_SYMBOL, _ONE_SYMBOL, 0, 0)
    bits = halves(size, count)
    middle = min(bits, _MIDDLE_BITS)
    low = bits - middle
    quotient = geometric(power(size, count, 1 << bits), _ESCAPE + 1)
    return _Law(quotient, geometric(power(size, count, 1 << low), 1 << middle), middle, low)


def _put_gaps(encoder: StageWriter, gaps: Symbols, counts: Integers, sizes: Integers) -> None:
    """Send the gaps, class after class."""
    pieces: list[tuple[Symbols, Table | int]] = []
    beyond, start = [], 0
    for count, size in zip(counts.tolist(), sizes.tolist(), strict=True):
        law = _law(size, count)
        own = gaps[start : start + count]
        start += count
        quotient = own >> law.middle_bits + law.low_bits
        pieces.append((np.minimum(quotient, _ESCAPE), law.quotient))
        pieces.append((own >> law.low_bits & ((1 << law.middle_bits) - 1), law.middle))
        pieces.append((own, law.low_bits))
        beyond.append(quotient[quotient >= _ESCAPE] - _ESCAPE)
    encoder.put(*pieces)
    encoder.put((np.concatenate(beyond), _ESCAPED_BITS))


def _take_gaps(decoder: StageReader, counts: Integers, sizes: Integers) -> Symbols:
    """The gaps of all classes."""
    laws = [_law(size, count) for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)]
    wants: list[tuple[int, Table | int]] = []
    for count, law in zip(counts.tolist(), laws, strict=True):
        wants += [(count, law.quotient), (count, law.middle), (count, law.low_bits)]
    parts = iter(decoder.take(*wants))
    quotients, rests = [], []
    for law in laws:
        quotients.append(next(parts))
        rests.append((next(parts).astype(np.int64) << law.low_bits) + next(parts))
    quotient, rest = np.concatenate(quotients).astype(np.int64), np.concatenate(rests)
    escaped = np.flatnonzero(quotient == _ESCAPE)
    quotient[escaped] += decoder.take((len(escaped), _ESCAPED_BITS))[0]
    bits = np.repeat([law.middle_bits + law.low_bits for law in laws], counts)
    if (quotient > np.repeat(sizes, counts) >> bits).any():  # so that sums cannot overflow
        raise CorruptPacket("an entropy-coded stream has a gap beyond the end of its class")
    gaps: Symbols = (quotient << bits) + rest
    return gaps
