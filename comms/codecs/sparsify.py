"""Sparsifiers: what is not sent becomes zero; names, shapes and types stay.

``topk`` keeps a share of the entries, ``threshold`` all that are large enough. What they drop is lost here; an endpoint with
error feedback carries it into the next message. Deep Gradient Compression (Lin et al., 2018, arXiv 1712.01887) selects per
tensor; ResFed (Song et al., 2022, arXiv 2212.05602) takes one threshold for the whole model. We depart from ResFed in
leaving vectors and statistics out by default: running means and step counters would win every place.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import msgspec
import numpy as np

from ..codec import Array, Arrays, ArraySpec, Context
from ..stages import StageRole, check_choice, check_roles, not_finite, received, touched_arrays, touched_specs
from .selection import largest, magnitude_bits


@dataclass(frozen=True)
class TopK:
    """Keeps the largest ``density`` of the entries: ``density * n`` rounded half up, less only where fewer are not zero.

    ``scope``: ``"tensor"``, each for itself; ``"global"``, the largest of all touched tensors together; ``"normalised"``,
    as global after dividing each tensor by its root mean square, so that a layer of small values does not starve. (The score is
    LAMP's, Lee et al., 2021, arXiv 2010.07611, with the mean square of the whole tensor where LAMP has the sum over what is
    left of it: the share depends on the shape of a distribution, neither on its scale nor on the size of the tensor.)
    ``floor``: the least that is kept, of each tensor (tensor, normalised) or of all (global). Equals are kept in the
    order of the tensors and positions. ``sampled``: find the threshold through a sample; faster, and the same entries.
    """

    density: float
    scope: Literal["tensor", "global", "normalised"] = "global"
    roles: tuple[StageRole, ...] = ("weight",)
    floor: int = 1
    sampled: bool = True
    sparsifies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it must be above 0, and 1 at most")
        if self.floor < 1:
            raise ValueError(f"floor is {self.floor}; it must be 1 or more")
        check_choice("scope", self.scope, ("tensor", "global", "normalised"))
        check_roles(self.roles)

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The same arrays, with the number of entries that may differ from zero."""
        touched = touched_specs(expected, self.roles)
        if self.scope == "tensor":
            bounds = {name: self._count(spec.items) for name, spec in touched.items()}
        else:
            total = self._total([spec.items for spec in touched.values()])
            bounds = {name: min(spec.items, total) for name, spec in touched.items()}
        return tuple(_bounded(spec, bounds[spec.name]) if spec.name in touched else spec for spec in expected)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """The same arrays, zero where nothing is sent. Raises ``ValueError`` for NaN and infinity."""
        touched = touched_arrays(tensors, self.roles, context)
        if not touched:
            return tensors, tensors
        # Half precision is compared as float32; a float64 among them makes all comparisons float64.
        dtype = np.float64 if any(a.dtype.itemsize == 8 for a in touched.values()) else np.float32
        magnitudes = [magnitude_bits(array, dtype) for array in touched.values()]
        if self.scope == "tensor":
            counts = [self._count(m.size) for m in magnitudes]
            chosen = [largest([m], k, sampled=self.sampled)[0] for m, k in zip(magnitudes, counts, strict=True)]
        else:
            if self.scope == "normalised":
                magnitudes = [
                    self._normalised(name, m.view(dtype)) for name, m in zip(touched, magnitudes, strict=True)
                ]
            chosen = largest(magnitudes, self._total([m.size for m in magnitudes]), sampled=self.sampled)
        # NaN and infinity have the largest bits: where there is one, one is chosen.
        sparse = {n: _only(n, a, at) for (n, a), at in zip(touched.items(), chosen, strict=True)}
        arrays = {**tensors, **sparse}
        return arrays, arrays

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """The same arrays."""
        return {spec.name: received(arrays, spec) for spec in expected}

    def _count(self, items: int) -> int:
        """How many of ``items`` are kept."""
        return min(items, max(self.floor, int(self.density * items + 0.5)))

    def _total(self, sizes: list[int]) -> int:
        """How many are kept of all tensors together."""
        least = sum(min(self.floor, size) for size in sizes) if self.scope == "normalised" else 0
        return max(least, self._count(sum(sizes)))

    def _normalised(self, name: str, magnitude: Array) -> Array:
        """Bits of the magnitudes over their root mean square, and more than any of them for the ``floor`` largest."""
        relative, _, ratio = _scaled(name, magnitude)
        relative /= relative.dtype.type(ratio)
        bits = magnitude_bits(relative, relative.dtype.type)
        np.maximum(bits, magnitude > 0, out=bits)  # what underflowed is small, but no zero
        bits[largest([bits], self.floor, sampled=self.sampled)[0]] = np.iinfo(bits.dtype).max
        return bits


@dataclass(frozen=True)
class Threshold:
    """Keeps the entries of at least ``value`` in magnitude. ``relative``: in units of the tensor's root mean square.

    How many that are depends on the data alone, so the layout gives no bound.
    """

    value: float
    relative: bool = False
    roles: tuple[StageRole, ...] = ("weight",)
    sparsifies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 < self.value < float("inf"):
            raise ValueError(f"value is {self.value}; it must be above 0 and finite")
        check_roles(self.roles)

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The same arrays."""
        touched_specs(expected, self.roles)
        return expected

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """The same arrays, zero where nothing is sent. Raises ``ValueError`` for NaN and infinity."""
        touched = touched_arrays(tensors, self.roles, context)
        if not touched:
            return tensors, tensors
        arrays = {**tensors, **{name: self._sparse(name, array) for name, array in touched.items()}}
        return arrays, arrays

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """The same arrays."""
        return {spec.name: received(arrays, spec) for spec in expected}

    def _sparse(self, name: str, array: Array) -> Array:
        dtype = np.float64 if array.dtype.itemsize == 8 else np.float32
        bits = magnitude_bits(array, dtype)
        least = self.value
        if self.relative:
            _, peak, ratio = _scaled(name, bits.view(dtype))
            least *= peak * ratio
        with np.errstate(over="ignore"):
            bound = magnitude_bits(np.asarray(least).astype(dtype), dtype)
        # At least one, lest zeros count as kept. Compared as bits, NaN and infinity are always kept, and found there.
        return _only(name, array, np.flatnonzero(bits >= np.maximum(bound, 1)))


def _scaled(name: str, magnitude: Array) -> tuple[Array, float, float]:
    """Magnitudes over their peak, the peak, and the root mean square over the peak; scaled first, lest a square overflow."""
    peak = magnitude.max(initial=0)
    if not np.isfinite(peak):
        raise not_finite(name)
    if peak == 0:
        return magnitude.copy(), 0.0, 1.0
    relative = magnitude / peak
    mean_square = np.add.reduce(np.square(relative), dtype=np.float64) / relative.size
    return relative, float(peak), float(mean_square**0.5)


def _only(name: str, array: Array, at: Array) -> Array:
    """A copy that is zero but at these flat positions; refuses NaN and infinity among them."""
    kept = array.reshape(-1)[at]
    if not np.isfinite(kept).all():
        raise not_finite(name)
    sparse = np.zeros(array.size, array.dtype)
    sparse[at] = kept
    return sparse.reshape(array.shape)


def _bounded(spec: ArraySpec, nonzeros: int) -> ArraySpec:
    """The specification with the tighter of its own bound and this one."""
    return msgspec.structs.replace(spec, nonzeros=nonzeros if spec.nonzeros is None else min(spec.nonzeros, nonzeros))
