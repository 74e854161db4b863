"""The float16 quantiser: half the bytes, about three decimal digits.

Values out of range are clipped to ±65504, float16's largest finite number, and not refused: one very large weight should not
cost the device's whole update, and with error feedback the rest is sent in later messages.
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
        """Checks the roles."""
        check_roles(self.roles)

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The input's specifications, the touched ones as float16."""
        touched = touched_specs(expected, self.roles)
        return tuple(_as_half(spec) if spec.name in touched else spec for spec in expected)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Rounds to float16. Raises ``ValueError`` for NaN and infinity."""
        touched = touched_arrays(tensors, self.roles, context)
        if not touched:
            return tensors, tensors
        halves = {name: _to_half(name, array) for name, array in touched.items()}
        held = {
            n: h.reshape(-1).astype(np.float32).astype(touched[n].dtype).reshape(h.shape) for n, h in halves.items()
        }
        return {**tensors, **halves}, {**tensors, **held}

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Converts back to the expected types."""
        touched = touched_specs(expected, self.roles)
        tensors = {}
        for spec in expected:
            if spec.name in touched:
                tensors[spec.name] = as_expected(as_float32(received(arrays, _as_half(spec))), spec)
            else:
                tensors[spec.name] = received(arrays, spec)
        return tensors


def _as_half(spec: ArraySpec) -> ArraySpec:
    """The specification as float16."""
    return msgspec.structs.replace(spec, dtype="<f2")


def _to_half(name: str, array: Array) -> Array:
    """The array rounded to float16, out-of-range values clipped."""
    flat = as_float32(array)
    if not np.isfinite(flat).all():
        raise not_finite(name)
    return np.clip(flat, -_LARGEST, _LARGEST).astype("<f2").reshape(array.shape)
