"""The fold: each update enters a running weighted sum when it arrives, so that no client's model is kept.

The operand is always the float32 difference to the version that the plan was cut from. An element counts for a plan when
its part trains it (``counts``); elements that nobody trained keep their value. With every part whole this is FedAvg
(McMahan et al., AISTATS 2017, arXiv 1602.05629, Algorithm 1):

    mean = sum_k w_k (x_k - x) / sum_k w_k
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Fold:
    """A running weighted mean of named differences; parts of different tensors and indices may be mixed.

    Sums are float32, in the order of arrival: under the virtual clock that order is the same on every machine.
    """

    def __init__(self) -> None:
        """Nothing folded."""
        self.updates = 0
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float | Tensor] = {}

    def add(self, differences: Mapping[str, Tensor], *, weight: float) -> None:
        """Fold one update with ``weight`` (samples, times what staleness leaves of it; > 0)."""
        if weight <= 0:
            raise ValueError(f"the weight of an update is {weight}; it must be above 0")
        for name, difference in differences.items():
            held = self._sums.get(name)
            if held is None:
                self._sums[name] = difference * weight
                self._weights[name] = weight
            else:
                held.add_(difference, alpha=weight)
                self._weights[name] = self._weights[name] + weight
        self.updates += 1

    def scatter(
        self, differences: Mapping[str, Tensor], *, weight: float, indices: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
    ) -> None:
        """Fold an update of sub-tensors: ``indices[name]`` are flat positions in the full tensor of ``shapes[name]``.

        A position must occur once at most. Elements outside count nothing.
        """
        if weight <= 0:
            raise ValueError(f"the weight of an update is {weight}; it must be above 0")
        for name, difference in differences.items():
            total = self._sums.setdefault(name, torch.zeros(shapes[name])).view(-1)
            known = self._weights.get(name, 0.0)
            count = known if isinstance(known, Tensor) else torch.full(shapes[name], known)
            total.index_add_(0, indices[name], difference.reshape(-1), alpha=weight)
            count.view(-1).index_add_(0, indices[name], torch.full((difference.numel(),), weight))
            self._weights[name] = count
        self.updates += 1

    def close(self) -> dict[str, Tensor]:
        """The mean difference per tensor that took part; the fold is empty afterwards."""
        means = {}
        for name, total in self._sums.items():
            weight = self._weights[name]
            if isinstance(weight, Tensor):
                means[name] = torch.where(weight > 0, total / weight.clamp_min(torch.finfo(weight.dtype).tiny), 0.0)
            else:
                means[name] = total.div_(weight)
        self.__init__()  # type: ignore[misc]
        return means
