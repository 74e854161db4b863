"""Aggregation of updates: each one is added to a running weighted sum on arrival, so no client model is kept.

The operand is always the difference to the version that the plan started from, summed in float32 or wider. An element counts
for a plan if the plan's part trains it; an element that no plan trained keeps its value. If every part is the whole model, this
is FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629, Algorithm 1):

    mean = sum_k w_k s_k (x_k - x) / sum_k w_k        s_k: 1, or the staleness factor of a late update (``spec.Staleness``)
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from .parts.slices import Slice, gather, put
from .spec import CountOrZero
from .tensors import at_least_float32

# Adding -0.0 changes no bit of any number, whereas adding 0.0 turns -0.0 into 0.0.
NEGATIVE_ZERO = -0.0


class Fold:
    """Running weighted mean of named differences. Updates may cover different tensors, and different elements of a tensor.

    Sums have the type of the differences, or float32 if that is narrower (a sum of float16 would overflow). They are taken in
    the order of arrival, which under the virtual clock is the same on every machine. Weights are summed in float64, so that a
    whole tensor and a slice of all its elements give the same bits.
    """

    # Attributes that a checkpoint saves, with their types.
    SAVED: ClassVar = {
        "updates": CountOrZero,
        "_sums": dict[str, Tensor],
        "_weights": dict[str, float | Tensor],
        "_exact": set[str],
    }
    NOT_SAVED = ()

    def __init__(self) -> None:
        """Start empty."""
        self.updates = 0
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float | Tensor] = {}  # a tensor if elements have different total weights
        self._exact: set[str] = set()  # float32 tensors whose sums are float64

    def add(
        self,
        differences: Mapping[str, Tensor],
        *,
        weight: float,
        scale: float = 1.0,
        slices: Mapping[str, Slice] = MappingProxyType({}),
        tensors: Mapping[str, Tensor] = MappingProxyType({}),
        exact: bool = False,
    ) -> None:
        """Fold one update, of whole tensors or of slices of them.

        Args:
            differences: differences to the plan's base version, by tensor name.
            weight: number of samples.
            scale: staleness factor. It multiplies the differences but not the weight, so a mean of late updates alone is a
                smaller step too.
            slices: by tensor, where a narrower difference is in the full tensor. Elements outside get no weight.
            tensors: the full tensors, of which the shapes of sliced ones are taken.
            exact: sum float32 in float64, so that the mean of equal differences is that difference: where no device has sent a
                weight, all differences are its negative value, and the next version's weight is exactly 0.

        Raises:
            ValueError: if the weight is not finite and above 0.
        """
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of an update is {weight}; it must be a finite number above 0")
        for name, tensor in differences.items():
            difference = at_least_float32(tensor)
            if (exact or name in self._exact) and difference.dtype == torch.float32:
                difference = self._widened(name, difference)
            if name in slices:
                self._add_slice(name, difference, slices[name], tensors[name].shape, weight=weight, scale=scale)
            elif name not in self._sums:
                self._sums[name] = (difference * (weight * scale)).contiguous()
                self._weights[name] = weight
            else:
                self._sums[name].add_(difference, alpha=weight * scale)
                self._weights[name] = self._weights[name] + weight
        self.updates += 1

    def _widened(self, name: str, difference: Tensor) -> Tensor:
        """A difference in float64, as from now on all of this tensor are."""
        if name not in self._exact:
            self._exact.add(name)
            if name in self._sums:
                self._sums[name] = self._sums[name].double()
        return difference.double()

    def _add_slice(
        self, name: str, difference: Tensor, part: Slice, shape: torch.Size, *, weight: float, scale: float
    ) -> None:
        """Add a difference to a slice of a sum of this full ``shape``."""
        if name not in self._sums:
            self._sums[name] = difference.new_full(shape, NEGATIVE_ZERO)
        total = self._sums[name]
        # add_ with alpha, as for whole tensors: other operations round each product before adding it.
        put(total, part, gather(total, part).add_(difference, alpha=weight * scale))
        weights = _weights_like(self._weights.get(name, 0.0), part, total)
        put(weights, part, gather(weights, part).add_(weight))
        self._weights[name] = weights

    def close(self) -> dict[str, Tensor]:
        """Return the mean difference of every tensor that was folded, and reset the fold.

        Elements that no update covered are -0.0, which changes no bit when it is added.
        """
        means = {}
        for name, total in self._sums.items():
            weight = self._weights[name]
            if isinstance(weight, Tensor):
                mean = total / weight.to(total.dtype)
                means[name] = torch.where(weight > 0, mean, NEGATIVE_ZERO)
            else:
                means[name] = total.div_(weight)
            if name in self._exact:
                means[name] = means[name].float()
        self.updates, self._sums, self._weights, self._exact = 0, {}, {}, set()
        return means


def _weights_like(weights: float | Tensor, part: Slice, total: Tensor) -> Tensor:
    """``weights`` as a tensor with an own element for each index of the dimensions that ``part`` slices; others have size 1."""
    sliced = {dimension for dimension, indices in enumerate(part) if indices is not None}
    shape = [size if dimension in sliced else 1 for dimension, size in enumerate(total.shape)]
    if not isinstance(weights, Tensor):
        return torch.full(shape, weights, dtype=torch.float64, device=total.device)
    shape = [max(size, other) for size, other in zip(shape, weights.shape, strict=True)]
    return weights if list(weights.shape) == shape else weights.expand(shape).contiguous()
