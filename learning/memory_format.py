"""The order in which a tensor's axes lie in memory, as one number, so that it can cross a process boundary.

Kernels are chosen by memory format: a convolution on the same values in another format may round differently, and which
formats a network's own operations produce depends on the processor (oneDNN returns channels_last where it is in use, the
portable convolution does not). Where a network is cut, what crosses the cut must therefore arrive in the format that it had,
or both halves together do not compute the bits of the whole.

A format is the rank of the permutation of the axes, from the outermost to the innermost, in lexicographic order (Knuth, The Art
of Computer Programming, vol. 4A, sec. 7.2.1.2): 0 is row-major, channels_last of four axes is 3.
"""

import math

import torch
from torch import Tensor

_MOST_AXES = 12  # 12! fits into 32 bits


def axis_order(tensor: Tensor) -> int:
    """The number of ``tensor``'s memory format; 0 (row-major) where it has more than 12 axes."""
    if tensor.dim() > _MOST_AXES:
        return 0
    strides = tensor.stride()
    order = sorted(
        range(tensor.dim()), key=lambda axis: -strides[axis]
    )  # stable: equal strides in the order of the axes
    left, rank = list(range(tensor.dim())), 0
    for axis in order:
        position = left.index(axis)
        left.pop(position)
        rank += position * math.factorial(len(left))
    return rank


def in_axis_order(tensor: Tensor, rank: int) -> Tensor:
    """A dense copy of ``tensor`` in memory of its own, in the memory format of that number.

    Raises ``ValueError`` for a number that no format of so many axes has.
    """
    if not 0 <= rank < math.factorial(min(tensor.dim(), _MOST_AXES)):
        raise ValueError(f"memory format {rank} is none of a tensor with {tensor.dim()} axes")
    left, strides, stride = list(range(tensor.dim())), [0] * tensor.dim(), 1
    order = []
    for remaining in range(tensor.dim() - 1, -1, -1):
        position, rank = divmod(rank, math.factorial(remaining))
        order.append(left.pop(position))
    for axis in reversed(order):
        strides[axis] = stride
        stride *= max(1, tensor.shape[axis])
    made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)
