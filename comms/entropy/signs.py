"""Signs of the entries that are there: biased by row, and alike within a kernel.

An update moves a whole output channel, or a whole kernel, one way: a row of the last layer has nearly one sign where the
device lacks that class. So a sign is coded by the bias of its row (a class sent for each row that holds entries), or as
"like the one before in the same kernel", or by one bias for the tensor: whatever costs least for the sender's data.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .coders import StageReader, StageWriter, Symbols
from .density import Shape3
from .tables import TOTAL, Integers, Table, normalise

BY_ROW, BY_KERNEL = 1, 2
MODES = 4
_SHARE_BITS = 6
_SHARES = (1 << _SHARE_BITS) - 1
_ROW_NEGATIVES = (32, 12, 52, 3, 61, 1, 63)  # in 64ths, by class of rows
_ROW_WEIGHTS = (4, 2, 2, 2, 2, 2, 2)  # how often a class is taken to be chosen


class SignModel(NamedTuple):
    """How a tensor's signs are coded.

    ``mode``: flags. ``negative``, ``changed``: shares of negative signs and of changes within a kernel, in 63rds. ``rows``:
    class of each row that holds an entry (empty where the mode has no rows).
    """

    mode: int
    negative: int
    changed: int
    rows: Integers


def fit(negative: Symbols, flat: Integers, shape: Shape3) -> tuple[SignModel, float]:
    """The cheapest model for these signs (1: negative) at sorted flat positions, and its bits."""
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


def put_models(encoder: StageWriter, models: list[SignModel]) -> None:
    """Send what the models are, their modes left out."""
    shares = np.array([share for m in models for share in _shares_of(m)], np.int64)
    encoder.put((shares, _SHARE_BITS), *((m.rows, _row_table()) for m in models))


def take_models(decoder: StageReader, modes: list[int], flats: list[Integers], shapes: list[Shape3]) -> list[SignModel]:
    """The models again; the modes are known by now."""
    wanted = sum(_num_shares(mode) for mode in modes)
    rows = [
        int(_split(flat, shape)[0][-1]) + 1 if mode & BY_ROW and len(flat) else 0
        for mode, flat, shape in zip(modes, flats, shapes, strict=True)
    ]
    shares, *classes = decoder.take((wanted, _SHARE_BITS), *((count, _row_table()) for count in rows))
    at = iter(shares.tolist())
    return [
        SignModel(mode, 0 if mode & BY_ROW else next(at), next(at) if mode & BY_KERNEL else 0, own)
        for mode, own in zip(modes, classes, strict=True)
    ]


def pieces_of(negative: Symbols, flat: Integers, shape: Shape3, model: SignModel) -> list[tuple[Symbols, Table | int]]:
    """Signs as pieces of a stage: by row class or as a whole, then changes within kernels."""
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


def wants_of(flat: Integers, shape: Shape3, model: SignModel) -> list[tuple[int, Table | int]]:
    """What to take for the signs at these positions."""
    row, follows = _split(flat, shape)
    wants: list[tuple[int, Table | int]] = []
    if model.mode & BY_KERNEL:
        wants.append((int(follows.sum()), _binary(model.changed, _SHARES)))
        row = row[~follows]
    if model.mode & BY_ROW:
        counts = np.bincount(model.rows[row], minlength=len(_ROW_NEGATIVES))
        return wants + [(int(count), _binary(share, 64)) for count, share in zip(counts, _ROW_NEGATIVES, strict=True)]
    return [*wants, (len(row), _binary(model.negative, _SHARES))]


def signs_of(parts: list[Symbols], flat: Integers, shape: Shape3, model: SignModel) -> Symbols:
    """The signs (1: negative) again, from what was taken."""
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
    # Within a kernel, a sign is its first sign and all changes since.
    total = np.cumsum(change)
    heads = np.flatnonzero(~follows)
    lengths = np.diff(np.append(heads, len(flat)))
    return (total - np.repeat(total[heads] - change[heads], lengths)) & 1


def _split(flat: Integers, shape: Shape3) -> tuple[Integers, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Each entry's row, numbered among those that hold any, and whether it follows another in its kernel."""
    kernel = flat // shape[2] if shape[2] > 1 else flat
    row = kernel // shape[1]
    follows = np.zeros(len(flat), np.bool_)
    follows[1:] = kernel[1:] == kernel[:-1]
    number = np.zeros(len(flat), np.int64)
    number[1:] = np.cumsum(row[1:] != row[:-1])
    return number, follows


def _share(ones: int, count: int) -> tuple[int, float]:
    """The share of ones in 63rds (0 and 63 only where exact), and what they then cost, the share included."""
    if ones in (0, count):
        return (_SHARES if ones and ones == count else 0), float(_SHARE_BITS)
    share = min(max(round(ones / count * _SHARES), 1), _SHARES - 1)
    table = _binary(share, _SHARES)
    return share, _SHARE_BITS + float(np.array([count - ones, ones]) @ np.log2(TOTAL / table))


@lru_cache(maxsize=128)
def _binary(ones: int, total: int) -> Table:
    """0 and 1."""
    return normalise([total - ones, ones])


@lru_cache(maxsize=1)
def _row_table() -> Table:
    """The classes of rows."""
    return normalise(_ROW_WEIGHTS)


@lru_cache(maxsize=2)
def _row_bits(sign: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What a sign costs in each class of rows."""
    negative = np.array(_ROW_NEGATIVES) / 64
    return -np.log2(negative if sign else 1 - negative)


def _num_shares(mode: int) -> int:
    """How many shares a mode needs."""
    return (not mode & BY_ROW) + bool(mode & BY_KERNEL)


def _shares_of(model: SignModel) -> list[int]:
    """The shares that are sent, in the order in which they are read."""
    return [model.negative] * (not model.mode & BY_ROW) + [model.changed] * bool(model.mode & BY_KERNEL)
