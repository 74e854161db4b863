"""What a training step needs beside its tensors: scratch memory inside operations, and a fit of the rest.

oneDNN computes a convolution in blocked layouts, and reorders tensors into copies of their own, which live for that operation.
Measured one by one under a limit of the data segment, a convolution needs its output and its weight; the gradient of its input
the output's gradient and the weight; and that of its weight the larger of the weight, and input and output's gradient together.
A dry run records these sizes where they occur (``scratch_bytes``), so that the peak with scratch is found at the operation
where tensors and scratch together are largest; which one that is depends on part and batch.

    needed = FACTOR x peak(tensors + scratch) + KERNEL_BYTES x kernels + FIXED_BYTES

``kernels`` are the convolutions with different shapes, forward and backward, for each of which oneDNN compiles code that stays.
(Below 16 samples a convolution of 1 x 1 takes none, and the prediction is too high.)
The constants were fitted to measured data segments by ``benchmarks/fit_memory.py``, on models other than those on which
``benchmarks/memory.py`` checks the prediction.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

# Of benchmarks/fit_memory.py.
FACTOR = 1.042
KERNEL_BYTES = 1_130_000
FIXED_BYTES = 600_000

aten = torch.ops.aten


def scratch_bytes(func: Any, args: tuple[Any, ...], result: Any) -> tuple[int, ...]:
    """Bytes that an operation needs inside itself, on top of its inputs and results, in turn; () for all that are not known."""
    if func is aten.convolution.default:
        return (_bytes(result) + _bytes(args[1]),)
    if func is aten.convolution_backward.default:
        gradient, inputs, weight = (_bytes(each) for each in args[:3])
        wants_weight = args[-1][1]
        return (gradient + inputs, weight) if wants_weight else (gradient + weight,)
    return ()


def kernel(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the code of an operation is compiled for: the operation, and its arguments, with the shapes of tensors."""
    return (func, *(tuple(each.shape) if isinstance(each, Tensor) else repr(each) for each in args))


def predicted_bytes(peak_with_scratch: int, *, num_kernels: int) -> int:
    """What a process needs above an idle one."""
    return int(FACTOR * peak_with_scratch) + KERNEL_BYTES * num_kernels + FIXED_BYTES


def _bytes(tensor: Tensor) -> int:
    return prod(tensor.shape) * tensor.element_size()
