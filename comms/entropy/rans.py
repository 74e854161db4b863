"""The portable entropy coder: interleaved range asymmetric numeral systems in numpy.

The coder is by Duda (2013, arXiv 1311.2540), the interleaving by Giesen (2014, arXiv 1402.3392): each lane is a coder of its
own, symbol i of a section belongs to lane i modulo the number of lanes, and all lanes take a step at once. Between steps a
state is in [2^24, 2^40), well above the tables' 2^14; it is renormalised by 16 bits. A lane costs three bytes, so the number
of lanes grows with the number of symbols. The receiver enforces that number, since few lanes for many symbols would cost it
a Python step for each symbol.

Bytes: number of lanes (2), states (5 each), 16-bit words in the order in which the decoder reads them; little-endian.
"""

import numpy as np

from ..codec import Array
from ..errors import CorruptPacket, TruncatedPacket
from .tables import PRECISION_BITS, TOTAL, Symbols, Table

_LOW_BITS, _WORD_BITS = 24, 16
_LOW = 1 << _LOW_BITS
_SYMBOLS_PER_LANE = 1024
_MAX_LANES = (1 << 16) - 1
_STATE_BYTES = 5
_SYMBOLS_PER_SLOT = 1 / 8  # with fewer symbols, a binary search is faster than building the lookup table


class RansEncoder:
    """Collects sections for interleaved rANS."""

    def __init__(self) -> None:
        """Starts empty."""
        self._sections: list[tuple[Array, Array]] = []

    def put(self, pieces: list[tuple[Symbols, Table]]) -> None:
        """Adds a section: frequency and cumulative frequency of each symbol."""
        used = [(symbols, table) for symbols, table in pieces if len(symbols) and len(table) > 1]
        if used:
            frequencies = np.concatenate([table[symbols] for symbols, table in used])
            starts = np.concatenate([(np.cumsum(table) - table)[symbols] for symbols, table in used])
            self._sections.append((frequencies.astype(np.uint64), starts.astype(np.uint64)))

    def finish(self) -> Array:
        """Codes all sections from the last symbol to the first, and returns the bytes."""
        num_symbols = sum(len(frequencies) for frequencies, _ in self._sections)
        lanes = _lanes_for(num_symbols)
        states = np.full(lanes, _LOW, np.uint64)
        words = []
        for frequencies, starts in reversed(self._sections):
            # A state at or above its limit would leave the range: its low word is written first.
            limits = frequencies << np.uint64(_LOW_BITS + _WORD_BITS - PRECISION_BITS)
            for at in reversed(range(0, len(frequencies), lanes)):
                frequency = frequencies[at : at + lanes]
                state = states[: len(frequency)]
                full = state >= limits[at : at + lanes]
                words.append(state[full].astype("<u2"))
                state >>= full.astype(np.uint64) << np.uint64(4)
                quotient = state // frequency
                np.add(state, quotient * (np.uint64(TOTAL) - frequency) + starts[at : at + lanes], out=state)
        head = np.array([lanes], "<u2").view(np.uint8)
        bytes_of_states = states.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :_STATE_BYTES]
        return np.concatenate([head, bytes_of_states.reshape(-1), *(w.view(np.uint8) for w in reversed(words))])


class RansDecoder:
    """Reads a stream of ``RansEncoder``."""

    def __init__(self, stream: Array) -> None:
        """Raises ``TruncatedPacket`` or ``CorruptPacket`` for a stream whose size does not fit its number of lanes."""
        lanes = int(stream[0]) + 256 * int(stream[1]) if stream.size >= 2 else 0
        end = 2 + lanes * _STATE_BYTES
        if not lanes or stream.size < end:
            raise TruncatedPacket(f"an entropy-coded stream of {stream.size} bytes is too short for {lanes} lanes")
        if (stream.size - end) % 2:
            raise CorruptPacket(f"an entropy-coded stream of {stream.size} bytes ends within a word")
        states = np.zeros((lanes, 8), np.uint8)
        states[:, :_STATE_BYTES] = stream[2:end].reshape(lanes, _STATE_BYTES)
        self._states = states.reshape(-1).view("<u8").astype(np.uint64)
        self._words = np.frombuffer(stream[end:].tobytes(), "<u2").astype(np.uint64)
        self._next = self._symbols = 0

    def take(self, pieces: list[tuple[int, Table]]) -> list[Symbols]:
        """Decodes a section. Raises ``CorruptPacket`` if the stream has fewer lanes than its symbols require."""
        counts = [count if len(table) > 1 else 0 for count, table in pieces]
        self._symbols += sum(counts)
        if len(self._states) < _lanes_for(self._symbols):
            raise CorruptPacket(
                f"an entropy-coded stream of {self._symbols} symbols or more has {len(self._states)} lanes, where "
                f"{_lanes_for(self._symbols)} are expected"
            )
        tables = [table for (_, table), count in zip(pieces, counts, strict=True) if count]
        decoded = self._decode([count for count in counts if count], tables) if tables else np.zeros(0, np.int64)
        ends = np.cumsum(counts)
        return [
            decoded[end - count : end] if count else np.zeros(requested, np.int64)
            for (requested, _), count, end in zip(pieces, counts, ends, strict=True)
        ]

    def finish(self) -> None:
        """Raises ``CorruptPacket`` unless all words are read and all lanes are in their initial state."""
        if self._next != len(self._words) or (self._states != _LOW).any():
            raise CorruptPacket("an entropy-coded stream does not end where its symbols do")

    def _decode(self, counts: list[int], tables: list[Table]) -> Symbols:
        """Decodes all pieces of a section as one sequence; table t occupies the slots from t * TOTAL on."""
        frequency_of = np.concatenate(tables).astype(np.uint64)
        start_of = (np.cumsum(frequency_of) - frequency_of).astype(np.int64)
        number_of = np.concatenate([np.arange(len(table), dtype=np.int32) for table in tables])
        bases = np.repeat(np.arange(len(tables), dtype=np.int64) * TOTAL, counts)
        lookup = None
        if len(bases) > len(tables) * TOTAL * _SYMBOLS_PER_SLOT:
            lookup = np.repeat(np.arange(len(frequency_of)), frequency_of.astype(np.int64))
        entries = np.empty(len(bases), np.int32)
        lanes = len(self._states)
        for at in range(0, len(bases), lanes):
            base = bases[at : at + lanes]
            state = self._states[: len(base)]
            slot = (state & np.uint64(TOTAL - 1)).astype(np.int64) + base
            entry = lookup[slot] if lookup is not None else np.searchsorted(start_of, slot, side="right") - 1
            entries[at : at + lanes] = entry
            state >>= np.uint64(PRECISION_BITS)
            state *= frequency_of[entry]
            state += (slot - start_of[entry]).astype(np.uint64)
            low = np.flatnonzero(state < _LOW)
            words = self._words[self._next : self._next + len(low)]
            if len(words) < len(low):
                raise TruncatedPacket("an entropy-coded stream ends before its symbols do")
            self._next += len(low)
            state[low] = state[low] << np.uint64(_WORD_BITS) | words
        return number_of[entries]


def _lanes_for(symbols: int) -> int:
    """Number of lanes of an encoder for so many symbols."""
    return min(max(symbols // _SYMBOLS_PER_LANE, 1), _MAX_LANES)
