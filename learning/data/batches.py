"""Which samples go into which batch: index arrays, from an explicit seed. Needs no torch, so that a planner can count."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def batches(
    num_samples: int, *, batch_size: int, seed: int, epochs: int = 1, steps: int | None = None
) -> Iterator[NDArray[np.intp]]:
    """Index arrays of ``epochs`` passes over the samples, or of exactly ``steps`` batches when given.

    Each pass is a fresh permutation from one generator. A last batch of one sample joins the batch before it: batch
    normalisation cannot train on one. (``batch_size`` 1 is taken at its word.) No samples give no batches; with
    ``steps``, raises ``ValueError``, since it would never end.
    """
    if num_samples < 1:
        if steps:
            raise ValueError(f"training.steps is {steps}, but there are no samples to train on")
        return
    edges = _edges(num_samples, batch_size)
    generator = np.random.default_rng(seed)
    left = steps if steps is not None else epochs * (len(edges) - 1)
    while left > 0:
        order = generator.permutation(num_samples)
        for start, stop in pairwise(edges[: left + 1]):
            yield order[start:stop]
        left -= len(edges) - 1


def until(order: Iterable[NDArray[np.intp]], over: Callable[[], bool] | None) -> Iterator[NDArray[np.intp]]:
    """The batches of ``order`` until ``over`` says so (None: all); the first one in any case."""
    for indices in order:
        yield indices
        if over is not None and over():
            return


def micro_batches(
    indices: NDArray[np.intp], *, batch_size: int, accumulation: int
) -> Iterator[tuple[NDArray[np.intp], float]]:
    """Split a batch into parts of about equal size, each with its share of the batch.

    At most ``accumulation`` parts, and no more than hold a full batch's part, ``batch_size / accumulation`` rounded up: a short
    last batch needs fewer. None has one sample where the batch has more: batch normalisation cannot train on one. (An
    ``accumulation`` as large as ``batch_size`` is taken at its word.)
    """
    for part in np.array_split(indices, _num_parts(len(indices), batch_size, accumulation)):
        yield part, len(part) / len(indices)


def largest_micro_batch(batch_size: int, accumulation: int) -> int:
    """Samples of the largest part of a full batch."""
    return -(-batch_size // _num_parts(batch_size, batch_size, accumulation))


def num_batches(num_samples: int, *, batch_size: int) -> int:
    """Batches in one pass."""
    return len(_edges(num_samples, batch_size)) - 1 if num_samples else 0


def _num_parts(num_samples: int, batch_size: int, accumulation: int) -> int:
    """Into how many parts a batch of so many samples is split."""
    most = -(-batch_size // accumulation)
    parts = min(accumulation, -(-num_samples // most))
    return parts if most == 1 else max(1, min(parts, num_samples // 2))


def _edges(num_samples: int, batch_size: int) -> list[int]:
    """Where batches start, and the end: ``[0, 32, 64, 70]``."""
    edges = [*range(0, num_samples, batch_size), num_samples]
    if batch_size > 1 and len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]
    return edges
