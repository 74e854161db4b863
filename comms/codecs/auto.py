"""The auto codec: encodes with several lossless codecs and sends the smallest result.

Encoding takes the sum of their times, which pays on slow connections, and if the data vary between rounds. The receiver runs
only the codec that was chosen, and cannot influence the choice: by default all of them run anywhere.

Bytes of ``#auto``: number of the codec; then each array of its layout, one after another. An array of varying size is
preceded by its size in bytes (four bytes, little-endian).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..codec import Array, Arrays, ArraySpec, Codec, Context, IdentityCodec, specs_of
from ..entropy.codec import Entropy
from ..errors import CorruptPacket, TruncatedPacket, UnsupportedPacket
from ..stages import check_fixed
from .lz4_codec import Lz4

AUTO = "#auto"
Name = Literal["entropy", "rans", "lz4", "identity"]
# The numbers are part of the format.
_CODECS: dict[Name, tuple[int, Codec]] = {
    "identity": (0, IdentityCodec()),
    "lz4": (1, Lz4()),
    "entropy": (2, Entropy()),
    "rans": (3, Entropy("rans")),
}
_SIZE = np.dtype("<u4")


@dataclass(frozen=True)
class Auto:
    """Encodes all arrays together with the smallest of the codecs ``among``; of equals, the one named first.

    Name "entropy" only if both ends have constriction: a sender that has it uses it, and a receiver without it cannot read
    the result. "rans" runs anywhere, and takes some percent more bytes.
    """

    among: tuple[Name, ...] = ("rans", "lz4", "identity")

    def __post_init__(self) -> None:
        """Checks the names."""
        unknown = [name for name in self.among if name not in _CODECS]
        if unknown or not self.among:
            value = repr(unknown[0]) if unknown else "empty"
            raise ValueError(f"among is {value}; it must hold names of: {', '.join(_CODECS)}")

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """One flat array of bytes, bounded by the largest bound of the codecs; no array for no arrays."""
        check_fixed(expected, by="auto")
        if not expected:
            return ()
        bounds = []
        for name in self.among:
            specs = _CODECS[name][1].layout(expected)
            bounds.append(sum(spec.num_bytes + (0 if spec.exact else _SIZE.itemsize) for spec in specs))
        return (ArraySpec(AUTO, (1 + max(bounds),), "|u1", exact=False),)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Encodes with each codec and returns the smallest result. Lossless."""
        if not tensors:
            return tensors, tensors
        specs = specs_of(tensors, context.roles)
        tried = []
        for name in self.among:
            number, codec = _CODECS[name]
            arrays, _ = codec.encode(tensors, context=context)
            tried.append(_joined(number, arrays, codec.layout(specs)))
        return {AUTO: min(tried, key=len)}, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Decodes with the codec that was chosen, or raises a ``PacketError``."""
        if not expected:
            return arrays
        data = arrays[AUTO]
        if not data.size:
            raise TruncatedPacket("an array '#auto' is empty")
        for name in self.among:
            number, codec = _CODECS[name]
            if number == data[0]:
                inner = _split(data[1:], codec.layout(expected))
                return codec.decode(inner, expected=expected, context=context)
        raise UnsupportedPacket(f"codec number {data[0]}, where one of {', '.join(self.among)} is expected")


def _joined(number: int, arrays: Arrays, layout: tuple[ArraySpec, ...]) -> Array:
    """The codec's number and all arrays as bytes."""
    pieces = [np.array([number], np.uint8)]
    for spec in layout:
        raw = np.ascontiguousarray(arrays[spec.name]).reshape(-1).view(np.uint8)
        if not spec.exact:
            pieces.append(np.array([raw.size], _SIZE).view(np.uint8))
        pieces.append(raw)
    return np.concatenate(pieces)


def _split(data: Array, layout: tuple[ArraySpec, ...]) -> Arrays:
    """The inverse of ``_joined``, without the number. Raises a ``PacketError`` if there are too few or too many bytes."""
    arrays: dict[str, Array] = {}
    at = 0
    for spec in layout:
        size = spec.num_bytes
        if not spec.exact:
            if at + _SIZE.itemsize > data.size:
                raise TruncatedPacket(f"an array '#auto' ends before the size of {spec.name!r}")
            size = int(data[at : at + _SIZE.itemsize].copy().view(_SIZE)[0])
            at += _SIZE.itemsize
            if size > spec.num_bytes or size % np.dtype(spec.dtype).itemsize:
                raise CorruptPacket(f"{spec.name!r} claims {size} bytes; at most {spec.num_bytes} are expected")
        if at + size > data.size:
            raise TruncatedPacket(f"an array '#auto' ends within {spec.name!r}")
        flat = data[at : at + size].copy().view(spec.dtype)  # a copy is aligned
        arrays[spec.name] = flat.reshape(spec.shape) if spec.exact else flat
        at += size
    if at != data.size:
        raise CorruptPacket(f"an array '#auto' has {data.size - at} bytes too many")
    return arrays
