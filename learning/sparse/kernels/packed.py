"""The active weights of a layer, in the form that the native kernels read."""

import math
from typing import NamedTuple

from torch import Tensor


class PackedWeight(NamedTuple):
    """A weight's elements whose magnitude is at least a threshold, by output: compressed sparse rows.

    Entries ``pointers[o]`` to ``pointers[o + 1]`` are those of output ``o``; an index counts the elements of its row in the
    order of the weight: ``input`` of a linear layer, ``(input * height + row) * width + column`` of a convolution.
    """

    pointers: Tensor  # int32 [outputs + 1]
    indices: Tensor  # int32 [active]
    values: Tensor  # float32 [active]
    shape: tuple[int, ...]  # of the weight

    @property
    def density(self) -> float:
        """The share of weights that are active; 0 for a weight without elements."""
        return len(self.values) / max(math.prod(self.shape), 1)
