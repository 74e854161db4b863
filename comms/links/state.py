"""The end of a simulated device's link as named arrays, which travel with its plan and come back with its report.

Of a model that many devices hold, a state may hold the name alone, version and hash: its arrays are a packet, which is stored
once and passed beside every state that names it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec
import numpy as np

from ..codec import NO_CONTEXT, Array, Arrays, ArraySpec, IdentityCodec, specs_of
from ..errors import OutOfSync, PacketError
from ..packet import PacketKind, Stamp, claimed_kind, seal, unseal
from .memory import DeviceEnd, HeldModel, LinkMemory, ModelName, PendingUpdate, SentUpdate

LinkState = Mapping[str, Array]


def to_state(end: DeviceEnd, *, named: Collection[ModelName] = (), error: bool = True) -> LinkState:
    """A device's end as named arrays.

    ``named``: models of which the state holds the name only; their arrays must be passed to ``from_state``. ``error``: False
    leaves the error out, for a receiver that has it from the state before (``settled``).
    """
    memory, pending = end.memory, end.pending
    head = _Head(
        models=[_Model(m.version, m.hash, specs_of(m.arrays) if m.name in named else None) for m in memory.models],
        sent=len(memory.sent),
        pending=pending.plan if pending else None,
        pending_sent=pending is not None and pending.sent is not None,
        place=end.place,
        error=error,
    )
    arrays: dict[str, Array] = {"head": _encoded(head)}
    for i, model in enumerate(memory.models):
        if model.name not in named:
            _put(arrays, f"model{i}", model.arrays)
    for i, sent in enumerate(memory.sent):
        _put(arrays, f"base{i}", sent.base)
        _put(arrays, f"local{i}", sent.local)
    if error:
        _put(arrays, "error", end.error)
    if pending is not None:
        _put(arrays, "pending_error", pending.error)
        if pending.sent is not None:
            _put(arrays, "pending_base", pending.sent.base)
            _put(arrays, "pending_local", pending.sent.local)
    return arrays


def from_state(state: LinkState | None, packets: Sequence[Array] = ()) -> DeviceEnd:
    """The end that ``to_state`` returned as ``state``; an empty one for None.

    ``packets``: of the models that the state names (``seal_named``), in the order of ``named_models``. Raises ``OutOfSync`` for
    a damaged state, and for packets that are not those of its models.
    """
    if state is None:
        if packets:
            raise OutOfSync("models that a state names were sent to a device that holds no model")
        return DeviceEnd()
    try:
        return _read(state, iter(packets))
    except (msgspec.MsgspecError, KeyError, StopIteration, PacketError) as error:
        raise OutOfSync(f"the state of the device's end of its link cannot be read: {error!r}") from error


def _read(state: LinkState, packets: Iterator[Array]) -> DeviceEnd:
    """The end of a state; raises ``KeyError``, ``StopIteration``, a ``PacketError`` or an error of msgspec."""
    head, groups = _head(state), _groups(state)
    models = []
    for i, model in enumerate(head.models):
        arrays = groups[f"model{i}"] if model.specs is None else _unseal_named(next(packets), model, model.specs)
        models.append(HeldModel(model.version, model.hash, arrays))
    if next(packets, None) is not None:
        raise OutOfSync("more models were sent than the state of the device's link names")
    memory = LinkMemory(
        models=models, sent=[SentUpdate(groups[f"base{i}"], groups[f"local{i}"]) for i in range(head.sent)]
    )
    pending = None
    if head.pending is not None:
        sent = SentUpdate(groups["pending_base"], groups["pending_local"]) if head.pending_sent else None
        pending = PendingUpdate(head.pending, sent, groups.get("pending_error", {}))
    return DeviceEnd(memory=memory, error=groups.get("error", {}), pending=pending, place=head.place)


class _Model(msgspec.Struct, frozen=True, array_like=True):
    """A model of a state's memory. ``specs``: of its arrays, if the state holds its name only."""

    version: int
    hash: int
    specs: tuple[ArraySpec, ...] | None = None


class _Head(msgspec.Struct, frozen=True):
    """The part of a state that is not arrays of models. ``error``: whether the error is in the state."""

    models: list[_Model]
    sent: int
    pending: int | None
    pending_sent: bool
    place: bytes
    error: bool = True


def named_models(state: LinkState | None) -> tuple[ModelName, ...]:
    """The models of which a state holds the name only. Raises ``OutOfSync`` for a damaged state."""
    if not state:
        return ()
    try:
        return tuple((model.version, model.hash) for model in _head(state).models if model.specs is not None)
    except (msgspec.MsgspecError, KeyError) as error:
        raise OutOfSync(f"the state of the device's end of its link cannot be read: {error!r}") from error


def split_held(packets: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """The packets of models that a state names, and all others. Their checksums are checked when they are opened."""
    named = [claimed_kind(packet) == PacketKind.HELD for packet in packets]
    pairs = list(zip(packets, named, strict=True))
    return [packet for packet, found in pairs if found], [packet for packet, found in pairs if not found]


def seal_named(model: HeldModel) -> Array:
    """A packet of a model's arrays, for all states that name it."""
    stamp = Stamp(kind=PacketKind.HELD, version=model.version, state_hash=model.hash)
    return seal(model.arrays, codec=IdentityCodec(), context=NO_CONTEXT, stamp=stamp)[0]


def _unseal_named(packet: Array, model: _Model, specs: tuple[ArraySpec, ...]) -> Arrays:
    """The arrays of a model, as views of its packet."""
    stamp = Stamp(kind=PacketKind.HELD, version=model.version, state_hash=model.hash)
    return unseal(packet, codec=IdentityCodec(), expected=specs, context=NO_CONTEXT, stamp=stamp)


def settled(state: LinkState, *, before: LinkState | None, folded: int) -> LinkState:
    """A returned state without what the next plan would drop: it is acknowledged now, as by ``DeviceEnd.acknowledge``.

    ``before``: the state that was sent with the plan, which has the error if ``state`` has none. ``folded``: id of the newest
    plan whose update was folded. Raises ``OutOfSync`` for a damaged state.
    """
    try:
        head, groups = _head(state), _groups(state)
        error = groups.get("error", {}) if head.error else _groups(before or {}).get("error", {})
        sent = [(groups[f"base{i}"], groups[f"local{i}"]) for i in range(head.sent)]
        if head.pending is not None and head.pending == folded:
            error = groups.get("pending_error", {})
            if head.pending_sent:
                sent.append((groups["pending_base"], groups["pending_local"]))
    except (msgspec.MsgspecError, KeyError) as failure:
        raise OutOfSync(f"the state of the device's end of its link cannot be read: {failure!r}") from failure
    head = msgspec.structs.replace(head, sent=len(sent), pending=None, pending_sent=False, error=True)
    arrays: dict[str, Array] = {"head": _encoded(head)}
    for i in range(len(head.models)):
        _put(arrays, f"model{i}", groups.get(f"model{i}", {}))
    for i, (base, local) in enumerate(sent):
        _put(arrays, f"base{i}", base)
        _put(arrays, f"local{i}", local)
    _put(arrays, "error", error)
    return arrays


def models_only(state: LinkState) -> LinkState:
    """A state with the global models alone, as a device needs it that only evaluates. Raises ``OutOfSync``."""
    try:
        head = msgspec.structs.replace(_head(state), sent=0, pending=None, pending_sent=False, error=True)
    except (msgspec.MsgspecError, KeyError) as error:
        raise OutOfSync(f"the state of the device's end of its link cannot be read: {error!r}") from error
    return {"head": _encoded(head)} | {name: array for name, array in state.items() if name.startswith("model")}


def _head(state: LinkState) -> _Head:
    return msgspec.msgpack.decode(state["head"].tobytes(), type=_Head)


def _encoded(head: _Head) -> Array:
    return np.frombuffer(msgspec.msgpack.encode(head), np.uint8)


def _groups(state: LinkState) -> dict[str, dict[str, Array]]:
    """The arrays of a state by group and name."""
    groups: dict[str, dict[str, Array]] = {}
    for key, array in state.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = array
    return groups


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
