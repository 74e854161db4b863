"""Layers with sparse products.

A sparse layer is the model's own layer with another class: names, tensors and initial weights stay. Every model of a run is
built with them, so training, both legs of a split plan, evaluation everywhere and costs run the same forward pass; there is no
model of the run without it. (Evaluated with its dense weights, a model that was trained sparsely is no better than chance: the
paper, sec. 4.3, gives 82 % and 10 %.)

In evaluation mode the threshold is that of the run's sparsity, exact at every call. In training mode it is that of the plan
(``state``).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..spec import LayerKernels, Sparsity, kernel_key
from .multiplier import KernelMultiplier
from .products import DENSE, Convolution, Multiplier, Product, multiply
from .state import MultiplierOf, SparseTraining
from .thresholds import threshold


class SparseLayer(nn.Module):
    """What sparse convolutions and sparse linear layers share.

    ``name``: in the model. ``sparsity``: of the run. ``kernels``: by ``kernel_key``, those that were measured for a weight
    of the shape ``measured_shape``; a narrowed layer has another, and its products are dense. ``state``: of the plan that
    trains the layer; None outside of training.
    """

    weight: Tensor
    name: str
    sparsity: Sparsity
    kernels: Mapping[str, LayerKernels]
    measured_shape: torch.Size
    state: SparseTraining | None

    def multiplier(self, sparsity: Sparsity) -> Multiplier:
        """What carries out the products at a sparsity."""
        row = self.row(sparsity)
        return KernelMultiplier(row) if row is not None else DENSE

    def row(self, sparsity: Sparsity) -> LayerKernels | None:
        """The kernels at a sparsity; None where none were measured."""
        if not self.kernels or self.weight.shape != self.measured_shape:
            return None
        return self.kernels.get(kernel_key(self.name, sparsity))

    def product(self, weight: Tensor, convolution: Convolution | None = None) -> Product | None:
        """How to multiply with ``weight`` now; None for the dense product of a sparsity of 0."""
        replaced = self.state.multiplier if self.state is not None else None  # of frozen layers too
        plan = self.state if self.training else None
        sparsity = (plan.sparsity if plan is not None else None) or self.sparsity
        if not sparsity.weights and not (sparsity.activations and self.training):
            return None

        def of(operand: str, x: Tensor, share: float) -> Tensor | None:
            if plan is not None:
                return plan.of(self, operand, x, share)
            return threshold(x, share) if share else None

        return Product(
            of("weights", weight, sparsity.weights),
            lambda x: of("activations", x, sparsity.activations),
            convolution,
            replaced(self, sparsity) if replaced is not None else self.multiplier(sparsity),
            plan.put_off if plan is not None else None,
        )


class SparseConv2d(SparseLayer, nn.Conv2d):
    """A convolution whose products are sparse."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [n, in, h, w] to [n, out, h', w']."""
        product = None if self.weight.is_meta else self.product(self.weight, self._convolution())
        if product is None:
            return nn.Conv2d.forward(self, input)
        if input.dim() == 3:  # an image without the dimension of samples
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        return multiply(input, self.weight, self.bias, product)

    def _convolution(self) -> Convolution:
        """Its arguments; padding that it cannot do itself is done before it."""
        padding = self.padding
        within = not isinstance(padding, str) and self.padding_mode == "zeros"
        return Convolution(self.stride, padding if within else (0, 0), self.dilation, self.groups)  # type: ignore[arg-type]


class SparseLinear(SparseLayer, nn.Linear):
    """A linear layer whose products are sparse."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        product = None if self.weight.is_meta else self.product(self.weight)
        return nn.Linear.forward(self, input) if product is None else multiply(input, self.weight, self.bias, product)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """The sparse layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseLayer))


def make_packable(model: nn.Module) -> None:
    """Make the weights that native kernels pack contiguous in a model in channels_last format. (Activations stay in it.)

    Those kernels read contiguous weights, and their weight gradients are contiguous, which an optimiser steps faster with.
    """
    for _, layer in sparse_layers(model):
        if any("native" in row.kernels for row in layer.kernels.values()):
            layer.weight.data = layer.weight.data.contiguous()


def set_state(model: nn.Module, state: SparseTraining | None) -> None:
    """Set the state that all sparse layers of ``model`` use in training mode (None: exact thresholds of their own)."""
    for _, layer in sparse_layers(model):
        layer.state = state


@contextmanager
def trained_with(model: nn.Module, sparsity: Sparsity | None, multiplier: MultiplierOf | None = None) -> Iterator[None]:
    """Inside, the sparse layers of ``model`` are trained by a plan's sparsity. ``multiplier``: as in ``SparseTraining``."""
    set_state(model, SparseTraining(sparsity, multiplier))
    try:
        yield
    finally:
        set_state(model, None)
