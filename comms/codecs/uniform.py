"""The uniform quantiser: equal steps, with one step size for a tensor or for each of its channels.

The grid has no offset, so zero stays zero and sparse tensors stay sparse. Stochastic rounding follows QSGD (Alistarh et al.,
2017, arXiv 1610.02132, section 3.1), with the largest magnitude in place of the norm; it is unbiased. The receiver computes
one float32 product for each entry, so both ends hold the same bits.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from ..codec import Array, Arrays, ArraySpec, Context
from ..errors import CorruptPacket, UnfitPacket
from ..stages import (
    ROLES,
    StageRole,
    as_expected,
    as_float32,
    check_choice,
    check_roles,
    not_finite,
    received,
    touched_arrays,
    touched_specs,
)


@dataclass(frozen=True)
class Uniform:
    """Sends symbols of ``bits`` bits, one a byte (to be followed by ``pack`` or the entropy codec), and the step sizes.

    ``signed``: True, symbols in [-(2^(bits-1) - 1), 2^(bits-1) - 1] as int8; False, in [0, 2^bits - 1] as uint8, for tensors
    without negative entries; "auto", the unsigned grid for each tensor without negative entries. The step sizes of such a
    tensor are sent with a minus sign, and its symbols are the low ``bits`` bits in two's complement, as int8.
    ``granularity``: one step size for the tensor, or one for each channel (index of the first dimension) if it has two or
    more dimensions. ``stochastic``: round up with the probability of the remainder, drawn from the context's seed.
    """

    bits: int = 8
    signed: bool | Literal["auto"] = True
    granularity: Literal["tensor", "channel"] = "tensor"
    stochastic: bool = False
    roles: tuple[StageRole, ...] = ROLES

    def __post_init__(self) -> None:
        """Checks the options."""
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; it must be between 2 and 8")
        check_choice("signed", self.signed, (True, False, "auto"))
        check_choice("granularity", self.granularity, ("tensor", "channel"))
        check_roles(self.roles)

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """Symbols in place of each touched array, followed by its step sizes."""
        touched = touched_specs(expected, self.roles)
        layout = []
        for spec in expected:
            layout += [self._symbols(spec), self._scale(spec)] if spec.name in touched else [spec]
        return tuple(layout)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Quantises to symbols and step sizes.

        Raises ``ValueError`` for NaN and infinity, and for negative entries if ``signed`` is False.
        """
        touched = touched_arrays(tensors, self.roles, context)
        if not touched:
            return tensors, tensors
        arrays: dict[str, Array] = {}
        held: dict[str, Array] = {}
        for position, (name, array) in enumerate(tensors.items()):
            arrays[name] = held[name] = array
            if name in touched:
                noise = np.random.default_rng((context.seed, position)) if self.stochastic else None
                arrays[name], arrays[_scale_name(name)] = symbols, scale = self._quantised(name, array, noise)
                held[name] = self._restored(symbols, scale, ArraySpec(name, array.shape, array.dtype.str))
        return arrays, held

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Multiplies symbols by step sizes."""
        touched = touched_specs(expected, self.roles)
        tensors = {}
        for spec in expected:
            if spec.name in touched:
                symbols, scale = received(arrays, self._symbols(spec)), received(arrays, self._scale(spec))
                tensors[spec.name] = self._restored(symbols, scale, spec)
            else:
                tensors[spec.name] = received(arrays, spec)
        return tensors

    def _symbols(self, spec: ArraySpec) -> ArraySpec:
        return msgspec.structs.replace(spec, dtype="|u1" if self.signed is False else "|i1")

    def _scale(self, spec: ArraySpec) -> ArraySpec:
        return ArraySpec(_scale_name(spec.name), self._channels(spec.shape), "<f4")

    def _channels(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the step sizes."""
        return shape[:1] if self.granularity == "channel" and len(shape) >= 2 else ()

    def _rows(self, flat: Array, shape: tuple[int, ...]) -> Array:
        """The array as one row for each step size."""
        rows = int(np.prod(self._channels(shape), dtype=np.int64))
        return flat.reshape(rows, flat.size // rows if rows else 0)

    def _limit(self, unsigned: bool) -> int:
        """The largest symbol."""
        return (1 << self.bits) - 1 if unsigned else (1 << self.bits - 1) - 1

    def _quantised(self, name: str, array: Array, noise: np.random.Generator | None) -> tuple[Array, Array]:
        """Symbols in the array's shape, and step sizes. ``noise``: for stochastic rounding; None for nearest."""
        rows = self._rows(as_float32(array), array.shape)
        low, high = rows.min(axis=1, initial=0), rows.max(axis=1, initial=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise not_finite(name)
        least = low.min(initial=0)
        if self.signed is False and least < 0:
            raise ValueError(f"tensor {name!r} holds {least:g}; uniform with signed=False sends no negative entries")
        unsigned = self.signed is False or (self.signed == "auto" and least == 0)
        limit = self._limit(unsigned)
        scale = _step_sizes(np.maximum(high, np.abs(low)), limit)
        steps = rows / np.where(scale > 0, scale, np.float32(1))[:, None]
        if noise is None:
            np.rint(steps, out=steps)
        else:
            steps += noise.random(steps.shape, np.float32)
            np.floor(steps, out=steps)
        np.clip(steps, 0 if unsigned else -limit, limit, out=steps)
        symbols = steps.astype(np.uint8 if unsigned else np.int8)
        if unsigned and self.signed == "auto":
            spare = 8 - self.bits
            symbols, scale = (symbols << np.uint8(spare)).view(np.int8) >> np.int8(spare), -scale
        return symbols.reshape(array.shape), scale.reshape(self._channels(array.shape))

    def _restored(self, symbols: Array, scale: Array, spec: ArraySpec) -> Array:
        """Symbols times step sizes. Raises a ``PacketError`` for symbols or step sizes out of range."""
        with np.errstate(over="ignore", invalid="ignore"):
            marked = self.signed == "auto" and bool((scale < 0).any())
            limit = self._limit(self.signed is False or marked)
            size = np.abs(scale)
            fits = np.isfinite(size * np.float32(limit)).all()
        if not fits:
            raise UnfitPacket(f"{_scale_name(spec.name)!r} holds NaN or infinity, or steps beyond float32")
        least, most = (-1 << self.bits - 1, limit) if marked else (0 if self.signed is False else -limit, limit)
        if symbols.min(initial=0) < least or symbols.max(initial=0) > most:
            raise CorruptPacket(f"{spec.name!r} holds symbols that {self.bits} bits do not")
        if marked:
            symbols = symbols.view(np.uint8) & np.uint8(limit)
        rows = self._rows(symbols.reshape(-1).astype(np.float32), spec.shape)
        rows *= size.reshape(-1, 1)
        return as_expected(rows.reshape(-1), spec)


def _scale_name(name: str) -> str:
    return f"{name}#scale"


def _step_sizes(peaks: Array, limit: int) -> Array:
    """The smallest float32 step sizes with ``limit * step >= peak``, or just below if the product would overflow."""
    peaks, most = np.atleast_1d(peaks), np.float32(limit)
    scale = peaks / most
    with np.errstate(over="ignore"):
        scale = np.where(scale * most < peaks, np.nextafter(scale, np.float32(np.inf)), scale)
        return np.where(np.isinf(scale * most), np.nextafter(scale, np.float32(0)), scale)
