"""Narrows a model: removes channels from its tensors and sets the sizes of its layers accordingly."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..parts.channels import ChannelGroups
from ..parts.slices import gather, slices


def narrow(model: nn.Module, groups: ChannelGroups, kept: NDArray[np.bool_]) -> None:
    """Remove from ``model`` the channels that the map ``kept`` leaves out, in place.

    ``model`` has the full width, and the structure that ``groups`` were found in; it may be on the meta device. Its narrowed
    parameters and buffers are new tensors, tied ones stay tied. A model is narrowed before it is cut into blocks, which may
    refer to the old ones. Raises ``ValueError`` if the map does not fit.
    """
    new: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the old tensor, which is kept alive with it
    made: set[int] = set()
    touched: dict[nn.Module, None] = {}
    for name, part in slices(groups, kept).items():
        path, _, field = name.rpartition(".")
        module = model.get_submodule(path)
        touched[module] = None
        tensor = getattr(module, field)
        if id(tensor) in made:  # a module with two names
            continue
        if id(tensor) not in new:
            narrowed = gather(tensor, part)
            if isinstance(tensor, nn.Parameter):
                narrowed = nn.Parameter(narrowed, requires_grad=tensor.requires_grad)
            new[id(tensor)] = tensor, narrowed
            made.add(id(narrowed))
        setattr(module, field, new[id(tensor)][1])
    for module in touched:
        _set_sizes(module)


def _set_sizes(module: nn.Module) -> None:
    """Set the sizes that ``module`` keeps as numbers to those of its tensors."""
    own = {**module._parameters, **module._buffers}
    sizes = next(tensor.shape for tensor in own.values() if tensor is not None and tensor.dim())
    if isinstance(module, _ConvNd):
        module.out_channels, module.in_channels = sizes[0], sizes[1]
        if module.groups > 1:  # one filter for each channel
            module.in_channels = module.groups = sizes[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = sizes
    elif isinstance(module, _BatchNorm | _InstanceNorm):
        module.num_features = sizes[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = sizes[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(sizes)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = sizes[0]


class _Divide:
    """A forward hook that divides a layer's output while the layer is in training mode."""

    def __init__(self, width: float) -> None:
        self.width = width

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output / self.width if module.training else output


def scale_outputs(model: nn.Module, groups: ChannelGroups, width: float) -> None:
    """Divide the outputs of the layers that produce groups by ``width`` while they are in training mode, by forward hooks.

    This is HeteroFL's scaler (Diao et al., arXiv 2010.01264). A narrow layer adds up fewer products than the full one; the
    division makes up for it, so that models of all widths train weights of the same size.
    """
    layers = {name.rpartition(".")[0] for names in groups.producers for name in names}
    for module in {model.get_submodule(layer): None for layer in sorted(layers)}:
        module.register_forward_hook(_Divide(width))
