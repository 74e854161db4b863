"""The sparse codec: lossless, each tensor in the form that takes the fewest bytes, for tensors of any type with many zeros.

A tensor is sent dense, or split into the places of its nonzero entries, a bitmap or gaps (``places``), and their values. Each
of these may be entropy coded: places by the density of rows, columns and cells; of the values those bytes that gain from it
(entries that a top-k keeps have few exponents, so the highest byte of a float carries three to four bits; rounded values have
lowest bytes that repeat); a tensor of one-byte symbols as a whole.

What is entropy coded of all tensors goes into two streams: a stream of its own would cost each tensor a head and, with the
portable coder, a thousand steps. Dense, bitmap and gaps are counted exactly, entropy coding by its cost under the tables that
it sends. Then each stream is counted, and left out if it takes no fewer bytes than what it stands for.

Zero is the bit pattern 0: minus zero and NaN are entries like any other, and every bit is restored.

Bytes of ``#sparse``: for each tensor its form (1), and flags of the bytes of a value that are entropy coded, lowest byte first
(1); a stream of masks and symbols, those of the tensors of form ``CODED``; the places of the others; a stream of bytes of
values; all other values, plane by plane where there is a flag. A stream is preceded by its size (4).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..codec import NO_CONTEXT, Array, Arrays, ArraySpec, Context
from ..entropy import stream
from ..entropy.bounds import most_entries
from ..entropy.codec import CODED as STREAM
from ..entropy.codec import Entropy
from ..entropy.coders import CoderName, SymbolWriter, constriction_runs
from ..entropy.tables import Integers
from ..errors import CorruptPacket
from ..stages import check_fixed
from .places import ByteReader, as_number, take_places
from .sparse_parts import ALL, CODED, MAX_PLANES, Parts, as_bits, is_entry, split

SPARSE = "#sparse"
_HEAD_BYTES = 2
_STREAMS_BYTES = 8  # sizes of two streams


@dataclass(frozen=True)
class Sparse:
    """Codes the arrays without a "#" in their name as one array; passes all others on.

    ``coder``: the entropy coder, as in ``Entropy``: "auto" is "ans" if the sender has constriction, which a receiver then needs
    too, else "rans", which runs anywhere. "none" leaves entropy coding out, which is faster still.
    """

    coder: Literal["auto", "rans", "ans", "none"] = "auto"

    def __post_init__(self) -> None:
        """Checks the coder."""
        if self.coder not in ("auto", "rans", "ans", "none"):
            raise ValueError(f"coder is {self.coder!r}; it must be auto, rans, ans or none")
        if self.coder == "ans":
            Entropy("ans")  # raises ValueError without constriction

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The arrays that pass, then a flat array of bytes, bounded by each tensor's dense values, or bitmap and values."""
        coded = [spec for spec in expected if _is_coded(spec.name)]
        check_fixed(coded, by="sparse")
        if not coded:
            return expected
        bound = _STREAMS_BYTES + sum(_bound(spec) for spec in coded)
        passed = (spec for spec in expected if not _is_coded(spec.name))
        return (*passed, ArraySpec(SPARSE, (bound,), "|u1", exact=False))

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Codes all arrays. Lossless."""
        automatic: CoderName = "ans" if constriction_runs() else "rans"
        coder = None if self.coder == "none" else automatic if self.coder == "auto" else self.coder
        parts = [split(array, entropy=coder is not None) for name, array in tensors.items() if _is_coded(name)]
        if not parts:
            return tensors, tensors
        return {n: a for n, a in tensors.items() if not _is_coded(n)} | {SPARSE: _joined(parts, coder)}, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Decodes all arrays, or raises a ``PacketError``.

        Allocates, whatever the packet holds, at most what ``Entropy.decode`` does for each byte of a tensor's type.
        """
        coded = [spec for spec in expected if _is_coded(spec.name)]
        if not coded:
            return arrays
        decoded = dict(zip((spec.name for spec in coded), _decoded(arrays[SPARSE], coded), strict=True))
        return {spec.name: decoded[spec.name] if spec.name in decoded else arrays[spec.name] for spec in expected}


def _is_coded(name: str) -> bool:
    return "#" not in name


def _bound(spec: ArraySpec) -> int:
    """The largest number of bytes of an array."""
    width = np.dtype(spec.dtype).itemsize
    return _HEAD_BYTES + min(spec.num_bytes, -(-spec.items // 8) + most_entries(spec) * width)


def _joined(tensors: Sequence[Parts], coder: CoderName | None) -> Array:
    """The bytes of all tensors. A stream that takes no fewer bytes than what it stands for is left out."""
    symbols = values = np.zeros(0, np.uint8)
    coded = [parts for parts in tensors if parts.coded is not None]
    if coder is not None and coded:
        writer = SymbolWriter(coder)
        stream.put(writer, [parts.coded for parts in coded], None)
        symbols = writer.finish()
        if symbols.size >= sum(parts.replaced_bytes for parts in coded):
            symbols = symbols[:0]
            tensors = [replace(parts, coded=None) for parts in tensors]
    planes = [np.ascontiguousarray(parts.values[:, number]) for parts in tensors for number in parts.planes]
    if coder is not None and planes:
        named = {str(number): plane for number, plane in enumerate(planes)}
        values = Entropy(coder).encode(named, context=NO_CONTEXT)[0][STREAM]
        if values.size >= sum(map(len, planes)):
            values = values[:0]
            tensors = [replace(parts, planes=()) for parts in tensors]
    heads, places, others = [], list[Array](), list[Array]()
    for parts in tensors:
        heads += [parts.form if parts.coded is None else CODED, sum(1 << number for number in parts.planes)]
        places += parts.places if parts.coded is None else []
        others += parts.sent_values
    head = np.array(heads, np.uint8)
    return np.concatenate([head, as_number(symbols.size), symbols, *places, as_number(values.size), values, *others])


def _decoded(data: Array, specs: list[ArraySpec]) -> list[Array]:
    """The arrays of these bytes."""
    reader = ByteReader(data, SPARSE)
    forms, flags = reader.take(_HEAD_BYTES * len(specs)).reshape(-1, 2).T.tolist()
    widths = [np.dtype(spec.dtype).itemsize for spec in specs]
    for spec, width, form, flag in zip(specs, widths, forms, flags, strict=True):
        if form > CODED or (flag and (width == 1 or flag >> min(width, MAX_PLANES))):
            raise CorruptPacket(f"{spec.name!r} has form {form} with flags {flag}, which no sender writes")
    coded = [_symbols_of(spec) for spec, form in zip(specs, forms, strict=True) if form == CODED]
    symbols = dict(zip((spec.name for spec in coded), _take_stream(reader, coded), strict=True))
    places = [
        _places(form, reader, spec, symbols) if form != ALL and (form != CODED or width > 1) else None
        for spec, width, form in zip(specs, widths, forms, strict=True)
    ]  # None: all entries
    counts = [spec.items if flat is None else len(flat) for spec, flat in zip(specs, places, strict=True)]
    sizes = [count for count, flag in zip(counts, flags, strict=True) for _ in range(flag.bit_count())]
    planes = iter(_take_stream(reader, [ArraySpec(str(i), (size,), "|u1") for i, size in enumerate(sizes)]))
    found = []
    for spec, width, count, flat, form, flag in zip(specs, widths, counts, places, forms, flags, strict=True):
        if form == CODED and width == 1:
            values = symbols[spec.name].reshape(-1).view(spec.dtype)
        else:
            values = _placed(_take_values(reader, count, np.dtype(spec.dtype), flag, planes), flat, spec)
        found.append(values.reshape(spec.shape))
    reader.finish()
    return found


def _places(form: int, reader: ByteReader, spec: ArraySpec, masks: Arrays) -> Integers:
    """The positions of a tensor's nonzero entries."""
    return np.flatnonzero(masks[spec.name] != 0) if form == CODED else take_places(form, reader, spec)


def _take_values(
    reader: ByteReader, count: int, dtype: np.dtype[np.generic], flags: int, planes: Iterator[Array]
) -> Array:
    """Reads ``count`` values; those of their bytes that have a flag are the next of ``planes``."""
    if not flags:
        return reader.take(count * dtype.itemsize).copy().view(dtype)  # a copy is aligned
    rows = np.empty((count, dtype.itemsize), np.uint8)
    for number in range(dtype.itemsize):
        rows[:, number] = next(planes) if flags >> number & 1 else reader.take(count)
    return rows.reshape(-1).view(dtype)


def _placed(values: Array, flat: Integers | None, spec: ArraySpec) -> Array:
    """A flat tensor of these values at these places (None: all). Raises ``CorruptPacket`` for too many nonzero entries."""
    if flat is not None:
        found = np.zeros(spec.items, spec.dtype)
        as_bits(found)[flat] = as_bits(values)
        return found
    if spec.nonzeros is not None and np.count_nonzero(is_entry(as_bits(values))) > most_entries(spec):
        raise CorruptPacket(f"{spec.name!r} has more nonzero entries than the {spec.nonzeros} expected")
    return values


def _take_stream(reader: ByteReader, specs: list[ArraySpec]) -> list[Array]:
    """Reads a stream of symbols of these specifications; nothing for none."""
    data = reader.take(reader.number())
    if not specs:
        if data.size:
            raise CorruptPacket(f"{SPARSE!r} has a stream of {data.size} bytes that stands for nothing")
        return []
    return list(Entropy().decode({STREAM: data}, expected=tuple(specs), context=NO_CONTEXT).values())


def _symbols_of(spec: ArraySpec) -> ArraySpec:
    """The specification of what the stream holds of a tensor: its symbols, or the mask of its nonzero entries."""
    dtype = spec.dtype if spec.dtype in ("|i1", "|u1") else "|u1"
    return ArraySpec(spec.name, spec.shape, dtype, nonzeros=spec.nonzeros)
