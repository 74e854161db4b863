"""The entropy codec: all symbols of a chain in one stream, close to what an adaptive model says they must cost.

ResFed (Song et al., arXiv 2212.05602) counts 16 bits for a gap, one or more for a symbol. Here positions cost what the
density of their channels says, signs what their row's bias says, and symbols what their histogram says (``stream``).

Bytes: which coder made the stream (0: the arrays follow as they are), then what ``coders`` says.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..codecs import Array, Arrays, ArraySpec, Context
from ..errors import CorruptPacket, MismatchedPacket, TruncatedPacket
from . import stream
from .coders import CODER_BYTES, CoderName, StageReader, StageWriter, constriction_runs
from .tensors import look, plainly

CODED = "#coded"
_STORED = 0
_FRAME_BYTES = 64  # coder, last words, lanes of the smallest stream
_TENSOR_BYTES = 32  # description, alphabet and counts of one tensor in the plain way


@dataclass(frozen=True)
class Entropy:
    """Codes the int8 and uint8 arrays without a "#" in their name as one; others pass.

    ``coder``: "ans" is constriction's, "rans" the portable one, "auto" the first that runs here. A receiver reads both.
    """

    coder: Literal["auto", "ans", "rans"] = "auto"

    def __post_init__(self) -> None:
        """Check the coder."""
        if self.coder not in ("auto", *CODER_BYTES):
            raise ValueError(f"coder is {self.coder!r}; it must be auto, ans or rans")
        if self.coder == "ans" and not constriction_runs():
            raise ValueError("coder is 'ans', which needs the package constriction; use auto or rans")

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """What passes, then the stream."""
        mine = [spec for spec in expected if is_symbols(spec.name, spec.dtype)]
        if not mine:
            return expected
        return (*(s for s in expected if s not in mine), ArraySpec(CODED, (bound(mine),), "|u1", exact=False))

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Code; nothing is lost."""
        mine = {name: array for name, array in tensors.items() if is_symbols(name, array.dtype.str)}
        if not mine:
            return tensors, tensors
        coded = self._coded([np.ascontiguousarray(array) for array in mine.values()])
        return {name: array for name, array in tensors.items() if name not in mine} | {CODED: coded}, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """The symbols again, or a ``PacketError``. Beside them, needs memory for 200 bytes for each entry that is there."""
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
        limit = sum(_plain_bytes(array.size, int(np.count_nonzero(array))) for array in symbols)
        if best.size > limit:
            plain = StageWriter(name)
            stream.put(plain, [plainly(array) for array in symbols], None)
            best = min(best, plain.finish(), key=len)
        if best.size > sum(array.size for array in symbols):
            head = np.array([_STORED], np.uint8)
            best = np.concatenate([head, *(array.reshape(-1).view(np.uint8) for array in symbols)])
        return best


def is_symbols(name: str, dtype: str) -> bool:
    """Whether the codec takes such an array."""
    return dtype in ("|i1", "|u1") and "#" not in name


def bound(specs: list[ArraySpec]) -> int:
    """The most bytes of a stream of such arrays."""
    sizes = [_plain_bytes(s.items, s.items if s.nonzeros is None else min(s.nonzeros, s.items)) for s in specs]
    return _FRAME_BYTES + sum(sizes)


def _plain_bytes(items: int, nonzeros: int) -> int:
    """The most bytes of one tensor, coded plainly.

    An entry that is there costs log2(items / nonzeros) + 1.45 bits for its gap, at most 9 for what it is, and one for what
    tables and lanes lose.
    """
    dense = items + items // 64
    if not nonzeros:
        return 2
    bits = nonzeros * ((items // nonzeros).bit_length() + 12)
    return _TENSOR_BYTES + min(dense, bits // 8)


def _decoded(coded: Array, specs: list[ArraySpec]) -> list[Array]:
    """The arrays of a stream."""
    if not coded.size:
        raise TruncatedPacket("an entropy-coded stream is empty")
    body = coded[1:]
    if coded[0] == _STORED:
        if body.size != sum(spec.items for spec in specs):
            raise MismatchedPacket(
                f"stored symbols take {body.size} bytes, where {sum(s.items for s in specs)} are due"
            )
        edges = np.cumsum([0, *(spec.items for spec in specs)])
        return [body[a:b].view(s.dtype).reshape(s.shape) for a, b, s in zip(edges[:-1], edges[1:], specs, strict=True)]
    source = StageReader(coded)
    found = stream.take(source, [(spec.shape, spec.dtype) for spec in specs])
    source.finish()
    for array, spec in zip(found, specs, strict=True):
        if spec.nonzeros is not None and int(np.count_nonzero(array)) > spec.nonzeros:
            raise CorruptPacket(f"{spec.name!r} has more entries than the {spec.nonzeros} expected")
    return found
