"""The float16 quantiser: half the bytes, three decimal digits.

What is too large saturates at 65504, float16's largest finite number, rather than being refused: one runaway weight should
cost its own precision, not the device's whole update, and an endpoint with error feedback sends the rest next time.
"""

from dataclasses import dataclass

import msgspec
import numpy as np

from ..codec import Array, Arrays, ArraySpec, Context
from ..stages import (
    ROLES,
    StageRole,
    as_expected,
    as_float32,
    check_roles,
    not_finite,
    received,
    touched_arrays,
    touched_specs,
)

_LARGEST = np.float32(65504)


@dataclass(frozen=True)
class Float16:
    """Sends floats as float16, rounded to nearest even."""

    roles: tuple[StageRole, ...] = ROLES

    def __post_init__(self) -> None:
        """Check the roles."""
        check_roles(self.roles)

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The same arrays, the touched ones in float16."""
        touched = touched_specs(expected, self.roles)
        return tuple(_halved(spec) if spec.name in touched else spec for spec in expected)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Halves. Raises ``ValueError`` for NaN and infinity."""
        touched = touched_arrays(tensors, self.roles, context)
        if not touched:
            return tensors, tensors
        halves = {name: _half(name, array) for name, array in touched.items()}
        held = {
            n: h.reshape(-1).astype(np.float32).astype(touched[n].dtype).reshape(h.shape) for n, h in halves.items()
        }
        return {**tensors, **halves}, {**tensors, **held}

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Floats of the expected type."""
        touched = touched_specs(expected, self.roles)
        tensors = {}
        for spec in expected:
            if spec.name in touched:
                tensors[spec.name] = as_expected(as_float32(received(arrays, _halved(spec))), spec)
            else:
                tensors[spec.name] = received(arrays, spec)
        return tensors


def _halved(spec: ArraySpec) -> ArraySpec:
    """What is sent for this one."""
    return msgspec.structs.replace(spec, dtype="<f2")


def _half(name: str, array: Array) -> Array:
    """Rounded and saturated."""
    flat = as_float32(array)
    if not np.isfinite(flat).all():
        raise not_finite(name)
    return np.clip(flat, -_LARGEST, _LARGEST).astype("<f2").reshape(array.shape)
