"""Targets as they travel beside activations: labels of few classes in one byte or two, everything else as it is.

As bytes they are symbols, which a chain's entropy coding takes with the activations.
"""

import torch
from torch import Tensor

from ...learning.spec import Call
from ...learning.tensors import numpy_name


class Labels:
    """How one workload's targets travel. ``shape``: of one; ``dtype``: numpy's name of the type that travels."""

    def __init__(self, example: Tensor, num_classes: int | None, loss: Call | None = None) -> None:
        """``num_classes``: None where targets are no labels. ``loss``: may leave out a label of its own, ``ignore_index``."""
        self.shape, self._type = tuple(example.shape), example.dtype
        self._narrow = example.dtype
        if example.dtype == torch.int64 and num_classes is not None:
            # Signed, for the labels below zero by which a loss knows what to leave out; torch's own is -100.
            largest = max(num_classes - 1, int(loss.kwargs.get("ignore_index", 0)) if loss is not None else 0)
            fitting = (kind for kind in (torch.int8, torch.int16) if largest <= torch.iinfo(kind).max)
            self._narrow = next(fitting, self._narrow)
        self.dtype = numpy_name(self._narrow)

    def narrowed(self, targets: Tensor) -> Tensor:
        """As they travel; raises ``ValueError`` for labels that the type cannot hold."""
        if self._narrow != self._type and targets.numel():
            limits, low, high = torch.iinfo(self._narrow), int(targets.min()), int(targets.max())
            if not limits.min <= low <= high <= limits.max:
                raise ValueError(
                    f"targets hold labels from {low} to {high}; for so few classes they travel as numbers from "
                    f"{limits.min} to {limits.max}"
                )
        return targets.to(self._narrow)

    def widened(self, arrived: Tensor) -> Tensor:
        """As the loss takes them."""
        return arrived.to(self._type)
