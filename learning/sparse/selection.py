"""Which layers of a model have sparse products: those that the configuration names, or those that are eligible."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..spec import KernelTable, Sparsity
from .kernels import native
from .layers import SparseConv2d, SparseLayer, SparseLinear

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
        layer.name, layer.sparsity, layer.state = name, sparsity, None
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
