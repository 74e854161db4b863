"""The receiving ends of a link: models at the device, updates at the server.

A packet is used only if its version and the hash of the state that it builds on are those of the receiver. Otherwise
``OutOfSync`` is raised, which leads to a counted resynchronisation and never to silent drift.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType

import msgspec
import numpy as np

from ..codec import Array, Arrays, ArraySpec, Codec, Context, IdentityCodec
from ..errors import MismatchedPacket, OutOfSync, UnfitPacket
from ..packet import PacketKind, Stamp, read_stamp, unseal
from .memory import WHOLE, DeviceEnd, HeldModel, LinkMemory, Move, SentUpdate, history_lengths
from .opened import OpenedResiduals, key_of
from .patch import apply_patch
from .predict import Residual, hash_arrays, residual_specs, residuals_of, restore


def receive_models(
    end: DeviceEnd,
    packets: Sequence[Array],
    *,
    version: int,
    residual: Residual,
    codec: Codec,
    expected: tuple[ArraySpec, ...],
    agreed: Callable[[], Arrays],
    place: bytes = WHOLE,
    move: Move | None = None,
    opened: OpenedResiduals | None = None,
) -> HeldModel:
    """Advances a device's end to ``version`` by the packets of one message, in their order. Returns the new model.

    Of the intermediate models, only as many are kept as the rule needs. ``agreed``: makes the first model from the seed.
    ``place``: of the plan's part, to which the end moves. ``move``: leads there from the end's own place; None if that is the
    same, or if the two have nothing in common. ``opened``: of earlier plans. Raises a ``PacketError`` and leaves the end
    unchanged.
    """
    depth, _ = history_lengths(residual, None)
    memory, at, restarted = LinkMemory(list(end.memory.models), list(end.memory.sent)), end.place, False
    ahead = list(packets)
    while ahead:
        packet, count = ahead[0], 1
        stamp = read_stamp(packet)
        if stamp.kind in (PacketKind.RESIDUAL, PacketKind.PATCH) and not memory.models:
            what = "a residual to" if stamp.kind == PacketKind.RESIDUAL else "a patch of"
            raise OutOfSync(f"{what} version {stamp.version} was sent to a device that holds no model")
        if stamp.kind == PacketKind.RESIDUAL:
            specs = expected if at == place else _specs_there(memory.models[-1], expected)
            shared = opened if at == place and residual.rule == "stationary" else None
            count, model = _follow(memory, ahead, stamp, residual=residual, codec=codec, expected=specs, opened=shared)
            memory.models = [*memory.models, model][-depth:]
        elif stamp.kind == PacketKind.PATCH:
            if at == place or move is None:
                raise OutOfSync(
                    "a patch was sent to a device that holds the channels of its plan, or none that it could move"
                )
            memory, at = apply_patch(packet, stamp, memory, move), place
            _check_fits(memory.models[-1], expected)
        elif stamp.kind in (PacketKind.WEIGHTS, PacketKind.AGREED):
            memory = LinkMemory(models=[_whole_model(packet, stamp, expected=expected, agreed=agreed)])
            at, restarted = place, True
        else:
            raise MismatchedPacket(f"a packet of kind {stamp.kind.name} cannot start a plan")
        del ahead[:count]
    models = memory.models
    if not models or models[-1].version != version:
        found = models[-1].version if models else "none"
        raise OutOfSync(f"the device would hold version {found} after this message; its plan starts from {version}")
    if at != place:
        raise OutOfSync("the device holds other channels than its plan, and was sent neither a patch nor a dense model")
    if not packets:
        _check_unchanged(models[-1], expected)
    if place != end.place or restarted:
        end.move(place, move, memory)
    end.memory.models = models
    return models[-1]


def _hash_of(model: HeldModel, expected: tuple[ArraySpec, ...]) -> int:
    """The hash of the expected tensors of a model as they are. Raises ``OutOfSync`` if it lacks one."""
    _check_fits(model, expected)
    return hash_arrays({spec.name: model.arrays[spec.name] for spec in expected})


def _specs_there(model: HeldModel, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
    """The specifications of the same tensors at the place of ``model``. Raises ``OutOfSync`` if it lacks one."""
    if missing := [spec.name for spec in expected if spec.name not in model.arrays]:
        raise OutOfSync(f"the device holds no {missing[0]!r}")
    return tuple(msgspec.structs.replace(spec, shape=model.arrays[spec.name].shape) for spec in expected)


def _follow(
    memory: LinkMemory,
    packets: Sequence[Array],
    stamp: Stamp,
    *,
    residual: Residual,
    codec: Codec,
    expected: tuple[ArraySpec, ...],
    opened: OpenedResiduals | None,
) -> tuple[int, HeldModel]:
    """The model behind the first of the residuals, or behind as many as were ``opened`` before; and their number.

    ``stamp``: of the first. ``opened``: None for a rule that does not predict the model in memory itself.
    """
    if opened is None:
        return 1, _next_model(memory, packets[0], stamp, residual=residual, codec=codec, expected=expected)
    keys = (key_of(packet, codec=codec, residual=residual, expected=expected) for packet in packets)
    number, model = opened.reach(_hash_of(memory.models[-1], expected), keys)
    if model is None:
        model = _next_model(memory, packets[0], stamp, residual=residual, codec=codec, expected=expected)
        key = key_of(packets[0], codec=codec, residual=residual, expected=expected)
        opened.add(key, stamp.state_hash, model)
    return max(1, number), model


def _next_model(
    memory: LinkMemory,
    packet: Array,
    stamp: Stamp,
    *,
    residual: Residual,
    codec: Codec,
    expected: tuple[ArraySpec, ...],
) -> HeldModel:
    """Opens a residual packet and returns the model of its version."""
    _check_fits(memory.models[-1], expected)
    prediction = memory.predict_down(residual, [spec.name for spec in expected])
    if (found := hash_arrays(prediction)) != stamp.state_hash:
        raise OutOfSync(
            f"a residual to version {stamp.version} builds on state {stamp.state_hash:016x}; the device predicts {found:016x}"
        )
    context = context_for(expected, seed=stamp.version)
    sent = unseal(packet, codec=codec, expected=residual_specs(expected, residual), context=context, finite=True)
    arrays = restore(sent, prediction, residual)
    _check_finite(arrays)
    return HeldModel.of(stamp.version, arrays)


def _check_unchanged(model: HeldModel, expected: tuple[ArraySpec, ...]) -> None:
    """Raises ``OutOfSync`` if a model in memory is damaged or another part's. Needed if no packet checks its hash."""
    _check_fits(model, expected)
    if len(model.arrays) != len(expected):
        raise OutOfSync(f"the device holds {len(model.arrays)} tensors; the plan's part has {len(expected)}")
    if (found := hash_arrays(model.arrays)) != model.hash:
        raise OutOfSync(f"the model in memory has hash {found:016x}; it was {model.hash:016x}")


def _check_fits(model: HeldModel, expected: tuple[ArraySpec, ...]) -> None:
    """Raises ``OutOfSync`` if a model lacks an expected tensor, or has it in another shape or type."""
    for spec in expected:
        array = model.arrays.get(spec.name)
        if array is None or array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            held = "none" if array is None else f"{array.dtype.str} of shape {array.shape}"
            raise OutOfSync(f"the device holds {held} as {spec.name!r}; expected is {spec.dtype} of shape {spec.shape}")


def _check_finite(arrays: Arrays) -> None:
    """Raises ``UnfitPacket`` for NaN and infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UnfitPacket(f"{name!r} holds NaN or infinity")


def _whole_model(
    packet: Array, stamp: Stamp, *, expected: tuple[ArraySpec, ...], agreed: Callable[[], Arrays]
) -> HeldModel:
    """Opens a packet that builds on no state: a dense model, or one that is made from the seed."""
    if stamp.kind == PacketKind.WEIGHTS:
        context = context_for(expected, seed=stamp.version)
        arrays = unseal(packet, codec=IdentityCodec(), expected=expected, context=context, finite=True)
    else:
        unseal(packet, codec=IdentityCodec(), expected=(), context=Context())
        first = agreed()
        arrays = {spec.name: first[spec.name] for spec in expected}
    model = HeldModel.of(stamp.version, arrays)
    if model.hash != stamp.state_hash:
        source = "was received" if stamp.kind == PacketKind.WEIGHTS else "follows from the seed"
        raise OutOfSync(f"the model that {source} has hash {model.hash:016x}; the server's has {stamp.state_hash:016x}")
    return model


def receive_update(
    packet: Array,
    *,
    prediction: Arrays,
    residual: Residual,
    codec: Codec,
    expected: tuple[ArraySpec, ...],
    context: Context,
    stamp: Stamp,
) -> tuple[Arrays, Arrays]:
    """Opens an update. Returns the residuals, and the device's model as both ends then hold it.

    ``stamp``: the stamp that the packet must have, with the hash of ``prediction``. Raises a ``PacketError``.
    """
    found = read_stamp(packet)
    if found.state_hash != stamp.state_hash:
        raise OutOfSync(
            f"the update builds on state {found.state_hash:016x}; the server predicts {stamp.state_hash:016x}"
        )
    sent = unseal(
        packet, codec=codec, expected=residual_specs(expected, residual), context=context, stamp=stamp, finite=True
    )
    local = restore(sent, prediction, residual)
    _check_finite(local)
    return sent, local


def update_residual(values: Arrays, prediction: Arrays, error: Arrays, residual: Residual) -> dict[str, Array]:
    """The residual that a device has to send: its model minus the prediction, plus the unsent ``error`` with feedback.

    The error of a tensor is left out if its shape or type differs from the tensor's (its width has changed).
    """
    residuals = residuals_of(values, prediction, residual)
    if not residual.feedback:
        return residuals
    return {
        name: np.asarray(array + error[name]) if name in error and _alike(array, error[name]) else array
        for name, array in residuals.items()
    }


def _alike(one: Array, other: Array) -> bool:
    """Whether two arrays have the same shape and type."""
    return one.shape == other.shape and one.dtype == other.dtype


def unsent_error(residuals: Arrays, sent: Arrays, error: Arrays, residual: Residual) -> dict[str, Array]:
    """The unsent error after an update: ``residuals`` minus what was ``sent``. Empty without feedback.

    ``error``: the error before. It stays for tensors that the update does not hold.
    """
    if not residual.feedback:
        return {}
    return dict(error) | {name: np.asarray(array - sent[name]) for name, array in residuals.items()}


def context_for(expected: tuple[ArraySpec, ...], *, seed: int, reference: Arrays = MappingProxyType({})) -> Context:
    """The codec context for these arrays, derived alike at both ends, but for the ``reference``, which only a sender gives."""
    return Context(seed=seed, reference=reference, roles={spec.name: spec.role for spec in expected})


def sent_update(base: Arrays, local: Arrays, names: Sequence[str]) -> SentUpdate:
    """An entry for the history of the uplink, cut to the tensors ``names``."""
    return SentUpdate(base={name: base[name] for name in names}, local=local)
