"""The host's leg of an upload that is made again, since its packets were lost: they are checked, and nothing is trained."""

from torch import Tensor

from ...learning.spec import Training
from ...learning.training.split import MicroBatch, schedule


class RecordLeg:
    """Follows the stream as ``learning.split.HostLeg`` does, without a model."""

    steps, loss, loss_square, between_steps = 0, None, None, True

    def __init__(self, num_samples: int, training: Training) -> None:
        """At the first micro-batch."""
        self._coming = schedule(num_samples, training)
        self.next: MicroBatch | None = next(self._coming, None)

    def micro_batch(self, activations: Tensor, targets: Tensor) -> Tensor:
        """Take one. No gradient goes back: what is returned is not read."""
        self.next = next(self._coming, None)
        return activations

    def close(self) -> None:
        """Nothing is under way."""
