"""Residuals that a worker has opened, so that those which many devices are sent are opened once.

What a residual leads to depends on its bytes and on the prediction alone, and the hash of the prediction is in the packet. So
devices that hold the same model and missed the same residuals reach the same model. The worker keeps the newest of these
models, and, of each residual, the hashes before and after it, which show where several residuals lead without opening them. The
hash of the model that a device holds is computed in any case.

A cache: any worker runs any device with the same bits, whatever is in it.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable

import xxhash

from ..codec import Array, ArraySpec
from .memory import HeldModel
from .predict import Residual

_MOST_BYTES = 1 << 26  # of models; the newest is kept in any case
_MOST_STEPS = 1 << 12

Key = tuple[Hashable, ...]


class OpenedResiduals:
    """Opened residuals, and the models that the newest of them led to; the most recently used last."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        """``most_bytes``: of all models."""
        self._most_bytes = most_bytes
        self._steps: OrderedDict[Key, tuple[int, int]] = OrderedDict()  # hash of the prediction, and of the model
        self._models: OrderedDict[Key, HeldModel] = OrderedDict()
        self._num_bytes = 0

    def reach(self, prediction: int, keys: Iterable[Key]) -> tuple[int, HeldModel | None]:
        """How far known residuals lead from a prediction with this hash, by a rule that predicts the model itself.

        Returns the number of residuals and the model behind them, which is the farthest one that was kept; 0 and None if there
        is none.
        """
        found: tuple[int, Key] | None = None
        for number, key in enumerate(keys, 1):
            before, after = self._steps.get(key, (None, 0))
            if before != prediction:
                break
            prediction = after
            if key in self._models:
                found = number, key
        if found is None:
            return 0, None
        self._models.move_to_end(found[1])
        return found[0], self._models[found[1]]

    def add(self, key: Key, prediction: int, model: HeldModel) -> None:
        """A residual to the ``prediction`` with this hash was opened, and leads to ``model``."""
        for array in model.arrays.values():
            array.flags.writeable = False
        self._steps[key] = prediction, model.hash
        if len(self._steps) > _MOST_STEPS:
            self._steps.popitem(last=False)
        if key in self._models:
            self._num_bytes -= self._models.pop(key).num_bytes
        self._models[key] = model
        self._num_bytes += model.num_bytes
        while self._num_bytes > self._most_bytes and len(self._models) > 1:
            self._num_bytes -= self._models.popitem(last=False)[1].num_bytes


def key_of(packet: Array, *, codec: object, residual: Residual, expected: tuple[ArraySpec, ...]) -> Key:
    """What the result of opening a residual depends on, besides the prediction."""
    return xxhash.xxh3_128_digest(packet.data), repr(codec), residual.arithmetic, expected
