"""Auxiliaries: small networks that are trained beside the model, and are no part of it.

A *linear head* at a cut stands in for all that follows it, so that the blocks before it can be trained by a loss of their own
(local losses in split learning: Han et al. 2021, in EcoFed's code one fully connected layer behind the second block; Wu et al.,
IEEE TPDS 2024, arXiv 2304.05495). Its name is ``linear@CUT`` (``part.linear_head``), after the last block before it; its
tensors are ``linear@CUT.weight`` and ``linear@CUT.bias``.
"""

import math

import torch
from torch import Tensor, nn

from ..randomness import seeded
from .blocks import tensor_spec
from .structure import BlockSpec


class LinearHead(nn.Linear):
    """From what leaves a block, flattened, to what leaves the model, by one fully connected layer."""

    def __init__(
        self, entering: tuple[int, ...], leaving: tuple[int, ...], *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Shapes of one sample; ``dtype``: of weights and samples."""
        super().__init__(math.prod(entering), math.prod(leaving), dtype=dtype)
        self.leaving = leaving

    def forward(self, x: Tensor) -> Tensor:
        """[n, *entering] to [n, *leaving]."""
        return super().forward(x.flatten(1)).reshape(len(x), *self.leaving)


def build_head(
    entering: tuple[int, ...], leaving: tuple[int, ...], *, seed: int, dtype: torch.dtype = torch.float32
) -> LinearHead:
    """A head with torch's initial weights, from the seed; the process's random state stays as it was."""
    with seeded(seed):
        return LinearHead(entering, leaving, dtype=dtype)


def empty_head(
    entering: tuple[int, ...], leaving: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> LinearHead:
    """A head without weights, on the meta device."""
    with torch.device("meta"):
        return LinearHead(entering, leaving, dtype=dtype)


def auxiliary_spec(name: str, module: nn.Module) -> BlockSpec:
    """The tensors of an auxiliary, under the names that they have in packets and in the server's store."""
    state = module.state_dict(keep_vars=True)
    return BlockSpec(name, tuple(tensor_spec(f"{name}.{key}", tensor) for key, tensor in state.items()))
