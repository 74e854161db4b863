"""The products of ``linear`` by torch's own compressed sparse rows, which need no compiler.

Convolutions have no such kernel: unfolding their input costs more than the product of dense tensors.
"""

import warnings

import numpy as np
import torch
from torch import Tensor


def pack_rows(weight: Tensor, threshold: float) -> Tensor:
    """The active elements of ``weight`` [out, in] as a CSR tensor; ``threshold`` is above 0."""
    held = weight.detach().contiguous()
    rows, columns = held.shape
    active = torch.from_numpy(np.flatnonzero(~(np.abs(held.numpy()) < threshold)))  # faster than torch's nonzero
    pointers = torch.searchsorted(active, torch.arange(rows + 1) * columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            pointers.to(torch.int32),
            (active % columns).to(torch.int32),
            held.view(-1)[active],
            weight.shape,
            check_invariants=False,
        )


def linear_forward(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, in] times the packed weight, plus ``bias`` [out]."""
    y = (packed @ x.T).T
    return y if bias is None else y + bias


def linear_grad_input(g: Tensor, packed: Tensor) -> Tensor:
    """The gradient [n, in] of the input, from the gradient ``g`` [n, out] of the output."""
    return (packed.t() @ g.T).T


def linear_grad_weight(g: Tensor, x: Tensor, threshold: float) -> Tensor:
    """The gradient [out, in] of the weight, from ``g`` and the elements of x [n, in] that ``threshold`` (> 0) leaves.

    A product of dense tensors: torch's sparse one is slower at the densities of training.
    """
    return g.T @ torch.where(x.abs() < threshold, 0.0, x)
