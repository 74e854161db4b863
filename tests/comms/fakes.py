"""Small codecs for tests. The lossy ones check their input."""

from dataclasses import dataclass

import numpy as np
from fedbonsai.comms.codec import Arrays, ArraySpec, Context, IdentityCodec


@dataclass(frozen=True)
class Halve:
    """Sends every float array as float16, and all others unchanged."""

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        return tuple(
            ArraySpec(s.name, s.shape, "<f2" if np.dtype(s.dtype).kind == "f" else s.dtype, s.exact) for s in expected
        )

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        arrays = {n: a.astype("<f2") if a.dtype.kind == "f" else a for n, a in tensors.items()}
        return arrays, {n: a.astype(tensors[n].dtype) for n, a in arrays.items()}

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        assert {name: str(array.dtype) for name, array in arrays.items()} == {
            spec.name: str(np.dtype(spec.dtype)) for spec in self.layout(expected)
        }
        return {spec.name: arrays[spec.name].astype(spec.dtype) for spec in expected}


@dataclass(frozen=True)
class Drop:
    """Sends positions and values of the entries of at least ``threshold`` in magnitude: arrays of varying size."""

    threshold: float = 0.5

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        found = []
        for spec in expected:
            found.append(ArraySpec(f"{spec.name}/at", (spec.items,), "<u4", exact=False))
            found.append(ArraySpec(f"{spec.name}/values", (spec.items,), spec.dtype, exact=False))
        return tuple(found)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        arrays, kept = {}, {}
        for name, tensor in tensors.items():
            flat = tensor.reshape(-1)
            at = np.flatnonzero(np.abs(flat) >= self.threshold).astype("<u4")
            arrays[f"{name}/at"], arrays[f"{name}/values"] = at, flat[at]
            kept[name] = np.where(np.abs(tensor) >= self.threshold, tensor, np.zeros((), tensor.dtype))
        return arrays, kept

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        tensors = {}
        for spec in expected:
            flat = np.zeros(spec.items, spec.dtype)
            flat[arrays[f"{spec.name}/at"]] = arrays[f"{spec.name}/values"]
            tensors[spec.name] = flat.reshape(spec.shape)
        return tensors


@dataclass(frozen=True)
class Double(IdentityCodec):
    """Sends twice the values: a subclass of the identity that is not the identity."""

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        return {name: 2 * array for name, array in tensors.items()}, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        return {name: array / 2 for name, array in arrays.items()}


@dataclass(frozen=True)
class Backwards(IdentityCodec):
    """Yields the arrays in reverse order of its layout."""

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        return dict(reversed(tensors.items())), tensors


@dataclass(frozen=True)
class Liar:
    """Yields other arrays than its layout says: of another type, shape or name."""

    wrong: str

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        return tuple(ArraySpec(s.name, s.shape, "<i4", exact=True) for s in expected)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        if self.wrong == "type":
            return tensors, tensors
        if self.wrong == "shape":
            return {n: np.zeros(a.size + 1, "<i4") for n, a in tensors.items()}, tensors
        return {f"{n}/more": np.zeros(a.shape, "<i4") for n, a in tensors.items()}, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        raise AssertionError("its arrays cannot be sealed")
