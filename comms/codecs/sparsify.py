"""Sparsifiers: entries that are not kept become zero; names, shapes and types stay.

``topk`` keeps a share of the entries, ``threshold`` all that are large enough. The codec drops the others; an end of a link
with error feedback adds them to the next residual. Deep Gradient Compression (Lin et al., 2018, arXiv 1712.01887) selects
per tensor; ResFed (Song et al., 2022, arXiv 2212.05602) takes one threshold for the whole model. Unlike ResFed, vectors and
statistics are left out by default: running means and step counters would be selected before any weight.

ZeroFL (Qiu et al., ICLR 2022, arXiv 2208.02507, section 5) has three rules for an upload, all with scope "tensor":

    top-k weights               weights (``Upload.payload``), selected by "sent"
    diff on top-k weights       differences, selected by "reference": the trained weights
    top-k of the diff           differences, selected by "sent"

Its entries that are not sent count as zeros in the mean of all devices, as they do here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import msgspec
import numpy as np

from ..codec import Array, Arrays, ArraySpec, Context
from ..stages import StageRole, check_choice, check_roles, not_finite, received, touched_arrays, touched_specs

_SAMPLE_FROM = 1 << 15  # entries; with fewer, partitioning all of them is faster than sampling
_STRIDE = 61  # of the sample; prime, so that it reaches every position of a filter


@dataclass(frozen=True)
class TopK:
    """Keeps the largest share ``density`` of n entries: ``density * n`` rounded half up, or fewer if fewer are nonzero.

    ``by``: the magnitudes that decide: ``"sent"``, those of the entries themselves; ``"reference"``, those of
    ``Context.reference``, in an update the trained weights (positions are sent, so the receiver needs none). ``scope``:
    ``"tensor"``, the largest of each tensor; ``"global"``, the largest of all touched tensors together; ``"normalised"``, as
    global after dividing each tensor by its root mean square, so that a layer of small values is not left out. (The score is
    LAMP's, Lee et al., 2021, arXiv 2010.07611, with the mean square of the whole tensor in place of LAMP's sum over its
    remaining entries: a tensor's share depends on the shape of its distribution, not on its scale or size.)
    ``floor``: the least number of entries kept, of each tensor (tensor, normalised) or of all (global). Of equal entries, those
    of earlier tensors and positions are kept. ``sampled``: estimate the threshold from a sample, which is faster and keeps
    the same entries.

    Density 1 selects nothing: the tensors pass as they are, zeros of either sign among them. ZeroFL rounds ``density * n`` up
    and keeps all of equal entries; exact counts here give the receiver a bound on the nonzero entries of a tensor.
    """

    density: float
    scope: Literal["tensor", "global", "normalised"] = "global"
    roles: tuple[StageRole, ...] = ("weight",)
    floor: int = 1
    sampled: bool = True
    by: Literal["sent", "reference"] = "sent"

    @property
    def needs_reference(self) -> bool:
        """Whether ``Context.reference`` decides."""
        return self.by == "reference" and self.density < 1

    def __post_init__(self) -> None:
        """Checks the options."""
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it must be above 0, and 1 at most")
        if self.floor < 1:
            raise ValueError(f"floor is {self.floor}; it must be 1 or more")
        check_choice("scope", self.scope, ("tensor", "global", "normalised"))
        check_choice("by", self.by, ("sent", "reference"))
        check_roles(self.roles)

    @property
    def sparsifies(self) -> bool:
        """Whether it selects: not at density 1, which keeps everything as it is."""
        return self.density < 1

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The input's specifications, with bounds on the nonzero entries."""
        touched = touched_specs(expected, self.roles)
        if self.scope == "tensor":
            bounds = {name: self._count(spec.items) for name, spec in touched.items()}
        else:
            total = self._total([spec.items for spec in touched.values()])
            bounds = {name: min(spec.items, total) for name, spec in touched.items()}
        return tuple(_bounded(spec, bounds[spec.name]) if spec.name in touched else spec for spec in expected)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Sets the entries that are not kept to zero. Raises ``ValueError`` for NaN, for infinity, and without a reference."""
        touched = touched_arrays(tensors, self.roles, context)
        if not touched or self.density == 1:
            return tensors, tensors
        measured = touched if self.by == "sent" else _references(touched, context)
        # Half precision is compared as float32; a float64 among them makes all comparisons float64.
        dtype = np.float64 if any(a.dtype.itemsize == 8 for a in measured.values()) else np.float32
        magnitudes = [magnitude_bits(array, dtype) for array in measured.values()]
        if self.scope == "tensor":
            counts = [self._count(m.size) for m in magnitudes]
            kept = [largest([m], k, sampled=self.sampled)[0] for m, k in zip(magnitudes, counts, strict=True)]
        else:
            if self.scope == "normalised":
                magnitudes = [
                    self._normalised(name, m.view(dtype)) for name, m in zip(measured, magnitudes, strict=True)
                ]
            kept = largest(magnitudes, self._total([m.size for m in magnitudes]), sampled=self.sampled)
        # NaN and infinity have the largest bits, so if a tensor holds any, at least one is kept, and found by _only. If the
        # reference decides, all entries have been checked.
        sparse = {n: _only(n, a, at) for (n, a), at in zip(touched.items(), kept, strict=True)}
        arrays = {**tensors, **sparse}
        return arrays, arrays

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Returns the received arrays."""
        return {spec.name: received(arrays, spec) for spec in expected}

    def _count(self, items: int) -> int:
        """Number of entries kept of ``items``."""
        return min(items, max(self.floor, int(self.density * items + 0.5)))

    def _total(self, sizes: list[int]) -> int:
        """Number of entries kept of all tensors together."""
        least = sum(min(self.floor, size) for size in sizes) if self.scope == "normalised" else 0
        return max(least, self._count(sum(sizes)))

    def _normalised(self, name: str, magnitude: Array) -> Array:
        """Bits of the magnitudes over their root mean square; the largest integer for the ``floor`` largest, to keep them."""
        relative, _, ratio = _scaled(name, magnitude)
        relative /= relative.dtype.type(ratio)
        bits = magnitude_bits(relative, relative.dtype.type)
        np.maximum(bits, magnitude > 0, out=bits)  # a nonzero entry that underflowed stays nonzero
        bits[largest([bits], self.floor, sampled=self.sampled)[0]] = np.iinfo(bits.dtype).max
        return bits


@dataclass(frozen=True)
class Threshold:
    """Keeps the entries of magnitude ``value`` or more. ``relative``: in units of the tensor's root mean square.

    Their number depends on the data alone, so the layout has no bound on it.
    """

    value: float
    relative: bool = False
    roles: tuple[StageRole, ...] = ("weight",)
    sparsifies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options."""
        if not 0 < self.value < float("inf"):
            raise ValueError(f"value is {self.value}; it must be above 0 and finite")
        check_roles(self.roles)

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The input's specifications."""
        touched_specs(expected, self.roles)
        return expected

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Sets the entries that are not kept to zero. Raises ``ValueError`` for NaN and infinity."""
        touched = touched_arrays(tensors, self.roles, context)
        if not touched:
            return tensors, tensors
        arrays = {**tensors, **{name: self._sparse(name, array) for name, array in touched.items()}}
        return arrays, arrays

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Returns the received arrays."""
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
        # A bound of at least 1 drops zeros. Compared as bits, NaN and infinity are always kept, and found by _only.
        return _only(name, array, np.flatnonzero(bits >= np.maximum(bound, 1)))


def _references(tensors: Arrays, context: Context) -> Arrays:
    """The references of these tensors, by name. Raises ``ValueError`` if one is missing, or if one of both is not finite."""
    references: dict[str, Array] = {}
    for name, array in tensors.items():
        reference = context.reference.get(name)
        if reference is None or reference.shape != array.shape:
            found = "no reference" if reference is None else f"a reference of shape {reference.shape}"
            raise ValueError(
                f"topk by 'reference' found {found} for tensor {name!r} of shape {array.shape}; only an update has "
                "references, the trained weights"
            )
        if not (np.isfinite(array).all() and np.isfinite(reference).all()):
            raise not_finite(name)
        references[name] = reference
    return references


def _scaled(name: str, magnitude: Array) -> tuple[Array, float, float]:
    """Magnitudes over their peak, the peak, and the root mean square over the peak. Scaled before squaring, for overflow."""
    peak = magnitude.max(initial=0)
    if not np.isfinite(peak):
        raise not_finite(name)
    if peak == 0:
        return magnitude.copy(), 0.0, 1.0
    relative = magnitude / peak
    mean_square = np.add.reduce(np.square(relative), dtype=np.float64) / relative.size
    return relative, float(peak), float(mean_square**0.5)


def _only(name: str, array: Array, at: Array) -> Array:
    """A copy that is zero except at these flat positions. Raises ``ValueError`` for NaN and infinity among them."""
    kept = array.reshape(-1)[at]
    if not np.isfinite(kept).all():
        raise not_finite(name)
    sparse = np.zeros(array.size, array.dtype)
    sparse[at] = kept
    return sparse.reshape(array.shape)


def _bounded(spec: ArraySpec, nonzeros: int) -> ArraySpec:
    """The specification with the smaller of its own bound and this one."""
    return msgspec.structs.replace(spec, nonzeros=nonzeros if spec.nonzeros is None else min(spec.nonzeros, nonzeros))


def magnitude_bits(array: Array, dtype: type[np.floating] = np.float32) -> Array:
    """The bits of ``|x|`` as flat integers, which order like the floats and are faster to compare and to partition.

    Zeros of either sign are 0. ``dtype``: float32 or float64, to which ``x`` is converted.
    """
    flat = array.reshape(-1).astype(dtype, copy=False)
    if dtype is np.float64:
        return flat.view(np.int64) & np.int64(0x7FFF_FFFF_FFFF_FFFF)
    return flat.view(np.int32) & np.int32(0x7FFF_FFFF)


def largest(magnitudes: Sequence[Array], count: int, *, sampled: bool = True) -> list[Array]:
    """For each array, the flat positions, ascending, of its entries among the ``count`` largest of all arrays together.

    Exact, without sorting or partitioning all entries: a sample gives a threshold that lets enough entries through, and only
    these are partitioned. These are the two steps of Deep Gradient Compression (section 3.1), where the sample's threshold is
    final; here the number of entries is checked, so the result does not depend on the sample.

    ``magnitudes``: flat, not negative, of one type. Zeros are never among the largest, so there may be fewer than ``count``.
    Of equal entries, those of earlier arrays, then of lower positions, are taken. ``sampled`` changes only the time.
    """
    if count < 1 or not magnitudes:
        return [np.zeros(0, np.intp) for _ in magnitudes]
    floor = _conservative_threshold(magnitudes, count) if sampled else 1
    candidates = [np.flatnonzero(m >= floor) for m in magnitudes]
    if floor > 1 and sum(map(len, candidates)) < count:  # the threshold was too high
        candidates = [np.flatnonzero(m) for m in magnitudes]
    values = np.concatenate([m[at] for m, at in zip(magnitudes, candidates, strict=True)])
    if values.size <= count:
        return candidates
    cut = np.partition(values, values.size - count)[values.size - count]
    keep = values > cut
    ties = np.flatnonzero(values == cut)
    keep[ties[: count - np.count_nonzero(keep)]] = True
    borders = np.cumsum([at.size for at in candidates])[:-1]
    return [at[kept] for at, kept in zip(candidates, np.split(keep, borders), strict=True)]


def _conservative_threshold(magnitudes: Sequence[Array], count: int) -> int:
    """A magnitude that very likely ``count`` entries reach, and not many more; 1 if all nonzero entries must be compared."""
    total = sum(m.size for m in magnitudes)
    if total < _SAMPLE_FROM or count >= total:
        return 1
    sample = np.concatenate([m[::_STRIDE] for m in magnitudes])
    expected = count * sample.size / total
    # Four standard deviations above the expected number, and four entries more for very low densities.
    rank = int(expected + 4 * expected**0.5) + 4
    if rank >= sample.size:
        return 1
    return max(1, int(np.partition(sample, sample.size - rank)[sample.size - rank]))
