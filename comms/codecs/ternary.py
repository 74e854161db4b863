"""The ternary quantiser: each nonzero entry becomes one of a few levels per sign, which the sender fits to its data.

``"centroid"`` with one level per sign takes the mean of each sign's entries: no other pair of levels has a smaller squared
error. (Sparse Ternary Compression, Sattler et al., 2019, arXiv 1903.02891, has one magnitude for both signs.) ``"median"`` is
ResFed's own rule (Song et al., 2022, arXiv 2212.05602), kept for fidelity: it drops half of the entries that the sparsifier
kept, and its levels are medians. The median of an even number of entries is the lower one, as the authors' own counts of
remaining entries imply.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from ..codec import Array, Arrays, ArraySpec, Context, specs_of
from ..errors import CorruptPacket, UnfitPacket
from ..stages import (
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

_SHARED = "#levels"
_SPARSE = 8  # with fewer than one nonzero symbol in so many, looking up only these is faster than looking up all


@dataclass(frozen=True)
class Ternary:
    """Sends int8 symbols from -levels to levels, 0 for zero, and the 2 * ``levels`` float32 values that they stand for.

    The entries of each sign are split by magnitude into ``levels`` bins of equal population; equal values share a bin.
    ``rule``: "centroid", a level is the mean of its bin; "median", the lower median of its bin, after entries below the lower
    median of all magnitudes have become zero (``levels`` must then be a power of two, since the bins are halved). ``scope``:
    levels for each tensor, or for all touched tensors together. An empty bin has level 0.
    """

    levels: int = 1
    scope: Literal["tensor", "global"] = "tensor"
    rule: Literal["centroid", "median"] = "centroid"
    roles: tuple[StageRole, ...] = ("weight",)

    def __post_init__(self) -> None:
        """Checks the options."""
        if not 1 <= self.levels <= 127:
            raise ValueError(f"levels is {self.levels}; it must be between 1 and 127")
        check_choice("scope", self.scope, ("tensor", "global"))
        check_choice("rule", self.rule, ("centroid", "median"))
        if self.rule == "median" and self.levels & (self.levels - 1):
            raise ValueError(f"levels is {self.levels}; with rule 'median' it must be a power of two")
        check_roles(self.roles)

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """Symbols in place of each touched array; levels after each, or after all."""
        touched = touched_specs(expected, self.roles)
        layout = []
        for spec in expected:
            layout.append(_symbols(spec) if spec.name in touched else spec)
            if spec.name in touched and self.scope == "tensor":
                layout.append(self._levels(f"{spec.name}{_SHARED}"))
        if touched and self.scope == "global":
            if any(spec.name == _SHARED for spec in expected):
                raise ValueError("a chain holds one ternary of scope 'global' at most; give one of them scope 'tensor'")
            layout.append(self._levels(_SHARED))
        return tuple(layout)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Quantises to symbols and levels. Raises ``ValueError`` for NaN and infinity."""
        touched = {name: _entries(name, array) for name, array in touched_arrays(tensors, self.roles, context).items()}
        if not touched:
            return tensors, tensors
        arrays, held = dict(tensors), dict(tensors)
        for levels_name, names in self._groups(tuple(touched)).items():
            symbols, levels = _coded(np.concatenate([touched[n].values for n in names]), self.levels, self.rule)
            values = _table(levels)[symbols]
            borders = np.cumsum([touched[n].at.size for n in names])[:-1]
            for name, own, kept in zip(names, np.split(symbols, borders), np.split(values, borders), strict=True):
                tensor, at = tensors[name], touched[name].at
                arrays[name] = _scattered(own, at, tensor.size).reshape(tensor.shape)
                held[name] = as_expected(
                    _scattered(kept, at, tensor.size), ArraySpec(name, tensor.shape, tensor.dtype.str)
                )
            arrays[levels_name] = levels
        return {spec.name: arrays[spec.name] for spec in self.layout(specs_of(tensors, context.roles))}, held

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Looks up the level of each symbol. Raises a ``PacketError`` for symbols out of range and levels not finite."""
        touched = touched_specs(expected, self.roles)
        levels_of = {n: levels_name for levels_name, names in self._groups(tuple(touched)).items() for n in names}
        tensors = {}
        for spec in expected:
            if spec.name not in touched:
                tensors[spec.name] = received(arrays, spec)
                continue
            symbols = received(arrays, _symbols(spec)).reshape(-1)
            levels = received(arrays, self._levels(levels_of[spec.name]))
            if not np.isfinite(levels).all():
                raise UnfitPacket(f"{levels_of[spec.name]!r} holds NaN or infinity")
            if symbols.min(initial=0) < -self.levels or symbols.max(initial=0) > self.levels:
                raise CorruptPacket(f"{spec.name!r} holds symbols beyond its {self.levels} levels")
            tensors[spec.name] = as_expected(_looked_up(_table(levels), symbols), spec)
        return tensors

    def _levels(self, name: str) -> ArraySpec:
        """Specification of the levels: those of symbols 1 to ``levels``, then of -``levels`` to -1."""
        return ArraySpec(name, (2 * self.levels,), "<f4")

    def _groups(self, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The tensors that share levels, by the name of the levels' array."""
        if self.scope == "global":
            return {_SHARED: names} if names else {}
        return {f"{name}{_SHARED}": (name,) for name in names}


class _Entries(NamedTuple):
    """The nonzero entries of a tensor: flat positions, and float32 values."""

    at: Array
    values: Array


def _entries(name: str, array: Array) -> _Entries:
    flat = array.reshape(-1)
    at = np.flatnonzero(flat != 0)
    values = as_float32(flat[at])
    if not np.isfinite(values).all():
        raise not_finite(name)
    return _Entries(at, values)


def _symbols(spec: ArraySpec) -> ArraySpec:
    return msgspec.structs.replace(spec, dtype="|i1")


def _coded(values: Array, levels: int, rule: str) -> tuple[Array, Array]:
    """Symbols of the values (all nonzero), and the levels in the order in which they are sent."""
    magnitudes = np.abs(values)
    kept = magnitudes >= _lower_median(np.sort(magnitudes)) if rule == "median" else np.ones(values.size, bool)
    symbols = np.zeros(values.size, np.int8)
    signed_levels = []
    for sign in (1, -1):
        own = np.flatnonzero(kept & (sign * values > 0))
        bins, magnitude_levels = _binned(magnitudes[own], levels, rule)
        symbols[own] = sign * (bins + 1)
        signed_levels.append(sign * magnitude_levels[::sign])
    return symbols, np.concatenate(signed_levels).astype("<f4")


def _binned(magnitudes: Array, levels: int, rule: str) -> tuple[Array, Array]:
    """The bin of each magnitude (0 for the smallest), and the level of each bin."""
    ordered = np.sort(magnitudes) if levels > 1 or rule == "median" else magnitudes
    if rule == "median":
        edges = _median_edges(ordered, levels)
    else:
        # The largest magnitude of each bin but the last; an empty bin ends at 0.
        edges = np.append(np.float32(0), ordered)[[number * ordered.size // levels for number in range(1, levels)]]
    bins = np.searchsorted(edges, magnitudes, side="left")
    if rule == "median":
        borders = [0, *np.searchsorted(ordered, edges, side="right"), ordered.size]
        return bins, np.array([_lower_median(ordered[a:b]) for a, b in pairwise(borders)], np.float32)
    counts = np.bincount(bins, minlength=levels)
    # Sums in float64. Only the sender computes them, so both ends need not agree.
    return bins, np.bincount(bins, weights=magnitudes, minlength=levels) / np.maximum(counts, 1)


def _median_edges(ordered: Array, levels: int) -> Array:
    """The largest magnitude of each bin but the last. Bins are halved at their lower median until there are ``levels``."""
    borders = [0, ordered.size]
    while len(borders) <= levels:
        middles = [int(np.searchsorted(ordered, _lower_median(ordered[a:b]), side="right")) if b > a else b
                   for a, b in pairwise(borders)]  # fmt: skip
        borders = sorted(borders + middles)
    return np.append(np.float32(0), ordered)[borders[1:-1]]


def _lower_median(ordered: Array) -> np.float32:
    """The lower median of sorted numbers; 0 for none."""
    return np.float32(ordered[(ordered.size - 1) // 2] if ordered.size else 0)


def _table(levels: Array) -> Array:
    """The value of symbol s at index s; negative symbols index from the end."""
    return np.append(np.float32(0), levels)


def _scattered(values: Array, at: Array, size: int) -> Array:
    """An array of zeros with these values at these positions."""
    flat = np.zeros(size, values.dtype)
    flat[at] = values
    return flat


def _looked_up(table: Array, symbols: Array) -> Array:
    """The values of flat symbols, by a table."""
    at = np.flatnonzero(symbols != 0)
    if at.size * _SPARSE > symbols.size:
        return table[symbols]
    return _scattered(table[symbols[at]], at, symbols.size)
