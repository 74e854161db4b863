"""The sparse products of a layer as an autograd function, after SWAT (Raihan and Aamodt, NeurIPS 2020, arXiv 2001.01969).

With ``T_w`` and ``T_a``, which set the entries of a weight and of an activation below their threshold to zero::

    output            y = f(x, T_w(w))         the activation is dense
    input gradient    dx = f_x(dy, T_w(w))     the output's gradient is dense; the weights are those of the output
    weight gradient   dw = f_w(dy, T_a(x))     dense: it moves all weights, also those that were left out

This is training of ZeroFL (Qiu et al., ICLR 2022, arXiv 2208.02507, eqs. 1 and 2). Nothing of the weight is lost: a weight that
was left out moves by its gradient, and takes part again once it is large enough. (Autograd on ``w * mask`` would stop its
gradient.)

``Multiplier`` carries the products out: with zeros (``DENSE``), or by sparse kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear

from .thresholds import masked


@dataclass(frozen=True)
class Convolution:
    """Arguments of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Product:
    """How a layer multiplies.

    ``weight_threshold``: None for a weight of which all entries take part. ``activation_threshold``: a function, called in the
    backward pass, since only the weight gradient needs it; it returns None where all entries take part. ``convolution``: None
    for a linear layer. ``put_off``: where weight gradients are put as their factors, if the optimiser takes those (None: it
    needs all gradients).
    """

    weight_threshold: Tensor | None
    activation_threshold: Callable[[Tensor], Tensor | None]
    convolution: Convolution | None
    multiplier: "Multiplier"
    put_off: "list[Factors] | None" = None


@dataclass(frozen=True)
class Factors:
    """A weight's gradient as two factors, with which a weight can be updated without making the gradient.

    ``gradient`` [n, out] of the output, and ``x`` [n, in], of which entries from ``least`` on count.
    """

    weight: Tensor
    gradient: Tensor
    x: Tensor
    least: float


class Multiplier(Protocol):
    """Carries out the three products. ``packed``: what ``output`` keeps of the weight for ``input_gradient``."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> tuple[Tensor, Any]:
        """The output, and the packed weight."""
        ...

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product, packed: Any) -> Tensor:
        """The gradient of the input ``x``, of which only shape and type matter."""
        ...

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product) -> Tensor:
        """The gradient of the weight, of which only the shape matters."""
        ...

    def weight_factors(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product) -> "Factors | None":
        """The same as factors, where updating the weight with these takes less time; None elsewhere."""
        ...


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """The layer's output for ``x``. Under autocast products are in its type, as those of dense layers are.

    The weight is masked before it is converted, since it is compared in its own type everywhere.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return multiply(x.to(dtype), weight, bias, product)
    output: Tensor = _Product.apply(x, weight, bias, product)  # type: ignore[no-untyped-call]
    return output


def as_rows(x: Tensor) -> Tensor:
    """[..., n] as [rows, n]; a vector is one row."""
    return x.reshape(-1, x.shape[-1])


class _Product(torch.autograd.Function):
    """A layer's products. Weight and input are kept, which other operations keep anyway, and no masked copy of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        output, ctx.packed = product.multiplier.output(x, weight, bias, product)
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        product: Product = ctx.product
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_input = of_weight = of_bias = None
        if wants_input:
            of_input = product.multiplier.input_gradient(gradient, x, weight, product, ctx.packed)
        if wants_weight:
            by, later = product.multiplier, product.put_off
            factors = by.weight_factors(gradient, x, weight, product) if later is not None else None
            if later is not None and factors is not None:
                later.append(factors)
            else:
                of_weight = by.weight_gradient(gradient, x, weight, product)
        if wants_bias:
            of_bias = gradient.sum((0, 2, 3)) if product.convolution is not None else as_rows(gradient).sum(0)
        return of_input, of_weight, of_bias, None


class DenseMultiplier:
    """Multiplies with zeros in place of what is left out; the masked copies are made where they are needed."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> tuple[Tensor, None]:
        """The output; nothing is packed."""
        active, at = masked(weight, product.weight_threshold).to(x.dtype), product.convolution
        bias = bias.to(x.dtype) if bias is not None else None
        if at is None:
            return linear(x, active, bias), None
        return conv2d(x, active, bias, at.stride, at.padding, at.dilation, at.groups), None

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product, packed: Any) -> Tensor:
        """The gradient of the input."""
        active, at = masked(weight, product.weight_threshold).to(x.dtype), product.convolution
        if at is None:
            return gradient @ active
        return _gradients(gradient, x, active, at, (True, False, False))[0]

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product) -> Tensor:
        """The gradient of the weight."""
        sparse, at = masked(x, product.activation_threshold(x)), product.convolution
        if at is None:
            return as_rows(gradient).T @ as_rows(sparse)
        return _gradients(gradient, sparse, weight.to(x.dtype), at, (False, True, False))[1]

    def weight_factors(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product) -> None:
        """None: gradients are made."""


DENSE = DenseMultiplier()


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, at: Convolution, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The wanted ones among the gradients of input, weight and bias of a convolution."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gradient, x, weight, [weight.shape[0]], at.stride, at.padding, at.dilation, False, [0, 0], at.groups, wanted
    )
    return found
