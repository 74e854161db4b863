"""Magnitude thresholds: which entries of a tensor take part in a sparse product.

Of n entries, floor(sparsity * n) are left out, the smallest in magnitude; the threshold is the magnitude of the smallest entry
that is kept. Entries that equal it are kept too, as in SWAT (Raihan and Aamodt, NeurIPS 2020, arXiv 2001.01969), whose code
ZeroFL (Qiu et al., ICLR 2022, arXiv 2208.02507) builds on. A threshold is never 0, so that a tensor with more zeros than its
sparsity asks for, such as the output of ReLU, does not become dense.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SAMPLE_FROM = 1 << 15  # entries; with fewer, selecting among all of them is as fast
_STRIDE = 251  # of the sample; prime, so that it reaches every position of a filter
_CHUNK = 1 << 15  # entries that are compared at a time; they stay in the cache from one comparison to the next
_SLACK = 1e-6  # 0.95 * 1000 is below 950 in some roundings


def num_kept(items: int, sparsity: float) -> int:
    """Number of entries of ``items`` that are kept: at least 1 for a sparsity below 1."""
    return items - math.floor(sparsity * items + _SLACK)


def threshold(x: Tensor, sparsity: float) -> Tensor:
    """The magnitude from which on entries of ``x`` are kept: a float32 tensor without dimensions, on the device of ``x``.

    It is exact: a sample of the entries only narrows down the candidates. ``x`` has one entry or more.
    """
    entries = _entries(x)
    kept = num_kept(entries.size, sparsity)
    rank, candidates = _candidates(entries, kept) or (kept, np.abs(entries))
    place = candidates.size - rank
    smallest = torch.as_tensor(np.partition(candidates, place)[place], dtype=torch.float32, device=x.device)
    return smallest.clamp_min(torch.finfo(torch.float32).tiny)


def _entries(x: Tensor) -> NDArray[np.float32]:
    """All entries in any order, without a copy if ``x`` is float32 and dense in memory."""
    x = x.detach()
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    entries: NDArray[np.float32] = x.reshape(-1).float().cpu().numpy()
    return entries


def _candidates(entries: NDArray[np.float32], kept: int) -> tuple[int, NDArray[np.float32]] | None:
    """Magnitudes with that of rank ``kept`` among them, and its rank there, both counted from the largest.

    None if there are few entries, and if those of a sample are not like the others.
    """
    if entries.size < _SAMPLE_FROM:
        return None
    sample = np.sort(np.abs(entries[::_STRIDE]))[::-1]
    expected = kept * sample.size / entries.size
    slack = 4 * math.sqrt(expected) + 4  # four standard deviations
    if expected + slack >= sample.size:
        return None
    least, most = sample[int(expected + slack)], sample[max(0, int(expected - slack))]
    magnitudes, smaller, others = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, bool), np.empty(_CHUNK, bool)
    above, found = 0, []
    for start in range(0, entries.size, _CHUNK):
        chunk = entries[start : start + _CHUNK]
        x, below, up_to = magnitudes[: chunk.size], smaller[: chunk.size], others[: chunk.size]
        np.abs(chunk, out=x)
        np.less(x, least, out=below)
        np.less_equal(x, most, out=up_to)
        above += chunk.size - int(np.count_nonzero(up_to))  # with those that are not numbers
        found.append(x[np.not_equal(up_to, below, out=below)])
    candidates = np.concatenate(found)
    return (kept - above, candidates) if 1 <= kept - above <= candidates.size else None


def masked(x: Tensor, least: Tensor | None) -> Tensor:
    """``x``, with zeros in place of entries whose magnitude is below ``least`` (None: nothing is left out). NaN is kept."""
    return x if least is None else torch.where(x.abs() < least, 0.0, x)


def evaluated(weight: Tensor, sparsity: float) -> Tensor:
    """The weight with which a layer of this sparsity is evaluated: zeros in place of the entries that are left out."""
    return masked(weight, threshold(weight, sparsity)) if sparsity else weight
