"""Direct sparse convolutions on the CPU, as operators of the native library (``native.load``).

Passes of ``y = conv2d(x, w)`` in sparse training (Raihan, Aamodt, NeurIPS 2020, SWAT; ZeroFL, arXiv 2208.02507, section 3.1):

    forward        y  from dense x and the active weights
    input          gx from dense g = dL/dy and the same active weights
    weight         gw from dense g and the active elements of x; gw is dense

An element is active if its magnitude is at least the threshold. One that is not a number is active, too. Tensors are float32
in any memory format; results are channels last where x (or g) is, and else contiguous. The sums of a result are taken in one
order, so equal arguments give equal bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .packed import PackedWeight


def supports(layer: nn.Conv2d) -> bool:
    """True for stride 1 or 2, any kernel size, zero padding by numbers, no dilation, no groups, float32 on the CPU."""
    return (
        set(layer.stride) <= {1, 2}
        and not isinstance(layer.padding, str)
        and layer.padding_mode == "zeros"
        and set(layer.dilation) == {1}
        and layer.groups == 1
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
    )


def pack_filters(weight: Tensor, threshold: float) -> PackedWeight:
    """The active elements of ``weight`` [out, in, height, width]; ``threshold`` is above 0. One pass over the weight."""
    pointers, indices, values = torch.ops.fedbonsai_sparse.scan_rows(weight, threshold)
    return PackedWeight(pointers, indices, values, tuple(weight.shape))


def conv_forward(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The convolution of x [n, in, height, width] with the packed filters, plus ``bias`` [out]."""
    pointers, indices, values, shape = packed
    y: Tensor = torch.ops.fedbonsai_sparse.convolve(x, pointers, indices, values, bias, shape, stride, padding)
    return y


def conv_grad_input(
    g: Tensor, packed: PackedWeight, input_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The gradient of an input of this shape, from the gradient ``g`` of the output."""
    pointers, indices, values, shape = packed
    gx: Tensor = torch.ops.fedbonsai_sparse.convolve_transposed(
        g, pointers, indices, values, input_shape, shape, stride, padding
    )
    return gx


def conv_grad_weight(
    g: Tensor,
    x: Tensor,
    threshold: float,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """The gradient of a weight of this shape, contiguous, from ``g`` and the elements of x that ``threshold`` (> 0) leaves."""
    gw: Tensor = torch.ops.fedbonsai_sparse.convolution_weight(g, x, threshold, weight_shape, stride, padding)
    return gw
