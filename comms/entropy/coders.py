"""Symbols to bytes: the stream that the model of a message writes its symbols to, and the choice of the entropy coder.

Symbols are written in *sections*. A section is a list of pieces that are coded together, each of them symbols with a table
of frequencies, or numbers of a fixed number of bits. The latter are uniform, so they are stored as they are (raw bits): a
coder would take time and save nothing. The pieces of a section may depend on the contents of earlier sections.

Both entropy coders are stacks (last in, first out), so an encoder collects all sections and codes them from the last symbol
to the first.

Bytes of a stream: number of the coder (1); length of the raw bits in bytes (seven bits a byte, lowest first); the raw bits;
the coded symbols.
"""

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..codec import Array
from ..errors import CorruptPacket, TruncatedPacket, UnsupportedPacket
from .tables import Symbols, Table

CoderName = Literal["ans", "rans"]
CODER_BYTES: dict[CoderName, int] = {"ans": 1, "rans": 2}
_LENGTH_BYTES = 5  # of seven bits each


class Encoder(Protocol):
    """An entropy coder's encoder. Symbols must be below the length of their table, and have a positive frequency."""

    def put(self, pieces: list[tuple[Symbols, Table]]) -> None:
        """Adds a section."""
        ...

    def finish(self) -> Array:
        """Returns all sections as bytes (uint8)."""
        ...


class Decoder(Protocol):
    """An entropy coder's decoder. Returns the pieces, section by section."""

    def take(self, pieces: list[tuple[int, Table]]) -> list[Symbols]:
        """Decodes a section, given the number of symbols and the table of each piece.

        Raises ``TruncatedPacket`` if it detects that the bytes ran out.
        """
        ...

    def finish(self) -> None:
        """Raises ``CorruptPacket`` unless all bytes are read and the coder is in the encoder's initial state."""
        ...


class SymbolWriter:
    """Collects sections of symbols and returns them as a stream."""

    def __init__(self, name: CoderName) -> None:
        """``name``: the entropy coder. Raises ``ImportError`` for "ans" if constriction is not installed."""
        self._code = CODER_BYTES[name]
        self._encoder = _encoder(name)
        self._raw = _RawWriter()

    def put(self, *pieces: tuple[Symbols, Table | int]) -> None:
        """Adds a section: symbols with their table, or numbers with their number of bits."""
        coded = []
        for symbols, table in pieces:
            if isinstance(table, int):
                self._raw.put(symbols, table)
            else:
                coded.append((symbols, table))
        self._encoder.put(coded)

    def finish(self) -> Array:
        """Returns the stream."""
        head = np.array([self._code], np.uint8)
        return np.concatenate([head, _with_length(self._raw.finish()), self._encoder.finish()])


class SymbolReader:
    """Reads a stream of ``SymbolWriter``."""

    def __init__(self, stream: Array) -> None:
        """Raises a ``PacketError`` for a stream that cannot be read here."""
        if not stream.size:
            raise TruncatedPacket("an entropy-coded stream is empty")
        start, end = _raw_range(stream, 1)
        self._raw = _RawReader(stream[start:end])
        self._decoder = _decoder(int(stream[0]), stream[end:])

    def take(self, *requests: tuple[int, Table | int]) -> list[Symbols]:
        """Reads a section: for each piece, the number of symbols, and their table or their number of bits."""
        coded = iter(self._decoder.take([(count, table) for count, table in requests if not isinstance(table, int)]))
        return [self._raw.take(count, table) if isinstance(table, int) else next(coded) for count, table in requests]

    def finish(self) -> None:
        """Raises ``CorruptPacket`` unless the whole stream is read."""
        self._raw.finish()
        self._decoder.finish()


def constriction_runs() -> bool:
    """Whether the package constriction can be imported."""
    try:
        import constriction  # noqa: F401
    except ImportError:
        return False
    return True


def _encoder(name: CoderName) -> Encoder:
    """A new encoder. constriction is imported only when it is used."""
    if name == "ans":
        from .ans import AnsEncoder

        return AnsEncoder()
    from .rans import RansEncoder

    return RansEncoder()


def _decoder(code: int, stream: Array) -> Decoder:
    """The decoder for the coder of this number. Raises ``UnsupportedPacket`` if it is unknown or not installed."""
    if code == CODER_BYTES["rans"]:
        from .rans import RansDecoder

        return RansDecoder(stream)
    if code != CODER_BYTES["ans"]:
        raise UnsupportedPacket(f"unknown entropy coder {code}; this receiver knows {CODER_BYTES}")
    if not constriction_runs():
        raise UnsupportedPacket("the packet was coded by constriction, which is not installed here")
    from .ans import AnsDecoder

    return AnsDecoder(stream)


class _RawWriter:
    """Collects numbers of a fixed number of bits each."""

    def __init__(self) -> None:
        """Starts empty."""
        self._planes: list[Array] = []

    def put(self, numbers: npt.NDArray[Any], bits: int) -> None:
        """Adds the lowest bits of all numbers, then all second bits, and so on."""
        self._planes += [(numbers >> bit & 1).astype(np.uint8) for bit in range(bits)]

    def finish(self) -> Array:
        """Returns the bits, eight to a byte."""
        return np.packbits(np.concatenate(self._planes)) if self._planes else np.zeros(0, np.uint8)


class _RawReader:
    """Reads the bits of a ``_RawWriter``."""

    def __init__(self, data: Array) -> None:
        """Allocates eight bytes for each byte of ``data``."""
        self._bits = np.unpackbits(data)
        self._at = 0

    def take(self, count: int, bits: int) -> npt.NDArray[Any]:
        """Reads ``count`` numbers: uint8 up to 8 bits, else int64. Raises ``TruncatedPacket``."""
        end = self._at + count * bits
        if end > len(self._bits):
            raise TruncatedPacket("an entropy-coded stream has fewer raw bits than it needs")
        numbers: npt.NDArray[Any] = np.zeros(count, np.uint8 if bits <= 8 else np.int64)
        for bit in range(bits):
            start = self._at + bit * count
            numbers |= self._bits[start : start + count].astype(numbers.dtype) << bit
        self._at = end
        return numbers

    def finish(self) -> None:
        """Raises ``CorruptPacket`` unless all that is left is padding: fewer than eight bits, all zero."""
        rest = self._bits[self._at :]
        if len(rest) >= 8 or rest.any():
            raise CorruptPacket("an entropy-coded stream has more raw bits than it needs")


def _with_length(data: Array) -> Array:
    """The number of bytes, seven bits a byte, lowest first, then the bytes."""
    size, head = data.size, []
    while size >= 128:
        head.append(size & 127 | 128)
        size >>= 7
    return np.concatenate([np.array([*head, size], np.uint8), data])


def _raw_range(stream: Array, at: int) -> tuple[int, int]:
    """Start and end of the raw bits whose length is stored at ``at``. Raises ``TruncatedPacket``."""
    size = 0
    for place in range(_LENGTH_BYTES):
        if at + place >= stream.size:
            break
        byte = int(stream[at + place])
        size |= (byte & 127) << 7 * place
        if byte < 128:
            start = at + place + 1
            if start + size > stream.size:
                break
            return start, start + size
    raise TruncatedPacket("an entropy-coded stream is shorter than its raw bits")
