"""Signs of the nonzero entries, coded by the bias of their row and by the sign before in the same kernel.

An update often moves a whole output channel, or a whole kernel, in one direction: in the last layer, the row of a class that
the device lacks has nearly one sign. So a sign is coded by the bias of its row (a class is sent for each row that holds
nonzero entries) or by one bias for the tensor; and, optionally, as equal or opposite to the sign before in the same kernel.
The sender takes what costs least for its data.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .coders import SymbolReader, SymbolWriter
from .density import Shape3
from .tables import TOTAL, Integers, Symbols, Table, normalise

BY_ROW, BY_KERNEL = 1, 2
MODES = 4
_SHARE_BITS = 6
_SHARES = (1 << _SHARE_BITS) - 1
_ROW_NEGATIVES = (32, 12, 52, 3, 61, 1, 63)  # share of negative signs in 64ths, by class of rows
_ROW_WEIGHTS = (4, 2, 2, 2, 2, 2, 2)  # assumed frequency of each class


class SignModel(NamedTuple):
    """How a tensor's signs are coded.

    ``mode``: flags ``BY_ROW`` and ``BY_KERNEL``. ``negative``, ``changed``: shares of negative signs, and of sign changes
    within a kernel, in 63rds. ``rows``: class of each row that holds a nonzero entry; empty without ``BY_ROW``.
    """

    mode: int
    negative: int
    changed: int
    rows: Integers


def fit(negative: Symbols, flat: Integers, shape: Shape3) -> tuple[SignModel, float]:
    """The cheapest model for these signs (1: negative) at sorted flat positions, and its cost in bits."""
    row, follows = _split(flat, shape)
    change = negative[1:] ^ negative[:-1]
    changed, changed_bits = _share(int(change[follows[1:]].sum()), int(follows.sum()))
    first = np.flatnonzero(~follows)
    best: tuple[float, SignModel] | None = None
    for mode in range(MODES):
        if (mode & BY_ROW and shape[0] == 1) or (mode & BY_KERNEL and shape[2] == 1):
            continue
        own_row, own_negative = (row[first], negative[first]) if mode & BY_KERNEL else (row, negative)
        bits = changed_bits if mode & BY_KERNEL else 0.0
        share, rows = 0, np.zeros(0, np.int64)
        if mode & BY_ROW:
            count = int(row[-1]) + 1
            both = np.bincount(2 * own_row + own_negative, minlength=2 * count)
            plus, minus = both[::2], both[1::2]
            costs = minus[:, None] * _row_bits(1) + plus[:, None] * _row_bits(0) + np.log2(TOTAL / _row_table())
            rows = costs.argmin(1)
            bits += float(costs.min(1).sum())
        else:
            share, share_bits = _share(int(own_negative.sum()), len(own_negative))
            bits += share_bits
        if best is None or bits < best[0]:
            best = (bits, SignModel(mode, share, changed if mode & BY_KERNEL else 0, rows))
    assert best is not None
    return best[1], best[0]


def put_models(writer: SymbolWriter, models: list[SignModel]) -> None:
    """Writes models without their modes."""
    shares = np.array([share for m in models for share in _shares_of(m)], np.int64)
    writer.put((shares, _SHARE_BITS), *((m.rows, _row_table()) for m in models))


def take_models(reader: SymbolReader, modes: list[int], flats: list[Integers], shapes: list[Shape3]) -> list[SignModel]:
    """Reads the models of ``put_models``."""
    num_shares = sum(_num_shares(mode) for mode in modes)
    rows = [
        int(_split(flat, shape)[0][-1]) + 1 if mode & BY_ROW and len(flat) else 0
        for mode, flat, shape in zip(modes, flats, shapes, strict=True)
    ]
    shares, *classes = reader.take((num_shares, _SHARE_BITS), *((count, _row_table()) for count in rows))
    at = iter(shares.tolist())
    return [
        SignModel(mode, 0 if mode & BY_ROW else next(at), next(at) if mode & BY_KERNEL else 0, own)
        for mode, own in zip(modes, classes, strict=True)
    ]


def pieces_of(negative: Symbols, flat: Integers, shape: Shape3, model: SignModel) -> list[tuple[Symbols, Table | int]]:
    """Signs as pieces of a section: changes within kernels, then the other signs, by class of rows or all together."""
    row, follows = _split(flat, shape)
    pieces: list[tuple[Symbols, Table | int]] = []
    if model.mode & BY_KERNEL:
        change = negative ^ np.concatenate([[0], negative[:-1]])
        pieces.append((change[follows], _binary(model.changed, _SHARES)))
        row, negative = row[~follows], negative[~follows]
    if model.mode & BY_ROW:
        classes = model.rows[row]
        return pieces + [
            (negative[classes == number], _binary(share, 64)) for number, share in enumerate(_ROW_NEGATIVES)
        ]
    return [*pieces, (negative, _binary(model.negative, _SHARES))]


def requests_of(flat: Integers, shape: Shape3, model: SignModel) -> list[tuple[int, Table | int]]:
    """The requests to a reader for the pieces of the signs at these positions."""
    row, follows = _split(flat, shape)
    requests: list[tuple[int, Table | int]] = []
    if model.mode & BY_KERNEL:
        requests.append((int(follows.sum()), _binary(model.changed, _SHARES)))
        row = row[~follows]
    if model.mode & BY_ROW:
        counts = np.bincount(model.rows[row], minlength=len(_ROW_NEGATIVES))
        return requests + [
            (int(count), _binary(share, 64)) for count, share in zip(counts, _ROW_NEGATIVES, strict=True)
        ]
    return [*requests, (len(row), _binary(model.negative, _SHARES))]


def signs_of(parts: list[Symbols], flat: Integers, shape: Shape3, model: SignModel) -> Symbols:
    """The signs (1: negative) of the pieces ``parts``."""
    row, follows = _split(flat, shape)
    if not model.mode & BY_KERNEL:
        follows = np.zeros(len(flat), np.bool_)
    change = np.zeros(len(flat), np.int64)
    if model.mode & BY_KERNEL:
        change[follows] = parts.pop(0)
    if model.mode & BY_ROW:
        first = np.flatnonzero(~follows)
        classes = model.rows[row[first]]
        for number, part in enumerate(parts):
            change[first[classes == number]] = part
    else:
        change[~follows] = parts[0]
    # Within a kernel, a sign is the first sign plus all changes since, modulo 2.
    total = np.cumsum(change)
    heads = np.flatnonzero(~follows)
    lengths = np.diff(np.append(heads, len(flat)))
    return (total - np.repeat(total[heads] - change[heads], lengths)) & 1


def _split(flat: Integers, shape: Shape3) -> tuple[Integers, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """For each nonzero entry its row, numbered among the rows that hold any, and whether another precedes it in its kernel."""
    kernel = flat // shape[2] if shape[2] > 1 else flat
    row = kernel // shape[1]
    follows = np.zeros(len(flat), np.bool_)
    follows[1:] = kernel[1:] == kernel[:-1]
    number = np.zeros(len(flat), np.int64)
    number[1:] = np.cumsum(row[1:] != row[:-1])
    return number, follows


def _share(ones: int, count: int) -> tuple[int, float]:
    """The share of ones in 63rds (0 and 63 only if exact), and the cost in bits of the signs and the share."""
    if ones in (0, count):
        return (_SHARES if ones and ones == count else 0), float(_SHARE_BITS)
    share = min(max(round(ones / count * _SHARES), 1), _SHARES - 1)
    table = _binary(share, _SHARES)
    return share, _SHARE_BITS + float(np.array([count - ones, ones]) @ np.log2(TOTAL / table))


@lru_cache(maxsize=128)
def _binary(ones: int, total: int) -> Table:
    """The table of 0 and 1, with this share of ones."""
    return normalise([total - ones, ones])


@lru_cache(maxsize=1)
def _row_table() -> Table:
    """The table of the classes of rows."""
    return normalise(_ROW_WEIGHTS)


@lru_cache(maxsize=2)
def _row_bits(sign: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Cost in bits of a sign (1: negative) in each class of rows."""
    negative = np.array(_ROW_NEGATIVES) / 64
    return -np.log2(negative if sign else 1 - negative)


def _num_shares(mode: int) -> int:
    """Number of shares that a mode needs."""
    return (not mode & BY_ROW) + bool(mode & BY_KERNEL)


def _shares_of(model: SignModel) -> list[int]:
    """The shares of a model, in the order in which they are read."""
    return [model.negative] * (not model.mode & BY_ROW) + [model.changed] * bool(model.mode & BY_KERNEL)
