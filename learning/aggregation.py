"""The fold: each update enters a running weighted sum when it arrives, so that no client's model is kept.

The operand is always the difference to the version that the plan was cut from; it is summed in float32 at least. An element
counts for a plan when its part trains it; elements that nobody trained keep their value. With every part whole this is FedAvg
(McMahan et al., AISTATS 2017, arXiv 1602.05629, Algorithm 1):

    mean = sum_k w_k s_k (x_k - x) / sum_k w_k        s_k: 1, or what staleness leaves of a late update (``staleness``)
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .spec import CountOrZero
from .tensors import widened

# The one number that changes no bit of what it is added to: 0.0 would turn a -0.0 of the model into 0.0.
_NOTHING = -0.0


class Fold:
    """A running weighted mean of named differences; parts of different tensors and indices may be mixed.

    Sums have the type of the differences, float32 where that is narrower (a sum of float16 would overflow), in the order of
    arrival: under the virtual clock that order is the same on every machine. Weights are summed in float64, so that ``add``
    and a ``scatter`` of all elements give the same bits.
    """

    # By a checkpoint.
    SAVED: ClassVar = {"updates": CountOrZero, "_sums": dict[str, Tensor], "_weights": dict[str, float | Tensor]}
    NOT_SAVED = ()

    def __init__(self) -> None:
        """Nothing folded."""
        self.updates = 0
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float | Tensor] = {}  # a tensor where elements have had different holders

    def add(self, differences: Mapping[str, Tensor], *, weight: float, scale: float = 1.0) -> None:
        """Fold one update of whole tensors with ``weight`` (samples).

        ``scale``: what staleness leaves of the update; it does not change what the others weigh, so that a mean of late
        updates alone is a smaller step too. Raises ``ValueError`` when the weight is not above 0, and finite.
        """
        _check_weight(weight)
        for name, each in differences.items():
            difference, held = widened(each), self._sums.get(name)
            if held is None:
                self._sums[name] = (difference * (weight * scale)).contiguous()
                self._weights[name] = weight
            else:
                held.add_(difference, alpha=weight * scale)
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

        A position must occur once at most. Elements outside count nothing. Raises ``ValueError`` as ``add`` does.
        """
        _check_weight(weight)
        for name, each in differences.items():
            difference, shape, places = widened(each), shapes[name], indices[name].reshape(-1)
            if name not in self._sums:
                self._sums[name] = torch.full(shape, _NOTHING, dtype=difference.dtype)
            known = self._weights.get(name, 0.0)
            count = known if isinstance(known, Tensor) else torch.full(shape, known, dtype=torch.float64)
            # Not index_add_, which rounds products before it adds them, where add_ with alpha does not.
            total = self._sums[name].view(-1)
            total[places] = total[places].add_(difference.reshape(-1), alpha=weight)
            count.view(-1)[places] += weight
            self._weights[name] = count
        self.updates += 1

    def close(self) -> dict[str, Tensor]:
        """The mean difference per tensor that took part; the fold is empty afterwards.

        Elements that nobody trained have -0.0: a difference that changes no bit.
        """
        means = {}
        for name, total in self._sums.items():
            weight = self._weights[name]
            if isinstance(weight, Tensor):
                mean = total / weight.to(total.dtype)
                means[name] = torch.where(weight > 0, mean, _NOTHING)
            else:
                means[name] = total.div_(weight)
        self.updates, self._sums, self._weights = 0, {}, {}
        return means


def _check_weight(weight: float) -> None:
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"the weight of an update is {weight}; it must be a finite number above 0")
