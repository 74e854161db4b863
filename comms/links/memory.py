"""The memory of the two ends of a device's link, and how it changes. Both ends run this code.

Each message states the version and the hash of the state that it builds on. Only *acknowledged* states are built on:

- Downlink: the global models as the device holds them. The server's end advances when a report names the version that the
  device holds, whatever the outcome of the plan.
- Uplink: the device's models as the server holds them, each with the global model that it was trained from. Both ends
  advance only for an update that was folded, which the next plan's message names (``Plan.acknowledged``). Until then the
  device keeps the pending state beside the acknowledged one.

Histories are as long as the rules of the current plan need, and are cut at both ends at the same time. If the two ends
differ, both start from empty histories: with a dense model sent on the downlink, or, if the downlink has no memory, with a
plan that acknowledges ``FORGET``.

A memory belongs to a *place*: a family of models, and the channels of it that the device holds. Where a plan's part is at
another place, both ends move their memories before they use them: elements that both places have keep their values. What only
the new one has is zero in the uplink's history and in the unsent error; in the downlink's models a patch sets it (``patch``).
The server's record moves when a report or an update shows that the device has opened the plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from ..codec import Array, Arrays
from .predict import HISTORY, Residual, hash_arrays, predict

ModelName = tuple[int, int]  # version and hash
FORGET = -1  # acknowledged in place of a folded plan: both ends drop their histories
WHOLE = b""  # the place of all channels of the global model; other places are named by bytes that have no meaning here
# A tensor of the old place, by name, as one of the new place: what both have is copied, the rest is zero (False). Where nothing
# changes it is the array itself.
Move = Callable[[str, Array], Array]


@dataclass(frozen=True)
class HeldModel:
    """A global model as a device holds it."""

    version: int
    hash: int
    arrays: Arrays

    @classmethod
    def of(cls, version: int, arrays: Arrays) -> "HeldModel":
        """A model with the hash of its arrays."""
        return cls(version, hash_arrays(arrays), arrays)

    @property
    def name(self) -> ModelName:
        """Version and hash."""
        return self.version, self.hash

    def hash_of(self, prediction: Arrays) -> int:
        """The hash of a prediction, which may be this model itself."""
        same = list(prediction) == list(self.arrays) and all(
            prediction[name] is array for name, array in self.arrays.items()
        )
        return self.hash if same else hash_arrays(prediction)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class SentUpdate:
    """A device's model as the server holds it (``local``), and the global model that it was trained from (``base``)."""

    base: Arrays
    local: Arrays


@dataclass
class LinkMemory:
    """The acknowledged history of one link: global models and device's models, newest last."""

    models: list[HeldModel] = field(default_factory=list)
    sent: list[SentUpdate] = field(default_factory=list)

    def moved(
        self, move: Move | None, *, added: Mapping[str, tuple[Array, Array]] = MappingProxyType({})
    ) -> "LinkMemory":
        """The memory at another place. ``move``: None if the two have nothing in common; the memory is then empty.

        ``added``: by tensor, flat indices of elements that are new in the moved tensor, and their values in the global models.
        """
        if move is None:
            return LinkMemory()
        models = []
        for model in self.models:
            arrays = moved_arrays(model.arrays, move)
            for name, (indices, values) in added.items():
                arrays[name] = np.array(arrays[name], order="C")
                arrays[name].reshape(-1)[indices] = values
            models.append(HeldModel.of(model.version, arrays))
        sent = [SentUpdate(moved_arrays(each.base, move), moved_arrays(each.local, move)) for each in self.sent]
        return LinkMemory(models=models, sent=sent)

    def trim(self, down: Residual | None, up: Residual | None) -> None:
        """Drops what the rules of a plan do not need. The newest global model always stays."""
        num_models, num_sent = history_lengths(down, up)
        self.models = self.models[-num_models:]
        self.sent = self.sent[-num_sent:] if num_sent else []

    def predict_down(self, residual: Residual, names: Sequence[str]) -> Arrays:
        """Predicts the next global model. Raises ``OutOfSync`` if the newest one lacks a tensor."""
        own = [model.arrays for model in self.models]
        return predict(residual, own=own, other=[sent.local for sent in self.sent], start=own[-1], names=names)

    def predict_up(self, residual: Residual, base: Arrays, names: Sequence[str]) -> Arrays:
        """Predicts the device's model after training from ``base``."""
        other = [*(sent.base for sent in self.sent), base]
        return predict(residual, own=[sent.local for sent in self.sent], other=other, start=base, names=names)


def moved_arrays(arrays: Arrays, move: Move) -> dict[str, Array]:
    """Named arrays at another place."""
    return {name: move(name, array) for name, array in arrays.items()}


def history_lengths(down: Residual | None, up: Residual | None) -> tuple[int, int]:
    """How many global models, and how many of the device's models, the rules of a plan need."""
    num_models = max(1, HISTORY[down.rule][0]) if down else 1
    return num_models, max(HISTORY[up.rule][0] if up else 0, HISTORY[down.rule][1] if down else 0)


@dataclass
class PendingUpdate:
    """An update that the device has sent and the server has not acknowledged.

    ``sent``: None if no rule in use needs it. ``error``: the error that feedback carries if the update is folded.
    """

    plan: int
    sent: SentUpdate | None
    error: Arrays


@dataclass
class DeviceEnd:
    """The device's end of its link: acknowledged memory, the error that feedback carries, and the pending update.

    ``place``: that of all of these.
    """

    memory: LinkMemory = field(default_factory=LinkMemory)
    error: Arrays = field(default_factory=dict)
    pending: PendingUpdate | None = None
    place: bytes = WHOLE

    def acknowledge(self, plan: int) -> None:
        """Adds the pending update to the memory if it was folded, else drops it.

        ``plan``: id of the newest plan whose update was folded, or ``FORGET``, which drops the memory too.
        """
        if plan == FORGET:
            self.memory = LinkMemory()
        elif self.pending is not None and self.pending.plan == plan:
            self.error = self.pending.error
            if self.pending.sent is not None:
                self.memory.sent.append(self.pending.sent)
        self.pending = None

    def move(self, place: bytes, move: Move | None, memory: LinkMemory) -> None:
        """Moves the error to ``place``, and replaces the memory by ``memory``, which is there already.

        ``move``: as in ``LinkMemory.moved``. The newest plan must have been acknowledged: a pending update would not be moved.
        """
        assert self.pending is None or place == self.place
        if place != self.place:
            self.error = moved_arrays(self.error, move) if move is not None else {}
        self.place, self.memory = place, memory
