"""Symbols to bytes: what the model of a message asks of an entropy coder, and the choice between the two that there are.

A *stage* is a list of pieces that can be coded together: symbols with one table of frequencies, or with a number of bits,
which are then sent as they are, beside the coder (``Raw``). What a later stage holds may depend on an earlier one.
Both coders are stacks (last in, first out), so an encoder collects all stages and codes them from the back.
"""

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..codec import Array
from ..errors import TruncatedPacket, UnsupportedPacket
from .raw import RawReader, RawWriter, length_of, with_length
from .tables import Table

Symbols = npt.NDArray[Any]  # integers of any width, not negative
CoderName = Literal["ans", "rans"]
CODER_BYTES: dict[CoderName, int] = {"ans": 1, "rans": 2}


class Coder(Protocol):
    """Collects pieces of symbols below the length of their table, of positive frequency."""

    def put(self, pieces: list[tuple[Symbols, Table]]) -> None:
        """One stage."""
        ...

    def finish(self) -> Array:
        """All stages as bytes (uint8)."""
        ...


class Decoder(Protocol):
    """Gives the pieces back, stage after stage."""

    def take(self, pieces: list[tuple[int, Table]]) -> list[Symbols]:
        """One stage: how many symbols of which table. Raises ``TruncatedPacket`` when it can tell that bytes ran out."""
        ...

    def finish(self) -> None:
        """Raises ``CorruptPacket`` unless all is read and the coder is back where the encoder began."""
        ...


class StageWriter:
    """Collects stages and yields a stream: the coder's byte, length of the raw bits in bytes, raw bits, coded symbols."""

    def __init__(self, name: CoderName) -> None:
        """Raises ``ImportError`` for "ans" where there is no constriction."""
        self._code = CODER_BYTES[name]
        self._coder = _coder(name)
        self._raw = RawWriter()

    def put(self, *pieces: tuple[Symbols, Table | int]) -> None:
        """One stage: symbols with their table, or with the number of their bits."""
        coded = []
        for symbols, table in pieces:
            if isinstance(table, int):
                self._raw.put(symbols, table)
            else:
                coded.append((symbols, table))
        self._coder.put(coded)

    def finish(self) -> Array:
        """The stream."""
        head = np.array([self._code], np.uint8)
        return np.concatenate([head, with_length(self._raw.finish()), self._coder.finish()])


class StageReader:
    """Reads a stream of ``StageWriter``."""

    def __init__(self, stream: Array) -> None:
        """Raises a ``PacketError`` for a stream that cannot be read here."""
        if not stream.size:
            raise TruncatedPacket("an entropy-coded stream is empty")
        start, end = length_of(stream, 1)
        self._raw = RawReader(stream[start:end])
        self._decoder = _decoder(int(stream[0]), stream[end:])

    def take(self, *pieces: tuple[int, Table | int]) -> list[Symbols]:
        """One stage: how many symbols of which table, or of how many bits."""
        coded = iter(self._decoder.take([(count, table) for count, table in pieces if not isinstance(table, int)]))
        return [self._raw.take(count, table) if isinstance(table, int) else next(coded) for count, table in pieces]

    def finish(self) -> None:
        """Raises ``CorruptPacket`` unless all is read."""
        self._raw.finish()
        self._decoder.finish()


def constriction_runs() -> bool:
    """Whether constriction can be imported here."""
    try:
        import constriction  # noqa: F401
    except ImportError:
        return False
    return True


def _coder(name: CoderName) -> Coder:
    """A fresh coder; the import of constriction waits until it is wanted."""
    if name == "ans":
        from .ans import AnsEncoder

        return AnsEncoder()
    from .rans import RansEncoder

    return RansEncoder()


def _decoder(code: int, stream: Array) -> Decoder:
    """The decoder for a stream of the coder with this byte; raises a ``PacketError`` for one that cannot run here."""
    if code == CODER_BYTES["rans"]:
        from .rans import RansDecoder

        return RansDecoder(stream)
    if code != CODER_BYTES["ans"]:
        raise UnsupportedPacket(f"unknown entropy coder {code}; this receiver knows {CODER_BYTES}")
    if not constriction_runs():
        raise UnsupportedPacket("the packet was coded by constriction, which is not installed here")
    from .ans import AnsDecoder

    return AnsDecoder(stream)
