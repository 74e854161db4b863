"""Gaps between the heads of coin tosses, class after class of entries alike in density.

A gap follows a geometric law. gap mod 2^b and gap div 2^b are then independent (Golomb, 1966), so two small tables code
it exactly, where Golomb's own code loses up to 3 %. Of the remainder, the highest 6 bits have a table; the bits below are
uniform to within 1 %, and are sent as they are.
"""

from typing import NamedTuple

import numpy as np

from ..errors import CorruptPacket
from .coders import StageReader, StageWriter, Symbols
from .tables import Integers, Table, geometric, halves, normalise, power

_MIDDLE_BITS = 6
_ESCAPE = 40  # a quotient as large is followed by what is beyond, in as many bits as the class can need
_ONE_SYMBOL = normalise([1])
_COUNT_BITS = 6  # of the length of a count


def put_counts(encoder: StageWriter, counts: Integers) -> None:
    """Length in bits, then the bits below the first."""
    lengths = np.array([int(count).bit_length() for count in counts])
    rests = zip(counts.tolist(), lengths.tolist(), strict=True)
    encoder.put((lengths, _COUNT_BITS), *((np.array([count]), max(length - 1, 0)) for count, length in rests))


def take_counts(decoder: StageReader, sizes: Integers) -> Integers:
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
    """How the gaps of a class are cut: quotient, middle bits, low bits; and the bits of a quotient's excess."""

    quotient: Table
    middle: Table
    middle_bits: int
    low_bits: int
    escape_bits: int


def _law(size: int, count: int) -> _Law:
    """The law of a class' gaps; tables of one symbol, which cost nothing, where all entries are there."""
    if count in (0, size):
        return _Law(_ONE_SYMBOL, _ONE_SYMBOL, 0, 0, 0)
    bits = halves(size, count)
    middle = min(bits, _MIDDLE_BITS)
    low = bits - middle
    quotient = geometric(power(size, count, 1 << bits), _ESCAPE + 1)
    return _Law(
        quotient, geometric(power(size, count, 1 << low), 1 << middle), middle, low, (size >> bits).bit_length()
    )


def put_gaps(encoder: StageWriter, gaps: Symbols, counts: Integers, sizes: Integers) -> None:
    """Send the gaps, class after class."""
    pieces: list[tuple[Symbols, Table | int]] = []
    escaped: list[tuple[Symbols, Table | int]] = []
    start = 0
    for count, size in zip(counts.tolist(), sizes.tolist(), strict=True):
        law = _law(size, count)
        own = gaps[start : start + count]
        start += count
        quotient = own >> law.middle_bits + law.low_bits
        pieces.append((np.minimum(quotient, _ESCAPE), law.quotient))
        pieces.append((own >> law.low_bits & ((1 << law.middle_bits) - 1), law.middle))
        pieces.append((own, law.low_bits))
        escaped.append((quotient[quotient >= _ESCAPE] - _ESCAPE, law.escape_bits))
    encoder.put(*pieces)
    encoder.put(*escaped)


def take_gaps(decoder: StageReader, counts: Integers, sizes: Integers) -> Symbols:
    """The gaps of all classes."""
    laws = [_law(size, count) for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)]
    wants: list[tuple[int, Table | int]] = []
    for count, law in zip(counts.tolist(), laws, strict=True):
        wants += [(count, law.quotient), (count, law.middle), (count, law.low_bits)]
    parts = iter(decoder.take(*wants))
    quotients, rests = [], []
    for law in laws:
        quotients.append(next(parts).astype(np.int64))
        rests.append((next(parts).astype(np.int64) << law.low_bits) + next(parts))
    escaped = [np.flatnonzero(quotient == _ESCAPE) for quotient in quotients]
    excess = decoder.take(*((len(at), law.escape_bits) for at, law in zip(escaped, laws, strict=True)))
    for quotient, at, more in zip(quotients, escaped, excess, strict=True):
        quotient[at] += more
    quotient, rest = np.concatenate(quotients), np.concatenate(rests)
    bits = np.repeat([law.middle_bits + law.low_bits for law in laws], counts)
    if (quotient > np.repeat(sizes, counts) >> bits).any():  # so that sums cannot overflow
        raise CorruptPacket("an entropy-coded stream has a gap beyond the end of its class")
    gaps: Symbols = (quotient << bits) + rest
    return gaps
