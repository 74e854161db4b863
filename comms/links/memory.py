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

import msgspec
import numpy as np

from ..codec import Array, Arrays
from ..errors import OutOfSync
from .predict import HISTORY, Residual, hash_arrays, predict

FORGET = -1  # acknowledged in place of a folded plan: both ends drop their histories
LinkState = Mapping[
    str, Array
]  # a simulated device's end as named arrays, sent with its plan and returned with its report
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

    def to_state(self) -> LinkState:
        """The end as named arrays."""
        memory, pending = self.memory, self.pending
        head = _Head(
            versions=[(model.version, model.hash) for model in memory.models],
            sent=len(memory.sent),
            pending=pending.plan if pending else None,
            pending_sent=pending is not None and pending.sent is not None,
            place=self.place,
        )
        arrays: dict[str, Array] = {"head": np.frombuffer(msgspec.msgpack.encode(head), np.uint8)}
        for i, model in enumerate(memory.models):
            _put(arrays, f"model{i}", model.arrays)
        for i, sent in enumerate(memory.sent):
            _put(arrays, f"base{i}", sent.base)
            _put(arrays, f"local{i}", sent.local)
        _put(arrays, "error", self.error)
        if pending is not None:
            _put(arrays, "pending_error", pending.error)
            if pending.sent is not None:
                _put(arrays, "pending_base", pending.sent.base)
                _put(arrays, "pending_local", pending.sent.local)
        return arrays

    @classmethod
    def from_state(cls, state: LinkState | None) -> "DeviceEnd":
        """The end that ``to_state`` returned as ``state``; an empty one for None. Raises ``OutOfSync`` for a damaged state."""
        if state is None:
            return cls()
        try:
            return cls._read(state)
        except (msgspec.MsgspecError, KeyError) as error:
            raise OutOfSync(f"the state of the device's end of its link cannot be read: {error!r}") from error

    @classmethod
    def _read(cls, state: LinkState) -> "DeviceEnd":
        """The end of a state; raises ``KeyError`` or an error of msgspec for a damaged one."""
        head = msgspec.msgpack.decode(state["head"].tobytes(), type=_Head)
        groups: dict[str, dict[str, Array]] = {}
        for key, array in state.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = array
        memory = LinkMemory(
            models=[HeldModel(v, h, groups[f"model{i}"]) for i, (v, h) in enumerate(head.versions)],
            sent=[SentUpdate(groups[f"base{i}"], groups[f"local{i}"]) for i in range(head.sent)],
        )
        pending = None
        if head.pending is not None:
            sent = SentUpdate(groups["pending_base"], groups["pending_local"]) if head.pending_sent else None
            pending = PendingUpdate(head.pending, sent, groups.get("pending_error", {}))
        return cls(memory=memory, error=groups.get("error", {}), pending=pending, place=head.place)


class _Head(msgspec.Struct, frozen=True):
    """The part of a state that is not arrays of models."""

    versions: list[tuple[int, int]]
    sent: int
    pending: int | None
    pending_sent: bool
    place: bytes


def _put(arrays: dict[str, Array], group: str, named: Arrays) -> None:
    """Adds named arrays to a state, as a group."""
    for name, array in named.items():
        arrays[f"{group}/{name}"] = array


def state_bytes(state: LinkState) -> int:
    """Size of a state's arrays in bytes."""
    return sum(array.nbytes for array in state.values())


def copy_state(state: LinkState) -> LinkState:
    """A state in this process's own memory. Arrays from an object store are views, which would keep their object there."""
    return {name: array if array.flags.owndata else array.copy() for name, array in state.items()}
