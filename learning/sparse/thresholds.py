"""Magnitude thresholds: which entries of a tensor take part in a sparse product.

Of n entries, floor(sparsity * n) are left out, the smallest in magnitude; the threshold is the magnitude of the smallest entry
that is kept. Entries that equal it are kept too, as in SWAT (Raihan and Aamodt, NeurIPS 2020, arXiv 2001.01969), whose code
ZeroFL (Qiu et al., ICLR 2022, arXiv 2208.02507) builds on. A threshold is never 0, so that a tensor with more zeros than its
sparsity asks for, such as the output of ReLU, does not become dense.
"""

import math

import torch
from torch import Tensor

_SAMPLE_FROM = 1 << 15  # entries; with fewer, selecting among all of them is as fast
_STRIDE = 61  # of the sample; prime, so that it reaches every position of a filter
_SLACK = 1e-6  # 0.95 * 1000 is below 950 in some roundings


def num_kept(items: int, sparsity: float) -> int:
    """Number of entries of ``items`` that are kept: at least 1 for a sparsity below 1."""
    return items - math.floor(sparsity * items + _SLACK)


def threshold(x: Tensor, sparsity: float) -> Tensor:
    """The magnitude from which on entries of ``x`` are kept: a float32 tensor without dimensions, on the device of ``x``.

    It is exact: a sample of the entries only narrows down the candidates. ``x`` has one entry or more.
    """
    magnitudes = x.detach().abs().flatten().float()
    kept = num_kept(magnitudes.numel(), sparsity)
    magnitudes = _candidates(magnitudes, kept)
    smallest = torch.kthvalue(magnitudes, magnitudes.numel() - kept + 1).values
    return smallest.clamp_min(torch.finfo(torch.float32).tiny)


def _candidates(magnitudes: Tensor, kept: int) -> Tensor:
    """Entries among which the ``kept`` largest are: those above a threshold that a sample suggests, or all of them."""
    total = magnitudes.numel()
    if total < _SAMPLE_FROM:
        return magnitudes
    sample = magnitudes[::_STRIDE]
    expected = kept * sample.numel() / total
    rank = int(expected + 4 * math.sqrt(expected)) + 4  # four standard deviations more than are expected above it
    if rank >= sample.numel():
        return magnitudes
    found = magnitudes[magnitudes >= torch.kthvalue(sample, sample.numel() - rank + 1).values]
    return found if found.numel() >= kept else magnitudes


def masked(x: Tensor, least: Tensor | None) -> Tensor:
    """``x``, with zeros in place of entries whose magnitude is below ``least`` (None: nothing is left out). NaN is kept."""
    return x if least is None else torch.where(x.abs() < least, 0.0, x)


def evaluated(weight: Tensor, sparsity: float) -> Tensor:
    """The weight with which a layer of this sparsity is evaluated: zeros in place of the entries that are left out."""
    return masked(weight, threshold(weight, sparsity)) if sparsity else weight
