"""FLOPs of the operations that are executed. A multiply-accumulate counts as two; element-wise work is left out.

The formulas are torch's, plus our own where its table lacks an operation or is wrong: the CPU's fused attention and recurrent
layers, and the backward pass of grouped convolutions (torch 2.13 counts those of MobileNet as if they had one group: 20 times
too many). Torch's own counter is not used, since its first operation imports torch's compiler, which takes seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

Shape = tuple[int, ...]
aten = torch.ops.aten


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


def _recurrent(inputs: Shape, weight: Shape, recurrent: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Inputs [time, batch, features]; each step of each sample is multiplied once with both matrices."""
    return 2 * inputs[0] * inputs[1] * (prod(weight) + prod(recurrent))


def _recurrent_backward(
    inputs: Shape, weight: Shape, recurrent: Shape, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Gradients of inputs and of weights each cost as much as the forward pass."""
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


# The wrapper passes shapes instead of tensors.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),  # type: ignore[no-untyped-call]
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),  # type: ignore[no-untyped-call]
    aten.mkldnn_rnn_layer: shape_wrapper(_recurrent),  # type: ignore[no-untyped-call]
    aten.mkldnn_rnn_layer_backward: shape_wrapper(_recurrent_backward),  # type: ignore[no-untyped-call]
    aten.convolution_backward: shape_wrapper(_convolution_backward),  # type: ignore[no-untyped-call]
}


_share = ContextVar("share", default=1.0)


@contextmanager
def counted_as(share: float) -> Iterator[None]:
    """Inside, operations count as this share of their FLOPs."""
    before = _share.set(share)
    try:
        yield
    finally:
        _share.reset(before)


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs of all operations inside the mode in ``total``."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        """Start at 0."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See ``memory.Allocations``."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count its FLOPs."""
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.total += int(_share.get() * formula(*args, **(kwargs or {}), out_val=result))
        return result
