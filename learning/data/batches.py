"""Assigns samples to batches: index arrays from an explicit seed. Imports no torch, so that estimates can count batches."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..spec import Training


def batches(
    num_samples: int, *, batch_size: int, seed: int, epochs: int = 1, steps: int | None = None
) -> Iterator[NDArray[np.intp]]:
    """Yield index arrays for ``epochs`` passes over the samples, or for exactly ``steps`` batches if given.

    Each pass is a new permutation from one generator. A last batch of one sample is added to the batch before it, since batch
    normalisation cannot train on one sample (unless ``batch_size`` is 1). Without samples there are no batches; with ``steps``,
    raises ``ValueError`` then.
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
    """Yield the batches of ``order`` until ``over`` returns true after one (None: all)."""
    for indices in order:
        yield indices
        if over is not None and over():
            return


def micro_batches(
    indices: NDArray[np.intp], *, batch_size: int, accumulation: int
) -> Iterator[tuple[NDArray[np.intp], float]]:
    """Split a batch into micro-batches of nearly equal size, each with its share of the batch.

    There are at most ``accumulation`` of them, with at most ``batch_size / accumulation`` samples (rounded up) in each, so that
    a short last batch has fewer. None has one sample if the batch has more, since batch normalisation cannot train on one
    sample (unless ``accumulation`` is as large as ``batch_size``).
    """
    for part in np.array_split(indices, _num_parts(len(indices), batch_size, accumulation)):
        yield part, len(part) / len(indices)


def largest_micro_batch(batch_size: int, accumulation: int) -> int:
    """Samples of the largest micro-batch of a full batch."""
    return -(-batch_size // _num_parts(batch_size, batch_size, accumulation))


def num_batches(num_samples: int, *, batch_size: int) -> int:
    """Number of batches in one pass."""
    return len(_edges(num_samples, batch_size)) - 1 if num_samples else 0


def num_steps(num_samples: int, training: Training) -> int:
    """Number of optimiser steps of a plan."""
    if num_samples == 0:
        return 0
    if training.steps is not None:
        return training.steps
    return training.epochs * num_batches(num_samples, batch_size=training.batch_size)


def processed_samples(num_samples: int, training: Training) -> int:
    """Number of samples that a plan processes, repetitions counted; FLOPs are charged for these."""
    if num_samples == 0:
        return 0
    if training.steps is None:
        return num_samples * training.epochs
    passes, remaining = divmod(training.steps, num_batches(num_samples, batch_size=training.batch_size))
    return passes * num_samples + remaining * training.batch_size  # only the last batch of a pass has another size


def _num_parts(num_samples: int, batch_size: int, accumulation: int) -> int:
    """Number of micro-batches that a batch of ``num_samples`` samples is split into."""
    most = -(-batch_size // accumulation)
    parts = min(accumulation, -(-num_samples // most))
    return parts if most == 1 else max(1, min(parts, num_samples // 2))


def _edges(num_samples: int, batch_size: int) -> list[int]:
    """Start of each batch, and the end: ``[0, 32, 64, 70]``."""
    edges = [*range(0, num_samples, batch_size), num_samples]
    if batch_size > 1 and len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]
    return edges
