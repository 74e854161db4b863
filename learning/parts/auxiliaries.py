"""Auxiliaries: small networks that are trained in addition to the model, and do not belong to it.

They are linear heads, described here, and proxies (``proxies``). A *linear head* at a cut replaces all blocks behind it, so
that the blocks before it can be trained by a local loss (local losses in split learning: Han et al. 2021, in EcoFed's code one
fully connected layer behind the second block; Wu et al., IEEE TPDS 2024, arXiv 2304.05495). Its name is ``linear@CUT``
(``part.linear_head``), where CUT is the last block before it; its tensors are ``linear@CUT.weight`` and ``linear@CUT.bias``.
"""

import math

import torch
from torch import Tensor, nn

from ..randomness import seeded
from .blocks import tensor_spec
from .structure import BlockSpec


class LinearHead(nn.Linear):
    """One fully connected layer from the flattened output of a block to the shape of the model's output."""

    def __init__(
        self, entering: tuple[int, ...], leaving: tuple[int, ...], *, dtype: torch.dtype = torch.float32
    ) -> None:
        """``entering`` and ``leaving``: shapes for one sample. ``dtype``: of weights and samples."""
        super().__init__(math.prod(entering), math.prod(leaving), dtype=dtype)
        self.leaving = leaving

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, *entering] to [n, *leaving]."""
        return super().forward(x.flatten(1)).reshape(len(x), *self.leaving)


def build_head(
    entering: tuple[int, ...], leaving: tuple[int, ...], *, seed: int, dtype: torch.dtype = torch.float32
) -> LinearHead:
    """A head with torch's initialisation, drawn from the seed; the process's random state is restored."""
    with seeded(seed):
        return LinearHead(entering, leaving, dtype=dtype)


def empty_head(
    entering: tuple[int, ...], leaving: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> LinearHead:
    """A head without weights, on the meta device."""
    with torch.device("meta"):
        return LinearHead(entering, leaving, dtype=dtype)


def auxiliary_spec(name: str, module: nn.Module) -> BlockSpec:
    """The tensors of an auxiliary, under their names in packets and in the server's store."""
    state = module.state_dict(keep_vars=True)
    return BlockSpec(name, tuple(tensor_spec(f"{name}.{key}", tensor) for key, tensor in state.items()))
