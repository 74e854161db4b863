"""Products of a layer ``y = x w^T + bias`` with its active weights and activations, by the native library (``native.load``).

The passes, and what is active, are those of ``convolution``. Tensors have two dimensions; leading ones are flattened by the
caller.
"""

import torch
from torch import Tensor, nn

from .packed import PackedWeight


def supports(layer: nn.Linear) -> bool:
    """True for float32 on the CPU."""
    return layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def pack_rows(weight: Tensor, threshold: float) -> PackedWeight:
    """The active elements of ``weight`` [out, in]; ``threshold`` is above 0. One pass over the weight."""
    pointers, indices, values = torch.ops.fedbonsai_sparse.scan_rows(weight, threshold)
    return PackedWeight(pointers, indices, values, tuple(weight.shape))


def linear_forward(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [n, in] times the packed weight, plus ``bias`` [out]."""
    pointers, indices, values, shape = packed
    y: Tensor = torch.ops.fedbonsai_sparse.multiply(x, pointers, indices, values, bias, shape[1])
    return y


def linear_grad_input(g: Tensor, packed: PackedWeight) -> Tensor:
    """The gradient [n, in] of the input, from the gradient ``g`` [n, out] of the output."""
    pointers, indices, values, shape = packed
    gx: Tensor = torch.ops.fedbonsai_sparse.multiply_transposed(g, pointers, indices, values, shape[1])
    return gx


def linear_grad_weight(g: Tensor, x: Tensor, threshold: float) -> Tensor:
    """The gradient [out, in] of the weight, from ``g`` and the elements of x [n, in] that ``threshold`` (> 0) leaves."""
    gw: Tensor = torch.ops.fedbonsai_sparse.outer_product(g, x, threshold)
    return gw


def linear_update(weight: Tensor, g: Tensor, x: Tensor, threshold: float, scale: float) -> None:
    """Add ``scale`` times ``linear_grad_weight(g, x, threshold)`` to ``weight`` in place, without making that gradient.

    With ``scale`` = -learning rate this is a step of SGD without momentum and weight decay. Only columns where x has an active
    element are read and written. For batches of dozens of samples, and for others that make most columns active, it is of
    no use.
    """
    torch.ops.fedbonsai_sparse.add_outer_product_(weight.detach(), g, x, threshold, scale)
