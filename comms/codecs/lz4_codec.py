"""The lz4 codec: lossless, and fast enough for local networks.

Floats compress only if their bytes are regrouped first (all first bytes, then all second bytes, ...), since signs and
exponents repeat while mantissas do not. This is the shuffle filter of Blosc (Alted, 2010), here as a numpy transpose.
"""

from dataclasses import dataclass

import lz4.block
import numpy as np

from ..codec import Array, Arrays, ArraySpec, Context
from ..errors import CorruptPacket


@dataclass(frozen=True)
class Lz4:
    """Compresses each array by itself. ``level``: 0 for lz4's fast mode, 1 to 12 for its high-compression mode."""

    level: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        """Checks the level."""
        if not 0 <= self.level <= 12:
            raise ValueError(f"level is {self.level}; it must be between 0 and 12")

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """A flat array of bytes for each array, bounded by lz4's worst case."""
        return tuple(ArraySpec(s.name, (lz4_bound(s.num_bytes),), "|u1", exact=False) for s in expected)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Compresses. Lossless."""
        return {name: self._compress(array) for name, array in tensors.items()}, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Decompresses each array into its expected size, or raises ``CorruptPacket``."""
        return {spec.name: self._decompress(arrays[spec.name], spec) for spec in expected}

    def _compress(self, array: Array) -> Array:
        raw = np.ascontiguousarray(array)
        width = raw.dtype.itemsize
        data = raw.reshape(-1).view(np.uint8)
        if self.shuffle and width > 1:
            data = np.ascontiguousarray(data.reshape(-1, width).T)
        packed = lz4.block.compress(
            data, mode="high_compression" if self.level else "fast", compression=self.level, store_size=False
        )
        return np.frombuffer(packed, np.uint8)

    def _decompress(self, packed: Array, spec: ArraySpec) -> Array:
        try:
            raw = lz4.block.decompress(packed, uncompressed_size=spec.num_bytes)
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise CorruptPacket(f"lz4 cannot decompress {spec.name!r}: {error}") from error
        width = np.dtype(spec.dtype).itemsize
        if len(raw) % width or (spec.exact and len(raw) != spec.num_bytes):
            raise CorruptPacket(f"{spec.name!r} decompresses to {len(raw)} bytes, not {spec.num_bytes}")
        data = np.frombuffer(raw, np.uint8)
        if self.shuffle and width > 1:
            data = np.ascontiguousarray(data.reshape(width, -1).T)
        array = data.reshape(-1).view(spec.dtype)
        return array.reshape(spec.shape) if spec.exact else array


def lz4_bound(num_bytes: int) -> int:
    """The largest compressed size of ``num_bytes`` (LZ4_compressBound of lz4's block format)."""
    return num_bytes + num_bytes // 255 + 16
