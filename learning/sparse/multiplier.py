"""The products of a layer by the kernels that were measured as its fastest: native ones, torch's CSR, or dense ones."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..spec import LayerKernels
from .kernels import convolution, csr, linear
from .products import DENSE, Factors, Product, as_rows

_LINEAR: dict[str, ModuleType] = {"native": linear, "csr": csr}
_FEW_ROWS = 24  # with more, most columns have an active entry, and a weight gradient is not what takes long


@dataclass(frozen=True)
class KernelMultiplier:
    """Carries out each product by its kernel. Products of other types than float32, or not on the CPU, are dense.

    The weight is packed once for output and input gradient, if a sparse kernel carries out one of them.
    """

    chosen: LayerKernels

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> tuple[Tensor, Any]:
        """The output, and the packed weight."""
        name, threshold = self.chosen.kernels[0], product.weight_threshold
        if name == "dense" or threshold is None or not is_plain(x):
            return DENSE.output(x, weight, bias, product)
        packed, at = _pack(name, weight, threshold, product), product.convolution
        if at is not None:
            return convolution.conv_forward(x, packed, bias, at.stride, at.padding), packed
        rows: Tensor = _LINEAR[name].linear_forward(as_rows(x), packed, bias)
        return rows.reshape(*x.shape[:-1], rows.shape[1]), packed

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product, packed: Any) -> Tensor:
        """The gradient of the input."""
        name, threshold = self.chosen.kernels[1], product.weight_threshold
        if name == "dense" or threshold is None or not is_plain(x):
            return DENSE.input_gradient(gradient, x, weight, product, None)
        if packed is None or self.chosen.kernels[0] != name:
            packed = _pack(name, weight, threshold, product)
        at = product.convolution
        if at is not None:
            return convolution.conv_grad_input(gradient, packed, x.shape, at.stride, at.padding)
        found: Tensor = _LINEAR[name].linear_grad_input(as_rows(gradient), packed)
        return found.reshape(x.shape)

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product) -> Tensor:
        """The gradient of the weight."""
        name = self.chosen.kernels[2]
        threshold = product.activation_threshold(x) if name != "dense" and is_plain(x) else None
        if threshold is None:
            return DENSE.weight_gradient(gradient, x, weight, product)
        at, least = product.convolution, float(threshold)
        if at is not None:
            return convolution.conv_grad_weight(gradient, x, least, weight.shape, at.stride, at.padding)
        found: Tensor = _LINEAR[name].linear_grad_weight(as_rows(gradient), as_rows(x), least)
        return found

    def weight_factors(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product) -> Factors | None:
        """The gradient of a linear layer's weight as factors, for few rows."""
        if self.chosen.kernels[2] != "native" or product.convolution is not None or not is_plain(x):
            return None
        rows = as_rows(x)
        threshold = product.activation_threshold(x) if len(rows) <= _FEW_ROWS else None
        return None if threshold is None else Factors(weight, as_rows(gradient), rows, float(threshold))


def is_plain(x: Tensor) -> bool:
    """Whether sparse kernels can multiply with ``x``."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _pack(name: str, weight: Tensor, threshold: Tensor, product: Product) -> Any:
    """The active entries of a weight, in the form that a kernel reads."""
    held, least = weight.detach(), float(threshold)
    if product.convolution is not None:
        return convolution.pack_filters(held, least)
    return _LINEAR[name].pack_rows(held, least)
