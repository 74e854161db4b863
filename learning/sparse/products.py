"""The sparse products of a layer as autograd functions, after SWAT (Raihan and Aamodt, NeurIPS 2020, arXiv 2001.01969).

With ``T_w`` and ``T_a``, which set the entries of a weight and of an activation below their threshold to zero::

    forward           y = f(x, T_w(w))         the activation is dense
    input gradient    dx = f_x(dy, T_w(w))     the output's gradient is dense; the weights are those of the forward pass
    weight gradient   dw = f_w(dy, T_a(x))     dense: it moves all weights, also those that were left out

This is training of ZeroFL (Qiu et al., ICLR 2022, arXiv 2208.02507, eqs. 1 and 2). Nothing of the weight is lost: a weight that
was left out moves by its gradient, and takes part again once it is large enough. (Autograd on ``w * mask`` would stop its
gradient.)

The masked copies are made where they are needed, and not kept for the backward pass, which takes the layer's own weight and
input: the input is kept by other operations anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear

from .thresholds import masked


@dataclass(frozen=True)
class Geometry:
    """Arguments of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Product:
    """How a layer multiplies.

    ``weight_threshold``: None for a weight of which all entries take part. ``activation_threshold``: a function, called in the
    backward pass, since only the weight gradient needs it; it returns None where all entries take part. ``geometry``: of a
    convolution; None for a linear layer.
    """

    weight_threshold: Tensor | None
    activation_threshold: Callable[[Tensor], Tensor | None]
    geometry: Geometry | None = None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """The layer's output for ``x``. Under autocast products are in its type, as those of dense layers are.

    The weight is masked before it is converted, since it is compared in its own type everywhere.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return multiply(x.to(dtype), weight, bias, product)
    function = _Linear if product.geometry is None else _Convolution
    output: Tensor = function.apply(x, weight, bias, product)  # type: ignore[no-untyped-call]
    return output


class _Convolution(torch.autograd.Function):
    """A two-dimensional convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        at = product.geometry
        assert at is not None
        ctx.save_for_backward(x, weight)
        ctx.product, ctx.has_bias = product, bias is not None
        active = masked(weight, product.weight_threshold).to(x.dtype)
        bias = bias.to(x.dtype) if bias is not None else None
        return conv2d(x, active, bias, at.stride, at.padding, at.dilation, at.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        product: Product = ctx.product
        at = product.geometry
        assert at is not None
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_input = of_weight = of_bias = None
        if wants_input:
            active = masked(weight, product.weight_threshold).to(x.dtype)
            of_input, _, _ = _gradients(gradient, x, active, at, (True, False, False))
        if wants_weight:
            sparse = masked(x, product.activation_threshold(x))
            bias = ctx.has_bias and wants_bias
            _, of_weight, of_bias = _gradients(gradient, sparse, weight.to(x.dtype), at, (False, True, bias))
        elif wants_bias:
            of_bias = gradient.sum((0, 2, 3))
        return of_input, of_weight, of_bias, None


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, at: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The wanted ones among the gradients of input, weight and bias of a convolution."""
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        gradient, x, weight, [weight.shape[0]], at.stride, at.padding, at.dilation, False, [0, 0], at.groups, wanted
    )
    return found


class _Linear(torch.autograd.Function):
    """A linear layer on inputs of any number of axes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        bias = bias.to(x.dtype) if bias is not None else None
        return linear(x, masked(weight, product.weight_threshold).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        product: Product = ctx.product
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        rows = gradient.flatten(0, -2)
        of_input = gradient @ masked(weight, product.weight_threshold).to(x.dtype) if wants_input else None
        of_weight = rows.T @ masked(x, product.activation_threshold(x)).flatten(0, -2) if wants_weight else None
        return of_input, of_weight, rows.sum(0) if wants_bias else None, None
