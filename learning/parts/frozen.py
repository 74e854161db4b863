"""What of a model its author has frozen: parameters with ``requires_grad`` off, as in a pretrained base under adapters.

They are neither trained nor sent: both ends of a link build the model from the same settings and hold equal ones, which a hash
checks. A module all of whose own parameters are frozen runs in evaluation mode, and its buffers are frozen with it, so that
frozen normalisation keeps its statistics. (torch by itself would go on updating them; that is seldom meant, and would differ
from device to device.)
"""

from collections.abc import Iterator

from torch import nn


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the parameters and buffers that no training of ``model`` changes, every name of a tied one."""
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if _is_frozen(module):
            names |= {f"{prefix}.{name}".lstrip(".") for name, buffer in module.named_buffers(recurse=False)}
    return names


def frozen_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that run in evaluation mode while ``model`` is trained."""
    return (module for module in model.modules() if _is_frozen(module))


def _is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, and all of them are frozen."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)
