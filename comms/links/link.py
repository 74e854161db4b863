"""What the two ends of a device's link remember, and how it changes: the same code at both ends.

A message says which state it builds on (version and hash). A state is *acknowledged* before it may be built on:

- downlink: the global models as the device has them. The server's end advances when a report says which version the device
  holds, whatever became of the plan.
- uplink: the device's own models as the server has them, each with the model that it started from. Both ends advance only
  for an update that was folded; the next plan's message names it (``Plan.acknowledged``). Until then the device keeps the
  pending state beside the acknowledged one.

Histories are as long as the rules of the present plan need, cut at both ends at the same moment. Where they have come apart,
both begin anew: with a dense model that came by the downlink, or, behind a downlink without memory, with a plan that
acknowledges ``FORGET``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from ..codec import Array, Arrays
from ..errors import OutOfSync
from .predict import HISTORY, Residual, hash_arrays, predict

FORGET = -1  # in place of the newest plan that was folded: nothing is, and the histories begin anew
State = Mapping[str, Array]  # what a simulated device remembers, as named arrays: it travels with its plan


@dataclass(frozen=True)
class Model:
    """A global model as a device has it."""

    version: int
    hash: int
    arrays: Arrays

    @classmethod
    def of(cls, version: int, arrays: Arrays) -> "Model":
        """With its hash."""
        return cls(version, hash_arrays(arrays), arrays)


@dataclass(frozen=True)
class Sent:
    """A device's model as the server has it, and the global model that it started from."""

    base: Arrays
    local: Arrays


@dataclass
class Memory:
    """The acknowledged history of one link, newest last."""

    models: list[Model] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)

    def trim(self, down: Residual | None, up: Residual | None) -> None:
        """Forget what the rules of this plan do not need. (The newest model stays.)"""
        models, sent = depths(down, up)
        self.models = self.models[-models:]
        self.sent = self.sent[-sent:] if sent else []

    def predict_down(self, residual: Residual, names: Sequence[str]) -> Arrays:
        """What both ends expect of the next global model. Raises ``OutOfSync`` where the newest one lacks a tensor."""
        own = [model.arrays for model in self.models]
        return predict(residual, own=own, other=[sent.local for sent in self.sent], start=own[-1], names=names)

    def predict_up(self, residual: Residual, base: Arrays, names: Sequence[str]) -> Arrays:
        """What both ends expect of the device's model, which started from ``base``."""
        other = [*(sent.base for sent in self.sent), base]
        return predict(residual, own=[sent.local for sent in self.sent], other=other, start=base, names=names)


def depths(down: Residual | None, up: Residual | None) -> tuple[int, int]:
    """How many global models and how many of the device's own the rules of a plan look back on."""
    models = max(1, HISTORY[down.rule][0]) if down else 1
    return models, max(HISTORY[up.rule][0] if up else 0, HISTORY[down.rule][1] if down else 0)


@dataclass
class Pending:
    """An update that the device has sent, and does not know the fate of. ``sent`` None: no rule in use asks for it."""

    plan: int
    sent: Sent | None
    error: Arrays


@dataclass
class DeviceEnd:
    """The device's end: its memory, the error that feedback carries, and what is pending."""

    memory: Memory = field(default_factory=Memory)
    error: Arrays = field(default_factory=dict)
    pending: Pending | None = None

    def acknowledge(self, plan: int) -> None:
        """``plan``: id of the newest update of this device that was folded, or ``FORGET``. Settles what is pending."""
        if plan == FORGET:
            self.memory = Memory()
        elif self.pending is not None and self.pending.plan == plan:
            self.error = self.pending.error
            if self.pending.sent is not None:
                self.memory.sent.append(self.pending.sent)
        self.pending = None

    def restart(self, model: Model) -> None:
        """A dense model came, or one agreed by seed: histories begin anew at both ends. The error is the device's own."""
        self.memory = Memory(models=[model])

    def to_state(self) -> State:
        """All of it as named arrays."""
        memory, pending = self.memory, self.pending
        head = _Head(
            versions=[(model.version, model.hash) for model in memory.models],
            sent=len(memory.sent),
            pending=pending.plan if pending else None,
            pending_sent=pending is not None and pending.sent is not None,
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
    def from_state(cls, state: State | None) -> "DeviceEnd":
        """The end that ``to_state`` described; an empty one for None. Raises ``OutOfSync`` for a damaged state."""
        if state is None:
            return cls()
        try:
            return cls._read(state)
        except (msgspec.MsgspecError, KeyError) as error:
            raise OutOfSync(f"the state of the device's end of its link cannot be read: {error!r}") from error

    @classmethod
    def _read(cls, state: State) -> "DeviceEnd":
        """The end that a state describes."""
        head = msgspec.msgpack.decode(state["head"].tobytes(), type=_Head)
        groups: dict[str, dict[str, Array]] = {}
        for key, array in state.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = array
        memory = Memory(
            models=[Model(v, h, groups[f"model{i}"]) for i, (v, h) in enumerate(head.versions)],
            sent=[Sent(groups[f"base{i}"], groups[f"local{i}"]) for i in range(head.sent)],
        )
        pending = None
        if head.pending is not None:
            sent = Sent(groups["pending_base"], groups["pending_local"]) if head.pending_sent else None
            pending = Pending(head.pending, sent, groups.get("pending_error", {}))
        return cls(memory=memory, error=groups.get("error", {}), pending=pending)


class _Head(msgspec.Struct, frozen=True):
    """What a state holds besides arrays."""

    versions: list[tuple[int, int]]
    sent: int
    pending: int | None
    pending_sent: bool


def _put(arrays: dict[str, Array], group: str, named: Arrays) -> None:
    """Add a group of arrays to a state."""
    for name, array in named.items():
        arrays[f"{group}/{name}"] = array


def state_bytes(state: State) -> int:
    """Bytes of a state's arrays."""
    return sum(array.nbytes for array in state.values())


def copy_state(state: State) -> State:
    """A state in this process's own memory: what came through an object store is a view that would keep its object there."""
    return {name: array if array.flags.owndata else array.copy() for name, array in state.items()}
