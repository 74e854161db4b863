"""Precision and layout (memory format) of the computation.

Weights have a layout too: a convolution whose weights are in another one than its inputs copies them at every step.
"""

import torch
from torch import Tensor, nn

from ..spec import Layout, Precision


def autocast(precision: Precision) -> torch.autocast:
    """Autocast to bfloat16 on the CPU, enabled for "bf16" only."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def in_layout(inputs: Tensor, layout: Layout) -> Tensor:
    """Inputs in this layout if they have four axes and it is channels_last, else unchanged."""
    if layout == "channels_last" and inputs.dim() == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def model_in_layout(model: nn.Module, layout: Layout) -> nn.Module:
    """``model`` with its tensors of four axes in this layout; changed in place."""
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def has_layouts(model: nn.Module) -> bool:
    """Whether a layout changes anything that a model computes: whether it has weights of four axes, those of convolutions."""
    return any(parameter.dim() == 4 for parameter in model.parameters())
