"""The largest entries of several arrays, exactly, without sorting or partitioning all of them.

A sample gives a threshold that surely lets enough through; only what passes it is partitioned (the two steps of Deep
Gradient Compression: Lin et al., 2018, arXiv 1712.01887, section 3.1; there the sample's word is final, here it is checked,
so that the set does not depend on it). Magnitudes are compared as the integers that their bits spell, which order like
the floats: integer comparisons and partitions are the faster ones.
"""

from collections.abc import Sequence

import numpy as np

from ..codec import Array

_SAMPLE_FROM = 1 << 15  # entries; below, partitioning all of them takes less than the detour
_STRIDE = 61  # prime, so that it visits every position of a filter


def magnitude_bits(array: Array, dtype: type[np.floating] = np.float32) -> Array:
    """The bits of ``|x|`` as integers of the same order, flat; zeros of either sign are 0. ``dtype``: float32 or float64."""
    flat = array.reshape(-1).astype(dtype, copy=False)
    if dtype is np.float64:
        return flat.view(np.int64) & np.int64(0x7FFF_FFFF_FFFF_FFFF)
    return flat.view(np.int32) & np.int32(0x7FFF_FFFF)


def largest(magnitudes: Sequence[Array], count: int, *, sampled: bool = True) -> list[Array]:
    """Flat positions, ascending, of the ``count`` largest entries of all arrays together, one array of them for each.

    ``magnitudes``: flat, not negative, of one type. Zeros are never among the largest, so fewer than ``count`` may be
    found. Between equals the earlier array wins, then the lower position. ``sampled`` changes the time, not the result.
    """
    if count < 1 or not magnitudes:
        return [np.zeros(0, np.intp) for _ in magnitudes]
    floor = _conservative_threshold(magnitudes, count) if sampled else 1
    candidates = [np.flatnonzero(m >= floor) for m in magnitudes]
    if floor > 1 and sum(map(len, candidates)) < count:  # the sample misled
        candidates = [np.flatnonzero(m) for m in magnitudes]
    values = np.concatenate([m[at] for m, at in zip(magnitudes, candidates, strict=True)])
    if values.size <= count:
        return candidates
    cut = np.partition(values, values.size - count)[values.size - count]
    keep = values > cut
    ties = np.flatnonzero(values == cut)
    keep[ties[: count - np.count_nonzero(keep)]] = True
    borders = np.cumsum([at.size for at in candidates])[:-1]
    return [at[kept] for at, kept in zip(candidates, np.split(keep, borders), strict=True)]


def _conservative_threshold(magnitudes: Sequence[Array], count: int) -> int:
    """A magnitude that at least ``count`` entries very likely reach, and not many more; 1 lets all but zeros through."""
    total = sum(m.size for m in magnitudes)
    if total < _SAMPLE_FROM or count >= total:
        return 1
    sample = np.concatenate([m[::_STRIDE] for m in magnitudes])
    expected = count * sample.size / total
    # Four standard deviations of the number of hits, and four more for the few of a very low density.
    rank = int(expected + 4 * expected**0.5) + 4
    if rank >= sample.size:
        return 1
    return max(1, int(np.partition(sample, sample.size - rank)[sample.size - rank]))
