"""Symbols to bytes: the interface that both entropy coders share, and the choice between them.

A *stage* is a list of pieces that can be coded together, each with its own table. What a later stage holds may depend on
an earlier one. Both coders are stacks (last in, first out), so an encoder collects all stages and codes them from the back.
"""

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..codecs import Array
from ..errors import UnsupportedPacket
from .tables import Table

Symbols = npt.NDArray[np.int64]
CoderName = Literal["ans", "rans"]
CODER_BYTES: dict[CoderName, int] = {"ans": 1, "rans": 2}


class Encoder(Protocol):
    """Collects stages."""

    def put(self, *pieces: tuple[Symbols, Table]) -> None:
        """One stage: symbols below the length of their table, of positive frequency."""
        ...

    def finish(self) -> Array:
        """All stages as bytes (uint8)."""
        ...


class Decoder(Protocol):
    """Gives the stages back, in the order in which they were put."""

    def take(self, *pieces: tuple[int, Table]) -> list[Symbols]:
        """One stage: how many symbols of which table. Raises ``CorruptPacket`` when the bytes run out."""
        ...

    def finish(self) -> None:
        """Raises ``CorruptPacket`` unless all is read and the coder is back where the encoder began."""
        ...


def constriction_runs() -> bool:
    """Whether constriction can be imported here."""
    try:
        import constriction  # noqa: F401
    except ImportError:
        return False
    return True


def encoder(name: CoderName) -> Encoder:
    """A fresh encoder. Raises ``ImportError`` for "ans" where there is no constriction."""
    if name == "ans":
        from .ans import AnsEncoder

        return AnsEncoder()
    from .rans import RansEncoder

    return RansEncoder()


def decoder(code: int, stream: Array) -> Decoder:
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
