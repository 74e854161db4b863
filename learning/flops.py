"""FLOP formulas that torch's counter lacks or has wrong: the CPU's fused attention and recurrent layers, and the backward
pass of grouped convolutions (as of torch 2.13 it counts those of MobileNet as if they had one group: 20 times too many).

A multiply-accumulate is two. The counter hands over shapes in place of tensors.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

Shape = tuple[int, ...]
aten = torch.ops.aten


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


def _recurrent(inputs: Shape, weight: Shape, recurrent: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """[time, batch, features], and two matrices that each step of each sample is multiplied with once."""
    return 2 * inputs[0] * inputs[1] * (prod(weight) + prod(recurrent))


def _recurrent_backward(
    inputs: Shape, weight: Shape, recurrent: Shape, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Gradients of inputs and of weights: each as much as the forward pass."""
    return 2 * _recurrent(inputs, weight, recurrent)


def _convolution_backward(
    gradient: Shape,
    inputs: Shape,
    weight: Shape,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
    out_shape: Any = None,
) -> int:
    """Gradients of input and of weight each use every multiplication of the forward pass once."""
    forward = int(conv_flop_count(list(inputs), list(weight), list(gradient), transposed=transposed))
    return (wanted[0] + wanted[1]) * forward


FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    aten.convolution_backward: _convolution_backward,
}


def flop_counter() -> FlopCounterMode:
    """A silent counter that knows all of these; read it with ``get_total_flops()``."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)
