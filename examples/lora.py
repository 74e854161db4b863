"""Low-rank adapters on a frozen base (LoRA: Hu et al., ICLR 2022, arXiv 2106.09685): devices train and send the adapters alone.

Parameters are frozen by torch's own ``requires_grad_(False)``; no other setting is needed. Frozen parameters keep their initial
values, are neither trained nor sent, and are taken into account in memory and FLOPs. The pretrained base is loaded by
``init:``; with ``missing: keep`` the adapters, which the file lacks, keep their initial values. See examples/adapters.yaml.
"""

import math

import torch
from fedbonsai.learning.models.cnn import digits_cnn
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A frozen layer W with a trained update of low rank: x -> W x + b + B A x / rank, where B starts at zero."""

    def __init__(self, base: nn.Linear, *, rank: int) -> None:
        super().__init__(base.in_features, base.out_features)
        self.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.rank = rank
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in_features] to [n, out_features]."""
        update = nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b)
        return super().forward(x) + update / self.rank


def digits_lora(num_classes: int = 10, *, rank: int = 4) -> nn.Module:
    """``digits_cnn``, frozen, with adapters on its fully connected layers; its tensors keep their names."""
    model = digits_cnn(num_classes=num_classes)
    model.requires_grad_(False)
    for name, module in model.classifier.named_children():
        if isinstance(module, nn.Linear):
            setattr(model.classifier, name, LoRALinear(module, rank=rank))
    return model
