"""The alphabet of a tensor: which values occur and how often, sent in a few bytes, and the values coded with it.

A value is split into a high part, which has a frequency, and low bits, which are sent as raw bits: 255 frequencies would
cost more than they save for a smooth histogram of few values. Frequencies are sent as levels (``tables.level_of``), each as
the difference to the one before. The sender chooses the number of low bits that costs least.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CorruptPacket
from .coders import SymbolReader, SymbolWriter
from .tables import LEVELS, TOTAL, Integers, Symbols, Table, count_of, fold, level_of, normalise, peaked, unfold

SIZE = 256  # values are 0 to 255
_MAX_LOW_BITS = 7
_BYTE, _LOW_BITS = 8, 3  # bits of the fields that describe an alphabet
_FASTER = 1.002  # more low bits are faster to code; they are taken up to this factor of the least cost


class Alphabet(NamedTuple):
    """Values ``first`` + [0, len(levels) << low_bits); ``levels``: the frequency of each high part, as a level."""

    first: int
    low_bits: int
    levels: Integers

    @property
    def table(self) -> Table:
        """The table of the high parts."""
        return normalise(count_of(self.levels))


def fit(histogram: Integers) -> tuple[Alphabet, float]:
    """The alphabet that codes values of this histogram (length ``SIZE``) in the fewest bits, and the number of bits."""
    present = np.flatnonzero(histogram)
    first, last, total = int(present[0]), int(present[-1]), int(histogram.sum())
    candidates: list[tuple[Alphabet, float]] = []
    for low_bits in range(_MAX_LOW_BITS + 1):
        size = (last - first >> low_bits) + 1
        counts = np.zeros(size << low_bits, np.int64)
        counts[: last - first + 1] = histogram[first : last + 1]
        counts = counts.reshape(size, -1).sum(1)
        alphabet = Alphabet(first, low_bits, level_of(counts))
        bits = _head_bits(alphabet) + table_bits(counts, alphabet.table) + total * low_bits
        candidates.append((alphabet, bits))
        if size == 1:
            break
    least = min(bits for _, bits in candidates)
    return next(candidate for candidate in reversed(candidates) if candidate[1] <= _FASTER * least)


def table_bits(counts: Integers, table: Table) -> float:
    """Cost in bits, under a table, of symbols that occur ``counts`` times."""
    used = counts > 0
    return float(counts[used] @ np.log2(TOTAL / table[used]))


def put_alphabets(writer: SymbolWriter, alphabets: list[Alphabet]) -> None:
    """Writes alphabets."""
    if not alphabets:
        return
    heads = np.array([(a.first, len(a.levels) - 1, a.low_bits) for a in alphabets], np.int64).T
    writer.put((heads[0], _BYTE), (heads[1], _BYTE), (heads[2], _LOW_BITS))
    writer.put((fold(np.concatenate([_steps(a.levels) for a in alphabets])), peaked(2 * LEVELS)))


def take_alphabets(reader: SymbolReader, count: int) -> list[Alphabet]:
    """Reads the alphabets of ``put_alphabets``. Raises ``CorruptPacket`` for impossible frequencies."""
    if not count:
        return []
    firsts, sizes, low_bits = reader.take((count, _BYTE), (count, _BYTE), (count, _LOW_BITS))
    (steps,) = reader.take((int(sizes.sum()) + count, peaked(2 * LEVELS)))
    alphabets, start = [], 0
    for first, size, bits in zip(firsts.tolist(), sizes.tolist(), low_bits.tolist(), strict=True):
        levels = np.cumsum(unfold(steps[start : start + size + 1]))
        start += size + 1
        if levels.min() < 0 or levels.max() >= LEVELS or not levels.any():
            raise CorruptPacket("an entropy-coded stream has a table of impossible frequencies")
        alphabets.append(Alphabet(first, bits, levels))
    return alphabets


def pieces_of(values: Symbols, alphabet: Alphabet) -> list[tuple[Symbols, Table | int]]:
    """Values as pieces of a section: high parts, then low bits if there are any."""
    offsets = values - values.dtype.type(alphabet.first) if alphabet.first else values
    if not alphabet.low_bits:
        return [(offsets, alphabet.table)]
    low = offsets & ((1 << alphabet.low_bits) - 1)
    return [(offsets >> alphabet.low_bits, alphabet.table), (low, alphabet.low_bits)]


def requests_of(count: int, alphabet: Alphabet) -> list[tuple[int, Table | int]]:
    """The requests to a reader for the pieces of ``count`` values."""
    high: tuple[int, Table | int] = (count, alphabet.table)
    return [high, (count, alphabet.low_bits)] if alphabet.low_bits else [high]


def values_of(parts: list[Symbols], alphabet: Alphabet) -> Symbols:
    """The values (uint8) of the pieces ``parts``. Raises ``CorruptPacket`` for a value above 255."""
    values: Symbols = parts[0].astype(np.int64 if _overlaps(alphabet) else np.uint8)
    if alphabet.low_bits:
        values <<= alphabet.low_bits
        values |= parts[1]
    values += alphabet.first
    if _overlaps(alphabet) and len(values) and values.max() >= SIZE:
        raise CorruptPacket("an entropy-coded stream holds a value above 255")
    return values.astype(np.uint8, copy=False)


def _overlaps(alphabet: Alphabet) -> bool:
    """Whether the last high part reaches beyond 255."""
    return alphabet.first + (len(alphabet.levels) << alphabet.low_bits) > SIZE


def _head_bits(alphabet: Alphabet) -> float:
    """Cost in bits of writing an alphabet."""
    return 19 + float(_bits_of_steps()[fold(_steps(alphabet.levels))].sum())


def _steps(levels: Integers) -> Integers:
    """The difference of each level to the one before, of the first one to 0."""
    steps = levels.copy()
    steps[1:] -= levels[:-1]
    return steps


@lru_cache(maxsize=1)
def _bits_of_steps() -> npt.NDArray[np.float64]:
    """Cost in bits of each folded step."""
    bits: npt.NDArray[np.float64] = np.log2(TOTAL / peaked(2 * LEVELS))
    return bits
