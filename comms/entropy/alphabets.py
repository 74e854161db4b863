"""A tensor's own alphabet: which values occur and how often, in a few bytes, and the values coded with it.

A value is cut into a high part, which has a frequency of its own, and low bits, which are sent as they are: a smooth
histogram of few values is not worth 255 frequencies. Frequencies are sent as levels (``tables.level_of``), each as the
difference to the one before; the sender takes the number of low bits that costs least.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CorruptPacket
from .coders import StageReader, StageWriter, Symbols
from .tables import LEVELS, TOTAL, Integers, Table, count_of, fold, level_of, normalise, peaked, unfold

SIZE = 256  # values are 0 to 255
_MAX_LOW_BITS = 7
_BYTE, _LOW_BITS = 8, 3  # bits to say what an alphabet is
_FASTER = 1.002  # more low bits are faster, and may cost so much


class Alphabet(NamedTuple):
    """Values ``first`` + [0, len(levels) << low_bits); what each high part's ``levels`` says of its frequency."""

    first: int
    low_bits: int
    levels: Integers

    @property
    def table(self) -> Table:
        """The frequencies of the high parts."""
        return normalise(count_of(self.levels))


def fit(histogram: Integers) -> tuple[Alphabet, float]:
    """The alphabet that codes values of this histogram (length ``SIZE``) in the fewest bits, and these bits."""
    present = np.flatnonzero(histogram)
    first, last, total = int(present[0]), int(present[-1]), int(histogram.sum())
    found: list[tuple[Alphabet, float]] = []
    for low_bits in range(_MAX_LOW_BITS + 1):
        size = (last - first >> low_bits) + 1
        counts = np.zeros(size << low_bits, np.int64)
        counts[: last - first + 1] = histogram[first : last + 1]
        counts = counts.reshape(size, -1).sum(1)
        alphabet = Alphabet(first, low_bits, level_of(counts))
        bits = _head_bits(alphabet) + table_bits(counts, alphabet.table) + total * low_bits
        found.append((alphabet, bits))
        if size == 1:
            break
    least = min(bits for _, bits in found)
    return next(one for one in reversed(found) if one[1] <= _FASTER * least)


def table_bits(counts: Integers, table: Table) -> float:
    """What symbols that occur so often cost under a table."""
    used = counts > 0
    return float(counts[used] @ np.log2(TOTAL / table[used]))


def put_alphabets(encoder: StageWriter, alphabets: list[Alphabet]) -> None:
    """Send what the alphabets are."""
    if not alphabets:
        return
    heads = np.array([(a.first, len(a.levels) - 1, a.low_bits) for a in alphabets], np.int64).T
    encoder.put((heads[0], _BYTE), (heads[1], _BYTE), (heads[2], _LOW_BITS))
    encoder.put((fold(np.concatenate([_steps(a.levels) for a in alphabets])), peaked(2 * LEVELS)))


def take_alphabets(decoder: StageReader, count: int) -> list[Alphabet]:
    """Read what ``put_alphabets`` sent. Raises ``CorruptPacket`` for frequencies that no sender has."""
    if not count:
        return []
    firsts, sizes, low_bits = decoder.take((count, _BYTE), (count, _BYTE), (count, _LOW_BITS))
    (steps,) = decoder.take((int(sizes.sum()) + count, peaked(2 * LEVELS)))
    alphabets, start = [], 0
    for first, size, bits in zip(firsts.tolist(), sizes.tolist(), low_bits.tolist(), strict=True):
        levels = np.cumsum(unfold(steps[start : start + size + 1]))
        start += size + 1
        if levels.min() < 0 or levels.max() >= LEVELS or not levels.any():
            raise CorruptPacket("an entropy-coded stream has a table of impossible frequencies")
        alphabets.append(Alphabet(first, bits, levels))
    return alphabets


def pieces_of(values: Symbols, alphabet: Alphabet) -> list[tuple[Symbols, Table | int]]:
    """Values as pieces of a stage: high parts, then low bits where there are any."""
    offsets = values - values.dtype.type(alphabet.first) if alphabet.first else values
    if not alphabet.low_bits:
        return [(offsets, alphabet.table)]
    low = offsets & ((1 << alphabet.low_bits) - 1)
    return [(offsets >> alphabet.low_bits, alphabet.table), (low, alphabet.low_bits)]


def wants_of(count: int, alphabet: Alphabet) -> list[tuple[int, Table | int]]:
    """What to take for ``count`` values."""
    high: tuple[int, Table | int] = (count, alphabet.table)
    return [high, (count, alphabet.low_bits)] if alphabet.low_bits else [high]


def values_of(parts: list[Symbols], alphabet: Alphabet) -> Symbols:
    """Values again (uint8), from what was taken. Raises ``CorruptPacket`` for one above 255."""
    values: Symbols = parts[0].astype(np.int64 if _overlaps(alphabet) else np.uint8)
    if alphabet.low_bits:
        values <<= alphabet.low_bits
        values |= parts[1]
    values += alphabet.first
    if _overlaps(alphabet) and len(values) and values.max() >= SIZE:
        raise CorruptPacket("an entropy-coded stream holds a value above 255")
    return values.astype(np.uint8, copy=False)


def _overlaps(alphabet: Alphabet) -> bool:
    """Whether the last high part reaches beyond 255, where no sender's values are."""
    return alphabet.first + (len(alphabet.levels) << alphabet.low_bits) > SIZE


def _head_bits(alphabet: Alphabet) -> float:
    """What it costs to say what the alphabet is."""
    return 19 + float(_bits_of_steps()[fold(_steps(alphabet.levels))].sum())


def _steps(levels: Integers) -> Integers:
    """Each level's difference to the one before, the first one's to 0."""
    steps = levels.copy()
    steps[1:] -= levels[:-1]
    return steps


@lru_cache(maxsize=1)
def _bits_of_steps() -> npt.NDArray[np.float64]:
    """What each folded step costs."""
    bits: npt.NDArray[np.float64] = np.log2(TOTAL / peaked(2 * LEVELS))
    return bits
