"""Counts the FLOPs of sparse products, in a dry run: those of dense products, times what their kernels were measured to take.

A device's speed is one of dense training. A product that takes a third of the time of the dense one so counts as a third of its
FLOPs. Without measured kernels (products are then carried out with zeros) sparse training counts as dense training, and so do
products that ``multiplier`` carries out densely, as those under autocast.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..sparse.layers import SparseLayer
from ..sparse.multiplier import is_plain
from ..sparse.products import DENSE, Multiplier, Product
from ..spec import LayerKernels, Sparsity
from .flops import counted_as


def counted(layer: SparseLayer, sparsity: Sparsity) -> Multiplier:
    """What stands for the multiplier of a layer in a dry run."""
    return CountedMultiplier(layer.row(sparsity) or LayerKernels())


@dataclass(frozen=True)
class CountedMultiplier:
    """Multiplies with zeros, and counts each product as the share of its FLOPs that its kernel takes of their time."""

    chosen: LayerKernels

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> tuple[Tensor, Any]:
        """The output."""
        with counted_as(self._share(0, x)):
            return DENSE.output(x, weight, bias, product)

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product, packed: Any) -> Tensor:
        """The gradient of the input."""
        with counted_as(self._share(1, x)):
            return DENSE.input_gradient(gradient, x, weight, product, packed)

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product) -> Tensor:
        """The gradient of the weight."""
        with counted_as(self._share(2, x)):
            return DENSE.weight_gradient(gradient, x, weight, product)

    def weight_factors(self, gradient: Tensor, x: Tensor, weight: Tensor, product: Product) -> None:
        """None: a dry run makes all gradients."""

    def _share(self, product: int, x: Tensor) -> float:
        """Of its FLOPs, what a product with ``x`` counts."""
        return self.chosen.times[product] if is_plain(x) else 1.0
