"""The fast entropy coder: asymmetric numeral systems by the package constriction (Bamler, 2022, arXiv 2201.01741)."""

import constriction
import numpy as np

from ..codec import Array
from ..errors import CorruptPacket
from .tables import Symbols, Table

_stack = constriction.stream.stack
_model = constriction.stream.model
_WORD_BYTES = 4


class AnsEncoder:
    """Collects sections for constriction's coder."""

    def __init__(self) -> None:
        """Starts empty."""
        self._pieces: list[tuple[Symbols, Table]] = []

    def put(self, pieces: list[tuple[Symbols, Table]]) -> None:
        """Adds a section."""
        self._pieces += pieces

    def finish(self) -> Array:
        """Returns the coder's words, little-endian, without the zero bytes at the end."""
        coder = _stack.AnsCoder()
        for symbols, table in reversed(self._pieces):
            present = np.flatnonzero(table)
            if len(symbols) and len(present) > 1:
                if len(present) < len(table):
                    ranks = np.zeros(len(table), np.int64)
                    ranks[present] = np.arange(len(present))
                    symbols = ranks[symbols]
                coder.encode_reverse(symbols.astype(np.int32), _model_of(table[present]))
        words = coder.get_compressed().astype("<u4")
        data: Array = words.view(np.uint8)
        return data[: data.size - _trailing_zeros(data)]


class AnsDecoder:
    """Reads a stream of ``AnsEncoder``."""

    def __init__(self, stream: Array) -> None:
        """Raises ``CorruptPacket`` for bytes that cannot be an encoder's words."""
        if stream.size and not stream[-1]:
            raise CorruptPacket("an entropy-coded stream ends in a zero byte")
        words = np.zeros(-(-stream.size // _WORD_BYTES) * _WORD_BYTES, np.uint8)
        words[: stream.size] = stream
        self._coder = _stack.AnsCoder(words.view("<u4").astype(np.uint32))

    def take(self, pieces: list[tuple[int, Table]]) -> list[Symbols]:
        """Decodes a section. A coder that has run out of bytes still yields symbols; ``finish`` detects it."""
        return [self._decode(count, table) for count, table in pieces]

    def finish(self) -> None:
        """Raises ``CorruptPacket`` unless the coder is empty, as the encoder's was at the start."""
        if not self._coder.is_empty():
            raise CorruptPacket("an entropy-coded stream does not end where its symbols do")

    def _decode(self, count: int, table: Table) -> Symbols:
        """One piece."""
        present = np.flatnonzero(table)
        if not count or len(present) == 1:
            return np.full(count, present[0], np.int64)
        symbols: Symbols = self._coder.decode(_model_of(table[present]), count)
        return symbols if len(present) == len(table) else present[symbols]


def _model_of(table: Table) -> object:
    """constriction's model of positive frequencies. (It would give a symbol of frequency 0 a probability too.)"""
    return _model.Categorical(table.astype(np.float64), perfect=False)


def _trailing_zeros(data: Array) -> int:
    """Number of zero bytes at the end: at most three, since the coder's last word is not 0."""
    return next((n for n in range(data.size) if data[data.size - 1 - n]), data.size)
