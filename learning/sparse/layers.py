"""Layers with sparse products, and which layers of a model become such.

A sparse layer is the model's own layer with another class: names, tensors and initial weights stay. Every model of a run is
built with them, so training, both legs of a split plan, evaluation everywhere and costs run the same forward pass; there is no
model of the run without it. (Evaluated with its dense weights, a model that was trained sparsely is no better than chance: the
paper, sec. 4.3, gives 82 % and 10 %.)

In evaluation mode the threshold is that of the run's sparsity, exact at every call. In training mode it is that of the plan
(``Thresholds``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..spec import KernelTable, LayerKernels, Sparsity, kernel_key
from .kernels import linear, native
from .multiplier import KernelMultiplier
from .products import DENSE, Convolution, Factors, Multiplier, Product, multiply
from .thresholds import threshold

MultiplierOf = Callable[["SparseLayer", Sparsity], Multiplier]


class Thresholds:
    """The thresholds of all layers during one plan: exact every ``period`` steps, from the first one on, and kept in between.

    They belong to the plan. The next plan on the same modules starts with others, and so without any.

    Where the optimiser only adds each gradient to its weight, gradients of large linear layers are kept as their factors
    (``put_off``) until ``update`` adds these.
    """

    def __init__(
        self, sparsity: Sparsity | None, multiplier: MultiplierOf | None = None, *, only_adds: bool = False
    ) -> None:
        """``sparsity``: of the plan; None: each layer's own. ``multiplier``: in place of each layer's own, in any mode.

        ``only_adds``: whether the optimiser is SGD, and nothing else uses a gradient or a weight's history.
        """
        self.sparsity, self.multiplier, self.steps = sparsity, multiplier, 0
        self.put_off: list[Factors] | None = [] if only_adds else None
        self._kept: dict[tuple[int, str], tuple[int, Tensor]] = {}  # by layer and operand, with the step of the weights

    def step(self) -> None:
        """Count an optimiser step."""
        self.steps += 1

    def update(self, learning_rate: float) -> None:
        """Step the weights whose gradients were put off."""
        for each in self.put_off or ():
            linear.linear_update(each.weight, each.gradient, each.x, each.least, -learning_rate)
        self.drop()

    def drop(self) -> None:
        """Drop the gradients that were put off."""
        if self.put_off:
            self.put_off.clear()

    def of(self, layer: "SparseLayer", operand: str, x: Tensor, share: float) -> Tensor | None:
        """The threshold of an operand that leaves out ``share`` of it; None for 0."""
        if not share:
            return None
        sparsity = self.sparsity or layer.sparsity
        key, exact = (id(layer), operand), self.steps % sparsity.period == 0
        step, kept = self._kept.get(key, (-1, None))
        if kept is None or (exact and (operand == "activations" or step != self.steps)):
            kept = threshold(x, share)
            self._kept[key] = self.steps, kept
        return kept


class SparseLayer(nn.Module):
    """What sparse convolutions and sparse linear layers share.

    ``name``: in the model. ``sparsity``: of the run. ``kernels``: by ``kernel_key``, those that were measured for a weight
    of the shape ``measured_shape``; a narrowed layer has another, and its products are dense. ``thresholds``: of the plan that
    trains the layer; None outside of training.
    """

    weight: Tensor
    name: str
    sparsity: Sparsity
    kernels: Mapping[str, LayerKernels]
    measured_shape: torch.Size
    thresholds: Thresholds | None

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
        replaced = self.thresholds.multiplier if self.thresholds is not None else None  # of frozen layers too
        plan = self.thresholds if self.training else None
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


_SPARSE: dict[type[nn.Module], type[Any]] = {nn.Conv2d: SparseConv2d, nn.Linear: SparseLinear}


def make_sparse(model: nn.Module, sparsity: Sparsity, kernels: KernelTable | None = None) -> nn.Module:
    """Give the layers that ``sparsity`` names, or those that are eligible, sparse products, in place; returns ``model``.

    ``kernels``: of their products (None: dense ones). Raises ``ValueError`` for a name that the model does not have or that has
    no suitable layer, for a model without any, and for kernels that this machine does not have.
    """
    kernels = kernels or {}
    if any("native" in row.kernels for row in kernels.values()) and (missing := native.build()):
        raise ValueError(f"kernels.table has native kernels, and {missing}; allowed here: kernels.sparse: dense")
    for name, layer in (chosen(model, sparsity.layers) if sparsity.layers else eligible(model)).items():
        layer.__class__ = _SPARSE[type(layer)]
        assert isinstance(layer, SparseLayer)
        layer.name, layer.sparsity, layer.thresholds = name, sparsity, None
        layer.kernels, layer.measured_shape = kernels, layer.weight.shape
    return model


def eligible(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are sparse by default, by name: between the first and the last, convolutions above 1 x 1 and linear ones.

    Those are ZeroFL's for ResNet-18: 16 convolutions; the first one, the 1 x 1 ones of the short cuts and the classifier are
    dense. (In its network for FEMNIST the first convolution is sparse too; ``sparsity.layers`` names it.) Depthwise
    convolutions, which hold few weights, and layers whose weights are frozen or used by another module as well are left out.
    Raises ``ValueError`` if there are none.
    """
    layers: list[tuple[str, nn.Module]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    inner = layers[1:-1]
    found = {name: module for name, module in inner if not unfit(model, name, module) and _is_large(module)}
    if not found:
        raise ValueError(
            "training.sparsity is set, and no layer of this model can be sparse by default: no convolution above 1 x 1 and no "
            "linear layer is between its first and its last layer; training.sparsity.layers can name others"
        )
    return found


def chosen(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of these names, and all that are suitable inside modules of these names. Raises as ``make_sparse``."""
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in names:
        if name not in modules:
            layers = ", ".join(n for n, m in modules.items() if type(m) in _SPARSE) or "none"
            raise ValueError(
                f"training.sparsity.layers names {name!r}, which the model does not have; its layers: {layers}"
            )
        inside = {n: m for n, m in modules.items() if n == name or n.startswith(f"{name}.") or not name}
        fit = {n: m for n, m in inside.items() if not unfit(model, n, m)}
        if not fit:
            reason = unfit(model, name, modules[name])
            raise ValueError(f"training.sparsity.layers names {name!r}, which cannot be sparse: {reason}")
        found |= fit
    return found


def unfit(model: nn.Module, name: str, module: nn.Module) -> str:
    """Why a module cannot be sparse; "" if it can."""
    if type(module) not in _SPARSE:
        return f"it is a {type(module).__name__}; only torch's Conv2d and Linear can be"
    weight = module.get_parameter("weight")
    if not weight.requires_grad:
        return "its weight is frozen"
    if sum(any(p is weight for p in m.parameters(recurse=False)) for m in model.modules()) > 1:
        return "another module uses its weight too"
    parent = model.get_submodule(name.rpartition(".")[0])
    if type(parent).__module__.startswith("torch.nn.modules.") and not isinstance(
        parent, nn.Sequential | nn.ModuleList | nn.ModuleDict
    ):
        return f"a {type(parent).__name__} may use its weight without calling it"
    return ""


def _is_large(module: nn.Module) -> bool:
    """Whether a layer has more than one weight for each pair of channels, or is linear; not depthwise."""
    if isinstance(module, nn.Conv2d):
        return max(module.kernel_size) > 1 and module.groups == 1
    return True


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


def set_thresholds(model: nn.Module, thresholds: Thresholds | None) -> None:
    """Let all sparse layers of ``model`` use these thresholds in training mode (None: exact ones of their own)."""
    for _, layer in sparse_layers(model):
        layer.thresholds = thresholds


@contextmanager
def trained_with(model: nn.Module, sparsity: Sparsity | None, multiplier: MultiplierOf | None = None) -> Iterator[None]:
    """Inside, the sparse layers of ``model`` are trained by the sparsity of a plan. ``multiplier``: as in ``Thresholds``."""
    set_thresholds(model, Thresholds(sparsity, multiplier))
    try:
        yield
    finally:
        set_thresholds(model, None)
