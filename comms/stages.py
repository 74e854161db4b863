"""Rules shared by the stages of a codec chain: which arrays a stage encodes, and how it checks its options and input.

A lossy stage keeps names and shapes. It encodes ("touches") the float arrays whose role is among its ``roles``, and passes
all others on as the same object: integers, symbols of an earlier stage, and arrays that a stage added, whose names hold a
``#`` (``"conv.weight#scale"``). An array without a role counts as a weight if it has two dimensions or more, else as a vector.

The weights of layers that are trained sparsely have the role ``sparse``, a sub-role of ``weight``: a stage for weights touches
them too, and a stage for ``sparse`` touches only them.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from .codec import Array, Arrays, ArraySpec, Context
from .errors import MismatchedPacket

StageRole = Literal["weight", "sparse", "vector", "statistic", "activation"]
ROLES: tuple[StageRole, ...] = get_args(StageRole)
_SUPER_ROLES = {"sparse": "weight"}


def check_roles(roles: Iterable[str]) -> None:
    """Raises ``ValueError`` unless ``roles`` holds at least one role, and only known ones."""
    wrong = [role for role in roles if role not in ROLES]
    if wrong or not tuple(roles):
        found = f"hold {wrong[0]!r}" if wrong else "are empty"
        raise ValueError(f"roles {found}; they must be among {', '.join(ROLES)}, and at least one")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises ``ValueError`` unless the value of the option ``name`` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def touched_specs(expected: tuple[ArraySpec, ...], roles: Iterable[str]) -> dict[str, ArraySpec]:
    """Specifications, by name, of the arrays that a stage for these roles encodes.

    Raises ``ValueError`` if the shape of one is not fixed, since it then has no positions and channels.
    """
    found = {s.name: s for s in expected if _touches(s.name, np.dtype(s.dtype), len(s.shape), s.role, roles)}
    check_fixed(found.values(), by="sparsifiers and quantisers")
    return found


def check_fixed(specs: Iterable[ArraySpec], *, by: str) -> None:
    """Raises ``ValueError`` for an array whose size depends on the data. ``by``: the stage that needs fixed shapes."""
    for spec in specs:
        if not spec.exact:
            raise ValueError(f"{spec.name!r} has no fixed shape; {by} must come before what made it")


def touched_arrays(tensors: Arrays, roles: Iterable[str], context: Context) -> dict[str, Array]:
    """The arrays, by name, that a stage for these roles encodes."""
    return {n: a for n, a in tensors.items() if _touches(n, a.dtype, a.ndim, context.roles.get(n, ""), roles)}


def _touches(name: str, dtype: np.dtype[np.generic], dimensions: int, role: str, roles: Iterable[str]) -> bool:
    """Whether a stage for these roles encodes this array."""
    role = role or ("weight" if dimensions >= 2 else "vector")
    is_among = role in roles or _SUPER_ROLES.get(role, role) in roles
    return dtype.kind == "f" and dtype.itemsize <= 8 and "#" not in name and is_among


def received(arrays: Arrays, spec: ArraySpec) -> Array:
    """Returns the received array of a specification. Raises ``MismatchedPacket`` if it is missing or does not fit."""
    if spec.name not in arrays:
        raise MismatchedPacket(f"{spec.name!r} is missing")
    array = arrays[spec.name]
    fits = array.shape == spec.shape if spec.exact else array.ndim == 1 and array.size <= spec.items
    if not fits or array.dtype != np.dtype(spec.dtype):
        raise MismatchedPacket(
            f"{spec.name!r} is {array.dtype.str} of shape {array.shape}, where {spec.dtype} of {spec.shape} is expected"
        )
    return array


def as_float32(array: Array) -> Array:
    """The array as flat, contiguous float32. Values out of range become infinite; the caller must check for them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.reshape(-1).astype(np.float32, copy=False)


def as_expected(flat: Array, spec: ArraySpec) -> Array:
    """Flat float32 values in the type and shape of ``spec``. Values out of the type's range become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return flat.astype(spec.dtype, copy=False).reshape(spec.shape)


def not_finite(name: str) -> ValueError:
    """The error for a tensor that holds values that are not finite."""
    return ValueError(
        f"tensor {name!r} holds NaN, infinity, or more than float32 can hold; only finite values can be sent"
    )
