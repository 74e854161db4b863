"""What the stages of a lossy chain agree on: which arrays a stage touches, and what it checks before it does.

A stage keeps names and shapes. It touches float arrays whose role is among its ``roles``; everything else passes as the
same object: integers, what another stage has turned into symbols, and what stages add themselves, whose names hold a
``#`` (``"conv.weight#scale"``). Where no role is given, two dimensions or more mean a weight, fewer a vector.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from .codec import Array, Arrays, ArraySpec, Context
from .errors import MismatchedPacket

StageRole = Literal["weight", "vector", "statistic", "activation"]
ROLES: tuple[StageRole, ...] = get_args(StageRole)


def check_roles(roles: Iterable[str]) -> None:
    """Raise ``ValueError`` unless these are roles of tensors, at least one."""
    wrong = [role for role in roles if role not in ROLES]
    if wrong or not tuple(roles):
        found = f"hold {wrong[0]!r}" if wrong else "are empty"
        raise ValueError(f"roles {found}; they must be among {', '.join(ROLES)}, and at least one")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ``ValueError`` unless the option's value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def touched_specs(expected: tuple[ArraySpec, ...], roles: Iterable[str]) -> dict[str, ArraySpec]:
    """The specifications, by name, of what a stage for these roles touches.

    Raises ``ValueError`` for one whose shape is not fixed: positions and channels mean nothing there.
    """
    found = {s.name: s for s in expected if _touches(s.name, np.dtype(s.dtype), len(s.shape), s.role, roles)}
    check_fixed(found.values(), by="sparsifiers and quantisers")
    return found


def check_fixed(specs: Iterable[ArraySpec], *, by: str) -> None:
    """Raise ``ValueError`` for an array whose size depends on the data, which ``by`` cannot take."""
    for spec in specs:
        if not spec.exact:
            raise ValueError(f"{spec.name!r} has no fixed shape; {by} must come before what made it")


def touched_arrays(tensors: Arrays, roles: Iterable[str], context: Context) -> dict[str, Array]:
    """The arrays, by name, that a stage for these roles touches."""
    return {n: a for n, a in tensors.items() if _touches(n, a.dtype, a.ndim, context.roles.get(n, ""), roles)}


def _touches(name: str, dtype: np.dtype[np.generic], dimensions: int, role: str, roles: Iterable[str]) -> bool:
    role = role or ("weight" if dimensions >= 2 else "vector")
    return dtype.kind == "f" and dtype.itemsize <= 8 and "#" not in name and role in roles


def received(arrays: Arrays, spec: ArraySpec) -> Array:
    """The array that a specification names; raises ``MismatchedPacket`` where it is missing or another."""
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
    """Flat and contiguous; what is too large becomes infinite, for the caller to refuse."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.reshape(-1).astype(np.float32, copy=False)


def as_expected(flat: Array, spec: ArraySpec) -> Array:
    """Flat float32 in the expected type and shape; what is too large for the type becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return flat.astype(spec.dtype, copy=False).reshape(spec.shape)


def not_finite(name: str) -> ValueError:
    """The error for a tensor that cannot be coded."""
    return ValueError(
        f"tensor {name!r} holds NaN, infinity, or more than float32 can hold; only finite values can be sent"
    )
