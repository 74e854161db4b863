"""The entropy codec: all symbols of a chain in one stream, close to their entropy under an adaptive model.

ResFed (Song et al., arXiv 2212.05602) counts 16 bits for a gap and one or more for a symbol. Here positions are coded by the
density of their channels, signs by the bias of their row, and symbols by their histogram (``stream``).

Bytes: number of the coder, then the rest of the stream (``coders``); or 0, then the arrays as they are.
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
from .coders import CODER_BYTES, CoderName, SymbolReader, SymbolWriter, constriction_runs
from .tensors import describe, describe_plainly

CODED = "#coded"
_STORED = 0


@dataclass(frozen=True)
class Entropy:
    """Codes the int8 and uint8 arrays without a "#" in their name as one stream; passes all others on.

    ``coder``: "ans" is constriction's, "rans" the portable one; "auto" is "ans" if the sender has constriction, else "rans".
    Any receiver reads "rans". Only a receiver with constriction reads "ans", and the sender cannot know whether it has it.
    """

    coder: Literal["auto", "ans", "rans"] = "auto"

    def __post_init__(self) -> None:
        """Check the coder."""
        if self.coder not in ("auto", *CODER_BYTES):
            raise ValueError(f"coder is {self.coder!r}; it must be auto, ans or rans")
        if self.coder == "ans" and not constriction_runs():
            raise ValueError("coder is 'ans', which needs the package constriction; use auto or rans")

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The arrays that pass, then the stream. Raises ``ValueError`` for symbols that an earlier codec has compressed."""
        coded = [spec for spec in expected if is_symbols(spec.name, spec.dtype)]
        check_fixed(coded, by="entropy")
        if not coded:
            return expected
        passed = (spec for spec in expected if spec not in coded)
        return (*passed, ArraySpec(CODED, (stream_bound(coded),), "|u1", exact=False))

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Codes the symbols. Lossless."""
        symbols = {name: array for name, array in tensors.items() if is_symbols(name, array.dtype.str)}
        if not symbols:
            return tensors, tensors
        coded = self._coded([np.ascontiguousarray(array) for array in symbols.values()])
        return {name: array for name, array in tensors.items() if name not in symbols} | {CODED: coded}, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Decodes the symbols, or raises a ``PacketError``.

        Allocates, whatever the packet holds, at most 300 bytes for each nonzero entry that ``expected`` allows (``nonzeros``,
        or else items), 10 for each item, and 750,000 for each tensor.
        """
        coded = [spec for spec in expected if is_symbols(spec.name, spec.dtype)]
        if not coded:
            return arrays
        decoded = dict(zip((spec.name for spec in coded), _decoded(arrays[CODED], coded), strict=True))
        return {spec.name: decoded[spec.name] if spec.name in decoded else arrays[spec.name] for spec in expected}

    def _coded(self, symbols: list[Array]) -> Array:
        """The smallest of three streams: modelled, plain, and stored as they are."""
        name: CoderName = self.coder if self.coder != "auto" else "ans" if constriction_runs() else "rans"
        tensors, shared = describe(symbols)
        modelled = SymbolWriter(name)
        stream.put(modelled, tensors, shared)
        best = modelled.finish()
        if best.size > plain_limit([(array.size, int(np.count_nonzero(array))) for array in symbols]):
            plain = SymbolWriter(name)
            stream.put(plain, [describe_plainly(array) for array in symbols], None)
            best = min(best, plain.finish(), key=len)
        if best.size > sum(array.size for array in symbols):
            head = np.array([_STORED], np.uint8)
            best = np.concatenate([head, *(array.reshape(-1).view(np.uint8) for array in symbols)])
        return best


@dataclass(frozen=True)
class Rans(Entropy):
    """``Entropy`` with the portable coder. It has a name of its own, so that a device without constriction can list it."""

    coder: Literal["auto", "ans", "rans"] = "rans"


def is_symbols(name: str, dtype: str) -> bool:
    """Whether the codec codes an array of this name and type."""
    return dtype in ("|i1", "|u1") and "#" not in name


def _decoded(coded: Array, specs: list[ArraySpec]) -> list[Array]:
    """Decodes the arrays of a stream."""
    if not coded.size:
        raise TruncatedPacket("an entropy-coded stream is empty")
    if coded[0] == _STORED:
        arrays = _stored(coded[1:], specs)
    else:
        reader = SymbolReader(coded)
        arrays = stream.take(reader, specs)
        reader.finish()
    for array, spec in zip(arrays, specs, strict=True):
        if int(np.count_nonzero(array)) > most_entries(spec):
            raise CorruptPacket(f"{spec.name!r} has more nonzero entries than the {spec.nonzeros} expected")
    return arrays


def _stored(body: Array, specs: list[ArraySpec]) -> list[Array]:
    """Arrays that were stored as they are."""
    edges = [0, *accumulate(spec.items for spec in specs)]
    if body.size != edges[-1]:
        raise MismatchedPacket(f"stored symbols take {body.size} bytes, where {edges[-1]} are expected")
    return [
        body[start:end].view(spec.dtype).reshape(spec.shape)
        for (start, end), spec in zip(pairwise(edges), specs, strict=True)
    ]
