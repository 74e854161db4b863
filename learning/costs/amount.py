"""How much a training setting processes: arithmetic for estimates, without torch."""

from ..data.batches import num_batches
from ..spec import Training


def num_steps(num_samples: int, training: Training) -> int:
    """Optimiser steps that training will make."""
    if num_samples == 0:
        return 0
    if training.steps is not None:
        return training.steps
    return training.epochs * num_batches(num_samples, batch_size=training.batch_size)


def processed_samples(num_samples: int, training: Training) -> int:
    """Samples that training will process, repeats counted: what FLOPs are charged for."""
    if num_samples == 0:
        return 0
    if training.steps is None:
        return num_samples * training.epochs
    passes, rest = divmod(training.steps, num_batches(num_samples, batch_size=training.batch_size))
    return passes * num_samples + rest * training.batch_size  # only the last batch of a pass has another size
