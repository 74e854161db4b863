"""Conversions between torch tensors and the numpy arrays of packets, and memory formats as numbers.

A packet carries values in row-major order; the memory format of a tensor is sent beside it as one number. Kernels are chosen by
memory format: a convolution on the same values in another format may round differently, and which formats the operations of a
network produce depends on the processor (oneDNN returns channels_last if it is in use, the portable convolution does not).
Where a network is cut, activations and gradients must therefore arrive in the format that they were sent in. Otherwise the two
halves together do not compute the same bits as the whole network.

A format is the rank of the permutation of the axes, from the outermost to the innermost, in lexicographic order (Knuth, The Art
of Computer Programming, vol. 4A, sec. 7.2.1.2): 0 is row-major, channels_last of four axes is 3.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MOST_AXES = 12  # 12! fits into 32 bits


def as_tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """Tensors that share memory with ``arrays``. Arrays of a packet are read-only: do not write to their tensors."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns at each one; these are never written to.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Arrays that share memory with ``tensors``, which must be on the CPU."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def subtract(arrays: Mapping[str, npt.NDArray[Any]], others: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """``arrays - others`` by name, as tensors. (numpy would turn arrays without dimensions into plain numbers.)"""
    subtrahends = as_tensors({name: others[name] for name in arrays})
    return {name: tensor - subtrahends[name] for name, tensor in as_tensors(arrays).items()}


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 if its type is narrower (float16), else unchanged. Sums are taken in this type."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def in_numpy_type(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is in bfloat16, which numpy lacks, else unchanged."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def dense(tensor: Tensor) -> Tensor:
    """The tensor in dense form if it is sparse, else unchanged. Few operations accept both."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def numpy_name(dtype: torch.dtype) -> str:
    """numpy's name of a torch type, e.g. ``<f4``. Raises ``TypeError`` for a type that numpy does not have."""
    return np.dtype(torch.empty(0, dtype=dtype, device="cpu").numpy().dtype).str


def axis_order(tensor: Tensor) -> int:
    """The number of ``tensor``'s memory format; 0 (row-major) if it has more than 12 axes."""
    if tensor.dim() > _MOST_AXES:
        return 0
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])  # stable: equal strides keep the axes' order
    left, rank = list(range(tensor.dim())), 0
    for axis in order:
        position = left.index(axis)
        left.pop(position)
        rank += position * math.factorial(len(left))
    return rank


def in_axis_order(tensor: Tensor, rank: int) -> Tensor:
    """A dense copy of ``tensor`` in the memory format with number ``rank``.

    Raises ``ValueError`` if no format of that many axes has this number.
    """
    if not 0 <= rank < math.factorial(min(tensor.dim(), _MOST_AXES)):
        raise ValueError(f"memory format {rank} does not exist for a tensor with {tensor.dim()} axes")
    left, strides, stride = list(range(tensor.dim())), [0] * tensor.dim(), 1
    order = []
    for remaining in range(tensor.dim() - 1, -1, -1):
        position, rank = divmod(rank, math.factorial(remaining))
        order.append(left.pop(position))
    for axis in reversed(order):
        strides[axis] = stride
        stride *= max(1, tensor.shape[axis])
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)
