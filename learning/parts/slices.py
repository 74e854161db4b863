"""The elements of full tensors that a narrow model holds, by index: taken out, put back, and moved from one map to another.

A *slice* of a tensor has one entry for each dimension: the ascending indices that are held, or None for all. The elements are
those at all combinations of these indices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .channels import ChannelGroups, check_map

Array = NDArray[Any]
Slice = tuple[NDArray[np.int64] | None, ...]


def slices(groups: ChannelGroups, kept: NDArray[np.bool_]) -> dict[str, Slice]:
    """The slice of each tensor of which a narrow model holds only a part; other tensors are not listed.

    Trailing dimensions that no channel can be removed from have no entry of their own: they are held whole. Raises
    ``ValueError`` if the map does not fit.
    """
    check_map(groups, kept)
    lookup = np.append(kept, True)  # the owner -1 of indices that stay reads the last entry
    found: dict[str, Slice] = {}
    for name, owners in groups.owners.items():
        held = {dimension: lookup[owner] for dimension, owner in owners.items()}
        part = {dimension: np.flatnonzero(each) for dimension, each in held.items() if not each.all()}
        if part:
            found[name] = tuple(part.get(dimension) for dimension in range(max(part) + 1))
    return found


def sliced_shape(shape: Sequence[int], part: Slice) -> tuple[int, ...]:
    """The shape of a slice of a tensor of ``shape``. Raises ``ValueError`` for a slice that does not fit it."""
    if len(part) > len(shape):
        raise ValueError(f"a slice of {len(part)} dimensions does not fit a tensor of {len(shape)}")
    sizes = list(shape)
    for dimension, index in enumerate(part):
        if index is not None:
            if index.size and not (index[0] >= 0 and index[-1] < shape[dimension]):
                raise ValueError(
                    f"a slice holds the indices {index[0]} to {index[-1]} of dimension {dimension}, "
                    f"which has {shape[dimension]}"
                )
            sizes[dimension] = index.size
    return tuple(sizes)


def _split(part: Slice) -> tuple[tuple[slice, ...], dict[int, NDArray[np.int64]]]:
    """A slice as ranges, and the indices of the dimensions where these are no range."""
    ranges, scattered = [], {}
    for dimension, index in enumerate(part):
        if index is None:
            ranges.append(slice(None))
        elif index.size and index[-1] - index[0] + 1 != index.size:
            scattered[dimension] = index
            ranges.append(slice(None))
        else:
            first = int(index[0]) if index.size else 0
            ranges.append(slice(first, first + index.size))
    return tuple(ranges), scattered


def gather(full: Tensor, part: Slice) -> Tensor:
    """Copy a slice of ``full``. The copy is row-major, on the same device, and without gradient.

    Raises ``ValueError`` for a slice that does not fit.
    """
    sliced_shape(full.shape, part)
    ranges, scattered = _split(part)
    taken = full.detach()[ranges] if ranges else full.detach()
    for dimension, index in scattered.items():
        taken = taken.index_select(dimension, torch.from_numpy(index).to(taken.device))
    return taken.contiguous() if scattered else taken.clone(memory_format=torch.contiguous_format)


def put(full: Tensor, part: Slice, values: Tensor) -> None:
    """Write ``values`` into a slice of ``full``, in place. Raises ``ValueError`` for a slice or values that do not fit."""
    if values.shape != (shape := sliced_shape(full.shape, part)):
        raise ValueError(f"values of shape {tuple(values.shape)} do not fit a slice of shape {shape}")
    ranges, scattered = _split(part)
    target, values = full.detach()[ranges] if ranges else full.detach(), values.detach().to(full.dtype)
    if not scattered:
        target.copy_(values)
    elif len(scattered) == 1:
        ((dimension, index),) = scattered.items()
        target.index_copy_(dimension, torch.from_numpy(index).to(full.device), values)
    else:
        indices = [scattered.get(d, np.arange(target.shape[d])) for d in range(max(scattered) + 1)]
        target[tuple(torch.from_numpy(index).to(full.device) for index in np.ix_(*indices))] = values


def gather_array(full: Array, part: Slice) -> Array:
    """Copy a slice of an array, row-major. Raises ``ValueError`` for a slice that does not fit."""
    sliced_shape(full.shape, part)
    ranges, scattered = _split(part)
    taken = full[ranges]
    for dimension, index in scattered.items():
        taken = taken.take(index, axis=dimension)
    return np.ascontiguousarray(taken) if scattered else taken.copy(order="C")


def shared_items(shape: Sequence[int], one: Slice, other: Slice) -> int:
    """The number of elements of a tensor of ``shape`` that two slices both hold; () as a slice is the whole tensor."""
    count = 1
    for dimension, size in enumerate(shape):
        held = [part[dimension] for part in (one, other) if dimension < len(part)]
        indices = [index for index in held if index is not None]
        if len(indices) == 2:
            count *= np.intersect1d(indices[0], indices[1], assume_unique=True).size
        else:
            count *= indices[0].size if indices else size
    return count


def move_array(old: Array, old_part: Slice, new_part: Slice, *, shape: Sequence[int]) -> Array:
    """The values of one slice of a tensor as those of another one: elements that both hold are copied, the others are 0.

    ``old``: values of ``old_part``; ``shape``: of the full tensor; () as a part is the whole tensor. Raises ``ValueError`` for
    slices that do not fit.
    """
    if old.shape != (needed := sliced_shape(shape, old_part)):
        raise ValueError(f"values of shape {old.shape} do not fit a slice of shape {needed}")
    new = np.zeros(sliced_shape(shape, new_part), dtype=old.dtype)
    sources, targets = [], []
    for dimension, size in enumerate(shape):
        before, after = (
            np.arange(size) if dimension >= len(part) or (index := part[dimension]) is None else index
            for part in (old_part, new_part)
        )
        _, source, target = np.intersect1d(before, after, assume_unique=True, return_indices=True)
        sources.append(source)
        targets.append(target)
    if shape:
        new[np.ix_(*targets)] = old[np.ix_(*sources)]
    else:
        new[()] = old
    return new
