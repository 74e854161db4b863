"""Aggregation of updates: each one is added to a running weighted sum on arrival, so no client model is kept.

The operand is always the difference to the version that the plan started from, summed in float32 or wider. An element counts
for a plan if the plan's part trains it; an element that no plan trained keeps its value. If every part is the whole model, this
is FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629, Algorithm 1):

    mean = sum_k w_k s_k (x_k - x) / sum_k w_k        s_k: 1, or the staleness factor of a late update (``spec.Staleness``)
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .spec import CountOrZero
from .tensors import at_least_float32

# Adding -0.0 changes no bit of any number, whereas adding 0.0 turns -0.0 into 0.0.
_NEGATIVE_ZERO = -0.0


class Fold:
    """Running weighted mean of named differences. Updates may cover different tensors, and different elements of a tensor.

    Sums have the type of the differences, or float32 if that is narrower (a sum of float16 would overflow). They are taken in
    the order of arrival, which under the virtual clock is the same on every machine. Weights are summed in float64, so that
    ``add`` and a ``scatter`` of all elements give the same bits.
    """

    # Attributes that a checkpoint saves, with their types.
    SAVED: ClassVar = {"updates": CountOrZero, "_sums": dict[str, Tensor], "_weights": dict[str, float | Tensor]}
    NOT_SAVED = ()

    def __init__(self) -> None:
        """Start empty."""
        self.updates = 0
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float | Tensor] = {}  # a tensor if elements have different total weights

    def add(self, differences: Mapping[str, Tensor], *, weight: float, scale: float = 1.0) -> None:
        """Fold one update of whole tensors.

        Args:
            differences: differences to the plan's base version, by tensor name.
            weight: number of samples.
            scale: staleness factor. It multiplies the differences but not the weight, so a mean of late updates alone is a
                smaller step too.

        Raises:
            ValueError: if the weight is not finite and above 0.
        """
        _check_weight(weight)
        for name, tensor in differences.items():
            difference, total = at_least_float32(tensor), self._sums.get(name)
            if total is None:
                self._sums[name] = (difference * (weight * scale)).contiguous()
                self._weights[name] = weight
            else:
                total.add_(difference, alpha=weight * scale)
                self._weights[name] = self._weights[name] + weight
        self.updates += 1

    def scatter(
        self,
        differences: Mapping[str, Tensor],
        *,
        weight: float,
        indices: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        """Fold an update of sub-tensors: ``indices[name]`` are flat positions in the full tensor of ``shapes[name]``.

        A position must not occur twice. Elements that are not indexed get no weight. Raises ``ValueError`` as ``add`` does.
        """
        _check_weight(weight)
        for name, tensor in differences.items():
            difference, shape, positions = at_least_float32(tensor), shapes[name], indices[name].reshape(-1)
            if name not in self._sums:
                self._sums[name] = torch.full(shape, _NEGATIVE_ZERO, dtype=difference.dtype)
            previous = self._weights.get(name, 0.0)
            weights = previous if isinstance(previous, Tensor) else torch.full(shape, previous, dtype=torch.float64)
            # add_ with alpha, since index_add_ rounds each product before adding it.
            total = self._sums[name].view(-1)
            total[positions] = total[positions].add_(difference.reshape(-1), alpha=weight)
            weights.view(-1)[positions] += weight
            self._weights[name] = weights
        self.updates += 1

    def close(self) -> dict[str, Tensor]:
        """Return the mean difference of every tensor that was folded, and reset the fold.

        Elements that no update covered are -0.0, which changes no bit when it is added.
        """
        means = {}
        for name, total in self._sums.items():
            weight = self._weights[name]
            if isinstance(weight, Tensor):
                mean = total / weight.to(total.dtype)
                means[name] = torch.where(weight > 0, mean, _NEGATIVE_ZERO)
            else:
                means[name] = total.div_(weight)
        self.updates, self._sums, self._weights = 0, {}, {}
        return means


def _check_weight(weight: float) -> None:
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"the weight of an update is {weight}; it must be a finite number above 0")
