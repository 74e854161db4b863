"""Which entries of a tensor are sent: a bitmap, or gaps, whichever takes fewer bytes.

    BITMAP  a bit for each entry of the tensor
    GAPS    the gaps between successive positions by Rice codes (Golomb, 1966; Rice, 1979): the quotients by 2^b in unary, then
            the remainders in b bits, plane by plane; for even gaps within 2 % of the entropy of the density

Bytes of ``BITMAP``: the bits, eight to a byte. Of ``GAPS``: number of positions (4), b (1), bytes of the quotients (4),
quotients, remainders. Numbers are little-endian.
"""

from itertools import pairwise

import numpy as np

from ..codec import Array, ArraySpec
from ..entropy.bounds import most_entries
from ..entropy.tables import Integers
from ..errors import CorruptPacket, TruncatedPacket

BITMAP, GAPS = 1, 2
_NUMBER = np.dtype("<u4")
_GAPS_HEAD_BYTES = 2 * _NUMBER.itemsize + 1


class ByteReader:
    """Reads the bytes of an array from front to back."""

    def __init__(self, data: Array, name: str) -> None:
        """``name``: of the array, for errors."""
        self._data, self._name, self._at = data, name, 0

    def take(self, size: int) -> Array:
        """The next ``size`` bytes. Raises ``TruncatedPacket`` if there are fewer."""
        if size > self._data.size - self._at:
            raise TruncatedPacket(f"{self._name!r} ends after {self._data.size} bytes; {size} more are expected")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self) -> int:
        """The next number of four bytes."""
        return int(self.take(_NUMBER.itemsize).copy().view(_NUMBER)[0])

    def finish(self) -> None:
        """Raises ``CorruptPacket`` unless all bytes are read."""
        if self._at != self._data.size:
            raise CorruptPacket(f"{self._name!r} has {self._data.size - self._at} bytes too many")


def as_number(value: int) -> Array:
    """The number as four bytes."""
    return np.array([value], _NUMBER).view(np.uint8)


def put_places(flat: Integers, items: int) -> tuple[int, list[Array]]:
    """The form of sorted flat positions that takes fewer bytes, and its bytes in pieces."""
    gaps = np.diff(flat, prepend=-1) - 1
    low_bits, gap_bytes = _rice(gaps, items)
    if gap_bytes < -(-items // 8):
        return GAPS, _put_gaps(gaps, low_bits)
    mask = np.zeros(items, np.bool_)
    mask[flat] = True
    return BITMAP, [np.packbits(mask)]


def take_places(form: int, reader: ByteReader, spec: ArraySpec) -> Integers:
    """Reads the sorted flat positions of a form. Raises a ``PacketError``, also for more of them than ``spec`` allows."""
    most = most_entries(spec)
    if form == GAPS:
        return _take_gaps(reader, spec, most)
    flat = _ones(reader.take(-(-spec.items // 8)))
    _check_count(len(flat), most, spec)
    if len(flat) and flat[-1] >= spec.items:
        raise CorruptPacket(f"{spec.name!r} has entries beyond its end")
    return flat


def _rice(gaps: Integers, items: int) -> tuple[int, int]:
    """The number of remainder bits that takes the fewest bytes, and these bytes."""
    count = len(gaps)
    if not count:
        return 0, _GAPS_HEAD_BYTES
    middle = max(int((items - count) / count * 0.7), 1).bit_length() - 1
    sizes = {
        bits: -(-(count + int((gaps >> bits).sum())) // 8) - (-count * bits // 8)
        for bits in range(max(middle - 1, 0), middle + 2)
    }
    best = min(sizes, key=lambda bits: sizes[bits])
    return best, _GAPS_HEAD_BYTES + sizes[best]


def _put_gaps(gaps: Integers, low_bits: int) -> list[Array]:
    quotients = gaps >> low_bits
    ends = np.cumsum(quotients + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.bool_)
    unary[ends - 1] = True
    packed = np.packbits(unary)
    planes = [(gaps >> bit & 1).astype(np.bool_) for bit in range(low_bits)]
    remainders = np.packbits(np.concatenate(planes)) if planes else np.zeros(0, np.uint8)
    return [as_number(len(gaps)), np.array([low_bits], np.uint8), as_number(packed.size), packed, remainders]


def _take_gaps(reader: ByteReader, spec: ArraySpec, most: int) -> Integers:
    count, low_bits = reader.number(), int(reader.take(1)[0])
    _check_count(count, most, spec)
    if low_bits > spec.items.bit_length():  # so that sums cannot overflow
        raise CorruptPacket(f"{spec.name!r} has gaps of {low_bits} bits, more than its {spec.items} entries need")
    ends = _ones(reader.take(reader.number()))
    if len(ends) != count:
        raise CorruptPacket(f"{spec.name!r} has {len(ends)} gaps, where {count} are expected")
    steps = np.diff(ends, prepend=-1) - 1 << low_bits
    bits = np.unpackbits(reader.take(-(-count * low_bits // 8)))
    for bit, (start, end) in enumerate(pairwise(range(0, count * (low_bits + 1), count) if count else ())):
        steps |= bits[start:end].astype(np.int64) << bit
    flat: Integers = np.cumsum(steps + 1) - 1
    if count and flat[-1] >= spec.items:
        raise CorruptPacket(f"{spec.name!r} has entries beyond its end")
    return flat


def _ones(packed: Array) -> Integers:
    """The positions of the ones among packed bits."""
    ones: Integers = np.flatnonzero(np.unpackbits(packed).view(np.bool_))  # faster than of integers
    return ones


def _check_count(count: int, most: int, spec: ArraySpec) -> None:
    if count > most:
        raise CorruptPacket(f"{spec.name!r} has {count} nonzero entries, where at most {most} are expected")
