"""How much a training setting processes: arithmetic for estimates, without torch."""

from .data.batches import batches
from .spec import Training


def processed_samples(num_samples: int, training: Training) -> int:
    """Samples that training will process, repeats counted: what FLOPs are charged for."""
    if num_samples == 0:
        return 0
    if training.steps is None:
        return num_samples * training.epochs
    order = batches(num_samples, batch_size=training.batch_size, steps=training.steps, seed=0)
    return sum(len(batch) for batch in order)
