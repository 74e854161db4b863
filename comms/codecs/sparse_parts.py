"""How the sparse codec sends one tensor: the sender's choice, before the parts of all tensors are joined (``sparse``)."""

from dataclasses import dataclass, replace

import numpy as np

from ..codec import Array
from ..entropy.alphabets import fit
from ..entropy.tables import Integers
from ..entropy.tensors import Tensor, cheapest, describe_mask
from .places import put_places

ALL, CODED = 0, 3  # forms, beside those of places
MAX_PLANES = 8  # bytes of a value that may be entropy coded
_WORTH = 0.98  # what is entropy coded takes at most this share of what it stands for


@dataclass(frozen=True)
class Parts:
    """A tensor as it is sent.

    ``form``, ``places``: without entropy coding. ``values``: [entry, byte]. ``planes``: the bytes of a value that are entropy
    coded. ``coded``: what is entropy coded in place of ``places``, or, for one-byte symbols, of places and values; None for
    nothing.
    """

    form: int
    places: list[Array]
    values: Array
    planes: tuple[int, ...] = ()
    coded: Tensor = None

    @property
    def num_bytes(self) -> int:
        """Bytes of places and values without entropy coding."""
        return sum(map(len, self.places)) + self.values.size

    @property
    def is_of_symbols(self) -> bool:
        """Whether a value is one byte, so that ``coded`` stands for the values too."""
        return bool(self.values.shape[1] == 1)

    @property
    def replaced_bytes(self) -> int:
        """The bytes that ``coded`` stands for."""
        return self.num_bytes if self.is_of_symbols else sum(map(len, self.places))

    @property
    def sent_values(self) -> list[Array]:
        """The bytes of the values that are not entropy coded, in pieces."""
        if self.coded is not None and self.is_of_symbols:
            return []
        if not self.planes:
            return [self.values.reshape(-1)]
        return [plane for number, plane in enumerate(self.values.T) if number not in self.planes]


def split(array: Array, *, entropy: bool) -> Parts:
    """The parts of an array: dense, or places and values, whichever take fewer bytes. ``entropy``: whether to code them."""
    width = array.dtype.itemsize
    bits = as_bits(np.ascontiguousarray(array).reshape(-1))
    flat = np.flatnonzero(is_entry(bits))
    parts = Parts(ALL, [], _as_rows(bits, width))
    if len(flat) < len(bits):
        sparse = Parts(*put_places(flat, len(bits)), _as_rows(bits[flat], width))
        parts = min(sparse, parts, key=lambda each: each.num_bytes)
    return _entropy_coded(parts, array, flat) if entropy and len(flat) else parts


def _entropy_coded(parts: Parts, array: Array, flat: Integers) -> Parts:
    """The parts, with what gains from entropy coding. ``flat``: positions of the nonzero entries, at least one."""
    if parts.is_of_symbols:
        symbols, bits = cheapest(as_symbols(array))
        return replace(parts, coded=symbols) if bits < _WORTH * 8 * parts.num_bytes else parts
    if parts.places:
        mask, bits = describe_mask(flat, array.shape)
        if bits < _WORTH * 8 * parts.replaced_bytes:
            parts = replace(parts, coded=mask)
    count, width = parts.values.shape
    if width > MAX_PLANES:
        return parts
    costs = [fit(np.bincount(plane, minlength=256))[1] for plane in parts.values.T]
    return replace(parts, planes=tuple(number for number, bits in enumerate(costs) if bits < _WORTH * 8 * count))


def as_bits(flat: Array) -> Array:
    """A flat array as unsigned integers of the same width; as rows of bytes if there are none."""
    width = flat.dtype.itemsize
    return flat.view(f"u{width}") if width in (1, 2, 4, 8) else flat.view(np.uint8).reshape(-1, width)


def is_entry(bits: Array) -> Array:
    """Which results of ``as_bits`` are not the bit pattern 0; minus zero is not."""
    return np.asarray(bits != 0 if bits.ndim == 1 else bits.any(1))


def as_symbols(array: Array) -> Array:
    """An array of one-byte items as symbols."""
    whole = np.ascontiguousarray(array)
    return whole if array.dtype.str in ("|i1", "|u1") else whole.view(np.uint8)


def _as_rows(bits: Array, width: int) -> Array:
    """[entry, byte] of the result of ``as_bits``."""
    return bits.reshape(-1).view(np.uint8).reshape(-1, width)
