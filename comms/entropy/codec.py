"""The entropy codec: all symbols of a chain in one stream, close to what an adaptive model says they must cost.

ResFed (Song et al., arXiv 2212.05602) counts 16 bits for a gap, one or more for a symbol. Here positions cost what the
density of their channels says, signs what their row's bias says, and symbols what their histogram says (``stream``).

Bytes: which coder made the stream (0: the arrays follow as they are), then what ``coders`` says.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np

from ..codec import Array, Arrays, ArraySpec, Context
from ..errors import CorruptPacket, MismatchedPacket, TruncatedPacket
from ..stages import check_fixed
from . import stream
from .bounds import most_entries, plain_limit, stream_bound
from .coders import CODER_BYTES, CoderName, StageReader, StageWriter, constriction_runs
from .tensors import look, plainly

CODED = "#coded"
_STORED = 0


@dataclass(frozen=True)
class Entropy:
    """Codes the int8 and uint8 arrays without a "#" in their name as one; others pass.

    ``coder``: "ans" is constriction's, "rans" the portable one, "auto" the first that runs at the sender. A receiver always
    reads "rans", and "ans" only where it has constriction too: that both ends have it is for the user to know.
    """

    coder: Literal["auto", "ans", "rans"] = "auto"

    def __post_init__(self) -> None:
        """Check the coder."""
        if self.coder not in ("auto", *CODER_BYTES):
            raise ValueError(f"coder is {self.coder!r}; it must be auto, ans or rans")
        if self.coder == "ans" and not constriction_runs():
            raise ValueError("coder is 'ans', which needs the package constriction; use auto or rans")

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """What passes, then the stream. Raises ``ValueError`` for symbols that another codec has compressed before."""
        mine = [spec for spec in expected if is_symbols(spec.name, spec.dtype)]
        check_fixed(mine, by="entropy")
        if not mine:
            return expected
        return (*(s for s in expected if s not in mine), ArraySpec(CODED, (stream_bound(mine),), "|u1", exact=False))

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Code; nothing is lost."""
        mine = {name: array for name, array in tensors.items() if is_symbols(name, array.dtype.str)}
        if not mine:
            return tensors, tensors
        coded = self._coded([np.ascontiguousarray(array) for array in mine.values()])
        return {name: array for name, array in tensors.items() if name not in mine} | {CODED: coded}, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """The symbols again, or a ``PacketError``.

        Allocates, whatever the packet holds, at most 300 bytes for each entry that ``expected`` allows (``nonzeros``, or else
        items), 10 for each item, and 750,000 for each tensor.
        """
        mine = [spec for spec in expected if is_symbols(spec.name, spec.dtype)]
        if not mine:
            return arrays
        found = dict(zip((spec.name for spec in mine), _decoded(arrays[CODED], mine), strict=True))
        return {spec.name: found[spec.name] if spec.name in found else arrays[spec.name] for spec in expected}

    def _coded(self, symbols: list[Array]) -> Array:
        """The smallest of: modelled, plain, stored."""
        name: CoderName = self.coder if self.coder != "auto" else "ans" if constriction_runs() else "rans"
        tensors, shared = look(symbols)
        modelled = StageWriter(name)
        stream.put(modelled, tensors, shared)
        best = modelled.finish()
        if best.size > plain_limit([(array.size, int(np.count_nonzero(array))) for array in symbols]):
            plain = StageWriter(name)
            stream.put(plain, [plainly(array) for array in symbols], None)
            best = min(best, plain.finish(), key=len)
        if best.size > sum(array.size for array in symbols):
            head = np.array([_STORED], np.uint8)
            best = np.concatenate([head, *(array.reshape(-1).view(np.uint8) for array in symbols)])
        return best


@dataclass(frozen=True)
class Rans(Entropy):
    """The same by the portable coder, under a name of its own for receivers that have no constriction."""

    coder: Literal["auto", "ans", "rans"] = "rans"


def is_symbols(name: str, dtype: str) -> bool:
    """Whether the codec takes such an array."""
    return dtype in ("|i1", "|u1") and "#" not in name


def _decoded(coded: Array, specs: list[ArraySpec]) -> list[Array]:
    """The arrays of a stream."""
    if not coded.size:
        raise TruncatedPacket("an entropy-coded stream is empty")
    if coded[0] == _STORED:
        found = _stored(coded[1:], specs)
    else:
        source = StageReader(coded)
        found = stream.take(source, specs)
        source.finish()
    for array, spec in zip(found, specs, strict=True):
        if int(np.count_nonzero(array)) > most_entries(spec):
            raise CorruptPacket(f"{spec.name!r} has more entries than the {spec.nonzeros} expected")
    return found


def _stored(body: Array, specs: list[ArraySpec]) -> list[Array]:
    """Arrays that were sent as they are."""
    edges = [0, *accumulate(spec.items for spec in specs)]
    if body.size != edges[-1]:
        raise MismatchedPacket(f"stored symbols take {body.size} bytes, where {edges[-1]} are expected")
    return [
        body[start:end].view(spec.dtype).reshape(spec.shape)
        for (start, end), spec in zip(pairwise(edges), specs, strict=True)
    ]
