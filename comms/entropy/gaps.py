"""Gaps between the nonzero entries of a density class, and the number of these entries.

Within a class every entry is nonzero with the same probability, so a gap has a geometric distribution. gap mod 2^b and gap
div 2^b are then independent (Golomb, 1966), so two small tables code a gap without loss of efficiency, where Golomb's own
code loses up to 3 %. Of the remainder, the highest 6 bits have a table; the lower bits are uniform to within 1 %, and are
sent as raw bits.
"""

from typing import NamedTuple

import numpy as np

from ..errors import CorruptPacket
from .coders import SymbolReader, SymbolWriter
from .tables import Integers, Symbols, Table, geometric, halves, normalise, power

_MIDDLE_BITS = 6
_ESCAPE = 40  # stands for a quotient of 40 or more; the excess follows, in as many bits as the class can need
_ONE_SYMBOL = normalise([1])
_COUNT_BITS = 6  # bits of the length of a count


def put_counts(writer: SymbolWriter, counts: Integers) -> None:
    """Writes the number of nonzero entries of each class: length in bits, then the bits below the highest."""
    lengths = np.array([int(count).bit_length() for count in counts])
    rests = zip(counts.tolist(), lengths.tolist(), strict=True)
    writer.put((lengths, _COUNT_BITS), *((np.array([count]), max(length - 1, 0)) for count, length in rests))


def take_counts(reader: SymbolReader, sizes: Integers) -> Integers:
    """Reads the counts of ``put_counts``. ``sizes``: entries of each class. Raises ``CorruptPacket`` for a larger count."""
    (lengths,) = reader.take((len(sizes), _COUNT_BITS))
    rests = reader.take(*((1, max(length - 1, 0)) for length in lengths.tolist()))
    counts = np.array(
        [
            int(rest[0]) + (1 << length - 1 if length else 0)
            for length, rest in zip(lengths.tolist(), rests, strict=True)
        ]
    )
    if (counts > sizes).any():
        raise CorruptPacket("an entropy-coded stream says that a class has more nonzero entries than entries")
    return counts


class _GapCode(NamedTuple):
    """How a gap of a class is coded: tables of the quotient and the middle bits, raw low bits, raw bits of an excess."""

    quotient: Table
    middle: Table
    middle_bits: int
    low_bits: int
    escape_bits: int


def _gap_code(size: int, count: int) -> _GapCode:
    """The code for a class of ``size`` entries, ``count`` of them nonzero. All or none: tables of one symbol, at no cost."""
    if count in (0, size):
        return _GapCode(_ONE_SYMBOL, _ONE_SYMBOL, 0, 0, 0)
    bits = halves(size, count)
    middle = min(bits, _MIDDLE_BITS)
    low = bits - middle
    quotient = geometric(power(size, count, 1 << bits), _ESCAPE + 1)
    return _GapCode(
        quotient, geometric(power(size, count, 1 << low), 1 << middle), middle, low, (size >> bits).bit_length()
    )


def put_gaps(writer: SymbolWriter, gaps: Symbols, counts: Integers, sizes: Integers) -> None:
    """Writes the gaps, class by class."""
    pieces: list[tuple[Symbols, Table | int]] = []
    escaped: list[tuple[Symbols, Table | int]] = []
    start = 0
    for count, size in zip(counts.tolist(), sizes.tolist(), strict=True):
        code = _gap_code(size, count)
        own = gaps[start : start + count]
        start += count
        quotient = own >> code.middle_bits + code.low_bits
        pieces.append((np.minimum(quotient, _ESCAPE), code.quotient))
        pieces.append((own >> code.low_bits & ((1 << code.middle_bits) - 1), code.middle))
        pieces.append((own, code.low_bits))
        escaped.append((quotient[quotient >= _ESCAPE] - _ESCAPE, code.escape_bits))
    writer.put(*pieces)
    writer.put(*escaped)


def take_gaps(reader: SymbolReader, counts: Integers, sizes: Integers) -> Symbols:
    """Reads the gaps of ``put_gaps``. Raises ``CorruptPacket`` for a gap that is longer than its class."""
    codes = [_gap_code(size, count) for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)]
    requests: list[tuple[int, Table | int]] = []
    for count, code in zip(counts.tolist(), codes, strict=True):
        requests += [(count, code.quotient), (count, code.middle), (count, code.low_bits)]
    parts = iter(reader.take(*requests))
    quotients, rests = [], []
    for code in codes:
        quotients.append(next(parts).astype(np.int64))
        rests.append((next(parts).astype(np.int64) << code.low_bits) + next(parts))
    escaped = [np.flatnonzero(quotient == _ESCAPE) for quotient in quotients]
    excess = reader.take(*((len(at), code.escape_bits) for at, code in zip(escaped, codes, strict=True)))
    for quotient, at, more in zip(quotients, escaped, excess, strict=True):
        quotient[at] += more
    quotient, rest = np.concatenate(quotients), np.concatenate(rests)
    bits = np.repeat([code.middle_bits + code.low_bits for code in codes], counts)
    if (quotient > np.repeat(sizes, counts) >> bits).any():  # so that sums cannot overflow
        raise CorruptPacket("an entropy-coded stream has a gap beyond the end of its class")
    gaps: Symbols = (quotient << bits) + rest
    return gaps
