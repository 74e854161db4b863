"""The pack codec: packs symbols of a few bits into bytes, for chains without entropy coding.

Eight symbols of b bits take b bytes for any b: they are shifted into one 64-bit word, of which the low b bytes are kept.
"""

from dataclasses import dataclass

import msgspec
import numpy as np

from ..codec import Array, Arrays, ArraySpec, Context
from ..stages import check_fixed, received


@dataclass(frozen=True)
class Pack:
    """Packs every int8 and uint8 array with ``bits`` bits an entry: symbols of ``uniform``, or of ``ternary`` with 2 bits.

    Signed symbols are stored in two's complement. Arrays added by another stage (with a ``#`` in their name) pass unchanged.
    """

    bits: int

    def __post_init__(self) -> None:
        """Checks the width."""
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; it must be between 1 and 8")

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """Flat bytes of exact number in place of each array of symbols."""
        return tuple(self._packed(spec) if _is_symbols(spec.name, spec.dtype) else spec for spec in expected)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Packs. Lossless. Raises ``ValueError`` for symbols that do not fit ``bits`` bits."""
        return {
            n: self._pack(n, array) if _is_symbols(n, array.dtype.str) else array for n, array in tensors.items()
        }, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Unpacks symbols of the expected types and shapes."""
        tensors = {}
        for spec in expected:
            if _is_symbols(spec.name, spec.dtype):
                tensors[spec.name] = self._unpack(received(arrays, self._packed(spec)), spec)
            else:
                tensors[spec.name] = received(arrays, spec)
        return tensors

    def _packed(self, spec: ArraySpec) -> ArraySpec:
        """The specification of the packed bytes."""
        check_fixed((spec,), by="pack")
        return msgspec.structs.replace(spec, shape=(-(-spec.items * self.bits // 8),), dtype="|u1", nonzeros=None)

    def _pack(self, name: str, array: Array) -> Array:
        info = np.iinfo(array.dtype)
        low, high = info.min >> (8 - self.bits), info.max >> (8 - self.bits)
        flat = array.reshape(-1)
        if flat.min(initial=0) < low or flat.max(initial=0) > high:
            symbols = f"symbols from {flat.min()} to {flat.max()}"
            raise ValueError(f"pack: {name!r} holds {symbols}; {self.bits} bits hold {low} to {high}")
        padded = np.zeros((-(-flat.size // 8), 8), np.uint8)
        padded.reshape(-1)[: flat.size] = flat.view(np.uint8)
        padded &= np.uint8((1 << self.bits) - 1)
        words = np.zeros(len(padded), "<u8")
        for position in range(8):
            words |= padded[:, position].astype("<u8") << np.uint64(position * self.bits)
        packed = words.view(np.uint8).reshape(-1, 8)[:, : self.bits].reshape(-1)
        return packed[: -(-flat.size * self.bits // 8)]

    def _unpack(self, packed: Array, spec: ArraySpec) -> Array:
        padded = np.zeros((-(-spec.items // 8), 8), np.uint8)
        whole = np.zeros((len(padded), self.bits), np.uint8)
        whole.reshape(-1)[: packed.size] = packed
        padded[:, : self.bits] = whole
        words = padded.view("<u8").reshape(-1)
        symbols = np.empty((len(words), 8), np.uint8)
        spare = 8 - self.bits
        for position in range(8):
            # Shifted to the top of the byte, and below, as the expected type, down again: this extends the sign.
            symbols[:, position] = (words >> np.uint64(position * self.bits)).astype(np.uint8) << np.uint8(spare)
        return (symbols.reshape(-1)[: spec.items].view(spec.dtype) >> spare).reshape(spec.shape)


def _is_symbols(name: str, dtype: str) -> bool:
    return dtype in ("|i1", "|u1") and "#" not in name
