"""The sparse codec: lossless, each tensor in the form that takes the fewest bytes, for tensors of any type with many zeros.

Each tensor is sent dense, or split into the places of its nonzero entries (a bitmap, gaps, or entropy coded: ``places``) and
their values. Values are sent as they are, or with some of their bytes entropy coded: entries that a top-k keeps have few
exponents, so the highest byte of a float carries three to four bits, and rounded values have lowest bytes that repeat. A tensor
of one-byte symbols may also be the stream of the entropy codec. The bytes of the forms are counted exactly, and the smallest is
sent; estimates only skip forms that would gain nothing.

Zero is the bit pattern 0: minus zero and NaN are entries like any other, and every bit is restored.

Bytes of an array: form of the places (1); flags of the bytes of a value that are entropy coded, lowest byte first (1); places;
values. Of the values: if there is a flag, bytes of the stream (4), the stream, then the other bytes of all values, plane by
plane; without a flag, the values as they are.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..codec import NO_CONTEXT, Array, Arrays, ArraySpec, Context
from ..entropy.bounds import most_entries
from ..entropy.codec import CODED as STREAM
from ..entropy.codec import Entropy
from ..entropy.coders import CoderName, constriction_runs
from ..errors import CorruptPacket
from ..stages import check_fixed
from .places import ALL, CODED, ByteReader, as_number, put_places, take_places

_HEAD_BYTES = 2
_MAX_PLANES = 8  # flags are one byte
_WORTH = 0.97  # a byte of the values is entropy coded if its entropy is at most this share of it
_FEWEST = 64  # values; with fewer, the tables of an entropy coder cost more than they save


@dataclass(frozen=True)
class Sparse:
    """Codes every array without a "#" in its name; passes all others on.

    ``coder``: the entropy coder, as in ``Entropy``: "auto" is "ans" if the sender has constriction, which a receiver then needs
    too, else "rans", which runs anywhere and is many times slower on small tensors. "none" leaves entropy coding out.
    """

    coder: Literal["auto", "rans", "ans", "none"] = "auto"

    def __post_init__(self) -> None:
        """Checks the coder."""
        if self.coder not in ("auto", "rans", "ans", "none"):
            raise ValueError(f"coder is {self.coder!r}; it must be auto, rans, ans or none")
        if self.coder == "ans":
            Entropy("ans")  # raises ValueError without constriction

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """A flat array of bytes in place of each array, bounded by the smaller of all values, and bitmap and values."""
        check_fixed((spec for spec in expected if _is_coded(spec.name)), by="sparse")
        return tuple(
            ArraySpec(spec.name, (_bound(spec),), "|u1", exact=False, role=spec.role) if _is_coded(spec.name) else spec
            for spec in expected
        )

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Codes each array. Lossless."""
        automatic: CoderName = "ans" if constriction_runs() else "rans"
        coder = None if self.coder == "none" else automatic if self.coder == "auto" else self.coder
        return {n: _coded(array, coder) if _is_coded(n) else array for n, array in tensors.items()}, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Decodes each array, or raises a ``PacketError``.

        Allocates, whatever the packet holds, at most what ``Entropy.decode`` does for each byte of a tensor's type.
        """
        return {s.name: _decoded(arrays[s.name], s) if _is_coded(s.name) else arrays[s.name] for s in expected}


def _is_coded(name: str) -> bool:
    return "#" not in name


def _bound(spec: ArraySpec) -> int:
    """The largest number of bytes of an array."""
    width = np.dtype(spec.dtype).itemsize
    return _HEAD_BYTES + min(spec.num_bytes, -(-spec.items // 8) + most_entries(spec) * width)


def _coded(array: Array, coder: CoderName | None) -> Array:
    """The bytes of an array in its smallest form."""
    values = _as_bits(np.ascontiguousarray(array).reshape(-1))
    is_nonzero = values != 0 if values.ndim == 1 else values.any(1)
    flat = np.flatnonzero(is_nonzero)
    one_byte = array.dtype.itemsize == 1
    forms = []
    if len(flat) < len(values):
        form, places = put_places(flat, array.shape, len(values), None if one_byte else coder)
        forms.append(_joined(form, places, values[flat], coder))
    if 2 * len(flat) >= len(values):  # with more zeros, a bitmap and the values are never larger
        forms.append(_joined(ALL, [], values, coder))
    if one_byte and coder is not None and len(flat):
        stream = Entropy(coder).encode({"": _as_symbols(array)}, context=NO_CONTEXT)[0][STREAM]
        forms.append(np.concatenate([np.array([CODED, 0], np.uint8), as_number(stream.size), stream]))
    return min(forms, key=len)


def _joined(form: int, places: list[Array], values: Array, coder: CoderName | None) -> Array:
    """The bytes of one form."""
    flags, own = _put_values(values, coder)
    return np.concatenate([np.array([form, flags], np.uint8), *places, *own])


def _decoded(coded: Array, spec: ArraySpec) -> Array:
    """The array of these bytes."""
    reader = ByteReader(coded, spec.name)
    form, flags = reader.take(_HEAD_BYTES).tolist()
    dtype = np.dtype(spec.dtype)
    if form > CODED or flags >> min(dtype.itemsize, _MAX_PLANES) or (flags and dtype.itemsize == 1):
        raise CorruptPacket(f"{spec.name!r} has form {form} with flags {flags}, which no sender writes")
    if form == CODED and dtype.itemsize == 1:
        found = _take_stream(reader, (_symbol_spec(spec),))[0].view(dtype)
    elif form == ALL:
        found = _take_values(reader, spec.items, dtype, flags)
        if spec.nonzeros is not None and np.count_nonzero(_as_bits(found)) > most_entries(spec):
            raise CorruptPacket(f"{spec.name!r} has more nonzero entries than the {spec.nonzeros} expected")
    else:
        flat = take_places(form, reader, spec)
        values = _take_values(reader, len(flat), dtype, flags)
        found = np.zeros(spec.items, dtype)
        _as_bits(found)[flat] = _as_bits(values)
    reader.finish()
    return found.reshape(spec.shape)


def _put_values(values: Array, coder: CoderName | None) -> tuple[int, list[Array]]:
    """Flags of the planes that are entropy coded, and the bytes of values, in pieces."""
    raw = values.reshape(-1).view(np.uint8)
    count = len(values)
    width = raw.size // count if count else 0
    if coder is None or count < _FEWEST or not 2 <= width <= _MAX_PLANES:
        return 0, [raw]
    planes = [np.ascontiguousarray(plane) for plane in raw.reshape(count, width).T]
    chosen = [number for number, plane in enumerate(planes) if _entropy_bits(plane) < _WORTH * 8 * count]
    if not chosen:
        return 0, [raw]
    stream = Entropy(coder).encode({str(n): planes[n] for n in chosen}, context=NO_CONTEXT)[0][STREAM]
    if stream.size + 4 >= len(chosen) * count:
        return 0, [raw]
    others = [plane for number, plane in enumerate(planes) if number not in chosen]
    return sum(1 << number for number in chosen), [as_number(stream.size), stream, *others]


def _take_values(reader: ByteReader, count: int, dtype: np.dtype[np.generic], flags: int) -> Array:
    """Reads ``count`` values."""
    if not flags:
        return reader.take(count * dtype.itemsize).copy().view(dtype)  # a copy is aligned
    chosen = [number for number in range(dtype.itemsize) if flags >> number & 1]
    planes = np.empty((count, dtype.itemsize), np.uint8)
    specs = tuple(ArraySpec(str(number), (count,), "|u1") for number in chosen)
    for number, plane in zip(chosen, _take_stream(reader, specs), strict=True):
        planes[:, number] = plane
    for number in range(dtype.itemsize):
        if number not in chosen:
            planes[:, number] = reader.take(count)
    return planes.reshape(-1).view(dtype)


def _take_stream(reader: ByteReader, specs: tuple[ArraySpec, ...]) -> list[Array]:
    """Reads symbols of these specifications."""
    stream = reader.take(reader.number())
    return list(Entropy().decode({STREAM: stream}, expected=specs, context=NO_CONTEXT).values())


def _as_bits(flat: Array) -> Array:
    """A flat array as unsigned integers of the same width; as rows of bytes if there are none."""
    width = flat.dtype.itemsize
    return flat.view(f"u{width}") if width in (1, 2, 4, 8) else flat.view(np.uint8).reshape(-1, width)


def _as_symbols(array: Array) -> Array:
    """An array of one-byte items as symbols."""
    return array if array.dtype.str in ("|i1", "|u1") else array.view(np.uint8)


def _symbol_spec(spec: ArraySpec) -> ArraySpec:
    """The specification of ``_as_symbols``, under the name by which ``_coded`` calls it."""
    dtype = spec.dtype if spec.dtype in ("|i1", "|u1") else "|u1"
    return ArraySpec("", spec.shape, dtype, nonzeros=spec.nonzeros)


def _entropy_bits(plane: Array) -> float:
    """Entropy of the histogram of a plane, in bits for all of its bytes."""
    counts = np.bincount(plane, minlength=256)
    counts = counts[counts > 0]
    return float(counts @ np.log2(plane.size / counts))
