"""The state of sparse training during one plan: thresholds, steps, and weight gradients that are kept as factors."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ..spec import Sparsity
from .kernels import linear
from .products import Factors, Multiplier
from .thresholds import threshold

if TYPE_CHECKING:
    from .layers import SparseLayer

MultiplierOf = Callable[["SparseLayer", Sparsity], Multiplier]


class SparseTraining:
    """The state of all sparse layers of a model during one plan. The next plan on the same modules starts with another.

    SparseTraining are exact every ``period`` steps, from the first one on, and kept in between.

    Where the optimiser only adds each gradient to its weight, gradients of large linear layers are kept as their factors
    (``put_off``) until ``update`` adds these.
    """

    def __init__(
        self, sparsity: Sparsity | None, multiplier: MultiplierOf | None = None, *, only_adds: bool = False
    ) -> None:
        """``sparsity``: of the plan; None: each layer's own. ``multiplier``: in place of each layer's own, in any mode.

        ``only_adds``: whether the optimiser is SGD, and nothing else uses a gradient or a weight's history.
        """
        self.sparsity, self.multiplier, self.steps = sparsity, multiplier, 0
        self.put_off: list[Factors] | None = [] if only_adds else None
        self._kept: dict[tuple[int, str], tuple[int, Tensor]] = {}  # by layer and operand, with the step of the weights

    def step(self) -> None:
        """Count an optimiser step."""
        self.steps += 1

    def update(self, learning_rate: float) -> None:
        """Step the weights whose gradients were put off."""
        for each in self.put_off or ():
            linear.linear_update(each.weight, each.gradient, each.x, each.least, -learning_rate)
        self.drop()

    def drop(self) -> None:
        """Drop the gradients that were put off."""
        if self.put_off:
            self.put_off.clear()

    def of(self, layer: "SparseLayer", operand: str, x: Tensor, share: float) -> Tensor | None:
        """The threshold of an operand that leaves out ``share`` of it; None for 0."""
        if not share:
            return None
        sparsity = self.sparsity or layer.sparsity
        key, exact = (id(layer), operand), self.steps % sparsity.period == 0
        step, kept = self._kept.get(key, (-1, None))
        if kept is None or (exact and (operand == "activations" or step != self.steps)):
            kept = threshold(x, share)
            self._kept[key] = self.steps, kept
        return kept
