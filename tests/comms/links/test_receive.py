"""The receiving ends: what they accept, what they refuse, and that a refused message leaves them unchanged."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, Array, Arrays, ArraySpec, Codec, Context, IdentityCodec, specs_of
from fedbonsai.comms.errors import CorruptPacket, MismatchedPacket, OutOfSync, PacketError, UnfitPacket
from fedbonsai.comms.links.broadcast import seal_agreed, seal_dense, seal_model
from fedbonsai.comms.links.memory import DeviceEnd, HeldModel, LinkMemory, PendingUpdate, SentUpdate
from fedbonsai.comms.links.predict import Residual, hash_arrays, residuals_of
from fedbonsai.comms.links.receive import (
    context_for,
    receive_models,
    receive_update,
    sent_update,
    unsent_error,
    update_residual,
)
from fedbonsai.comms.links.state import to_state
from fedbonsai.comms.packet import PacketKind, Stamp, seal

from ..fakes import Halve

STATIONARY, HALF_STEP = Residual(rule="stationary"), Residual(rule="half_step")
DELTA, BITS = Residual(rule="delta"), Residual(rule="delta", arithmetic="bits")
STAMP = Stamp(kind=PacketKind.UPDATE, version=3, plan=17, attempt=1)


def tensors(value: float) -> dict[str, Array]:
    return {"w": np.full((2, 2), value, "<f4"), "s": np.array(-value, "<f4")}


MODELS = [HeldModel.of(version, tensors(10 * version)) for version in range(4)]
EXPECTED = specs_of(tensors(0))


def between(start: int, end: int, *, residual: Residual = STATIONARY, sent: Sequence[SentUpdate] = ()) -> Array:
    """The residual packet from one of the models to another."""
    memory = LinkMemory(models=[MODELS[start]], sent=list(sent))
    packet, _ = seal_model(
        MODELS[end].arrays, end, memory=memory, residual=residual, codec=IdentityCodec(), context=NO_CONTEXT
    )
    return packet


def dense(version: int) -> Array:
    return seal_dense(MODELS[version], codec=IdentityCodec(), context=NO_CONTEXT)


def device_end(*versions: int, sent: Sequence[SentUpdate] = ()) -> DeviceEnd:
    """An end with models, sent updates, an error and a pending update."""
    return DeviceEnd(
        memory=LinkMemory(models=[MODELS[v] for v in versions], sent=list(sent)),
        error=tensors(0.5),
        pending=PendingUpdate(3, SentUpdate(tensors(1), tensors(2)), tensors(4)),
    )


def receive(
    end: DeviceEnd,
    *packets: Array,
    version: int,
    residual: Residual = STATIONARY,
    expected: tuple[ArraySpec, ...] = EXPECTED,
    seeded: HeldModel = MODELS[0],
) -> HeldModel:
    return receive_models(
        end,
        packets,
        version=version,
        residual=residual,
        codec=IdentityCodec(),
        expected=expected,
        agreed=lambda: seeded.arrays,
    )


def assert_refused(
    end: DeviceEnd, *packets: Array, version: int, error: type[PacketError], words: str, **more: Any
) -> None:
    """Checks that a message is refused and leaves the end as it was, to the bit and to the object."""
    before = to_state(end)
    lists = end.memory, end.memory.models, end.memory.sent
    with pytest.raises(error, match=words):
        receive(end, *packets, version=version, **more)
    after = to_state(end)
    assert list(after) == list(before)
    assert all(after[name].tobytes() == array.tobytes() for name, array in before.items())
    assert all(a is b for a, b in zip((end.memory, end.memory.models, end.memory.sent), lists, strict=True))


def versions(end: DeviceEnd) -> list[int]:
    return [model.version for model in end.memory.models]


def test_a_residual_leads_to_the_next_model() -> None:
    end = device_end(1)
    model = receive(end, between(1, 2), version=2)
    assert (model.version, model.hash) == (2, MODELS[2].hash)
    assert model.arrays["w"].tolist() == [[20, 20], [20, 20]]
    assert versions(end) == [2]
    assert end.pending is not None


def test_a_device_that_missed_rounds_reads_several_packets() -> None:
    end = device_end(0)
    assert receive(end, between(0, 1), between(1, 3), version=3).hash == MODELS[3].hash
    assert versions(end) == [3]


def test_as_many_intermediate_models_are_kept_as_the_rule_needs() -> None:
    # With two models and no sent update, the rule predicts the newest model.
    end = device_end(0)
    receive(
        end,
        between(0, 1),
        between(1, 2),
        between(2, 3),
        version=3,
        residual=Residual(rule="second_order"),
    )
    assert versions(end) == [2, 3]


def test_no_packet_is_needed_if_the_device_holds_the_version() -> None:
    end = device_end(1, 2)
    assert receive(end, version=2) is MODELS[2]
    assert versions(end) == [1, 2]


def test_a_damaged_memory_is_detected_without_a_packet() -> None:
    damaged = DeviceEnd(memory=LinkMemory(models=[HeldModel(2, MODELS[2].hash, tensors(21))]))
    words = f"the model in memory has hash .*; it was {MODELS[2].hash:016x}"
    assert_refused(damaged, version=2, error=OutOfSync, words=words)


# The held model is that of another part: a tensor is missing or narrower.
@pytest.mark.parametrize("packets", [[], [between(1, 2)]], ids=["no packet", "residual"])
@pytest.mark.parametrize(
    "held", [{"w": tensors(10)["w"]}, tensors(10) | {"w": np.full((2, 1), 10, "<f4")}], ids=["missing", "narrower"]
)
def test_a_model_of_another_part_is_out_of_sync(held: dict[str, Array], packets: list[Array]) -> None:
    version = 2 if packets else 1
    end = DeviceEnd(memory=LinkMemory(models=[HeldModel.of(1, held)]))
    assert_refused(end, *packets, version=version, error=OutOfSync, words="the device holds")


def test_a_model_of_a_larger_part_is_out_of_sync_without_a_packet() -> None:
    end = DeviceEnd(memory=LinkMemory(models=[HeldModel.of(1, tensors(10) | {"x": np.zeros(1, "<f4")})]))
    assert_refused(end, version=1, error=OutOfSync, words="the device holds 3 tensors; the plan's part has 2")


def test_a_finite_residual_that_leads_to_infinite_weights() -> None:
    large = HeldModel.of(1, tensors(3e38))
    packet = sealed(tensors(3e38), kind=PacketKind.RESIDUAL, version=2, state_hash=large.hash)
    end = DeviceEnd(memory=LinkMemory(models=[large]))
    assert_refused(end, packet, version=2, error=UnfitPacket, words="'w' holds NaN or infinity")


def test_a_dense_model_clears_the_histories_and_keeps_the_error() -> None:
    end = device_end(0, 1, sent=[SentUpdate(tensors(1), tensors(2))])
    model = receive(end, dense(3), version=3)
    assert model.hash == MODELS[3].hash
    assert versions(end) == [3]
    assert not end.memory.sent
    assert end.error["s"] == -0.5
    assert end.pending is not None


def test_a_device_without_a_model_starts_from_the_seed() -> None:
    end = DeviceEnd()
    assert receive(end, seal_agreed(MODELS[0]), between(0, 1), version=1).hash == MODELS[1].hash
    assert versions(end) == [1]


def test_the_agreed_model_is_cut_to_what_is_expected() -> None:
    part = {"s": MODELS[0].arrays["s"]}
    model = receive(DeviceEnd(), seal_agreed(HeldModel.of(0, part)), version=0, expected=specs_of(part))
    assert list(model.arrays) == ["s"]


def test_a_downlink_rule_may_use_the_sent_updates() -> None:
    # Own 10, other 3 and 8: half_step predicts 12.5.
    sent = [SentUpdate(tensors(9), tensors(3)), SentUpdate(tensors(10), tensors(8))]
    end = device_end(1, sent=sent)
    packet = between(1, 2, residual=HALF_STEP, sent=sent)
    assert receive(end, packet, version=2, residual=HALF_STEP).arrays["w"].tolist() == [[20, 20], [20, 20]]
    assert_refused(device_end(1), packet, version=2, error=OutOfSync, words="the device predicts")


OUT_OF_SYNC = {
    "a residual to a device without a model": (
        (),
        [between(0, 1)],
        1,
        "was sent to a device that holds no model",
    ),
    "nothing to a device without a model": ((), [], 1, "hold version none after this message; its plan starts from 1"),
    "a residual of another start": ((0,), [between(1, 2)], 2, "builds on state .* the device predicts"),
    "the same residual again": ((0, 1), [between(0, 1)], 1, "a residual to version 1 builds on state"),
    "packets in the wrong order": (
        (0,),
        [between(1, 2), between(0, 1)],
        2,
        "a residual to version 2 builds on state",
    ),
    "a packet between is missing": (
        (0,),
        [between(0, 1), between(2, 3)],
        3,
        "a residual to version 3 builds on state",
    ),
    "the same packet twice in a message": (
        (0,),
        [between(0, 1), between(0, 1)],
        1,
        "a residual to version 1 builds on state",
    ),
    "a packet too few": ((0,), [between(0, 1)], 2, "hold version 1 after this message; its plan starts from 2"),
    "a packet too many": ((0,), [between(0, 1), between(1, 2)], 1, "hold version 2 after this message"),
    "an old dense model": ((2,), [dense(1)], 3, "hold version 1 after this message"),
    "nothing where something is due": ((1,), [], 2, "hold version 1 after this message"),
    "after a valid dense model, a residual of another": (
        (2,),
        [dense(1), between(2, 3)],
        3,
        "to version 3 builds on",
    ),
}


@pytest.mark.parametrize(("held", "packets", "version", "words"), OUT_OF_SYNC.values(), ids=OUT_OF_SYNC)
def test_messages_that_are_out_of_sync(held: tuple[int, ...], packets: list[Array], version: int, words: str) -> None:
    assert_refused(device_end(*held), *packets, version=version, error=OutOfSync, words=words)


def test_a_dense_model_whose_hash_differs_from_its_stamp() -> None:
    lying = seal_dense(HeldModel(3, MODELS[3].hash, tensors(31)), codec=IdentityCodec(), context=NO_CONTEXT)
    words = f"the model that was received has hash .*; the server's has {MODELS[3].hash:016x}"
    assert_refused(device_end(1), lying, version=3, error=OutOfSync, words=words)


def test_a_seed_that_gives_another_model() -> None:
    other = HeldModel.of(0, tensors(-1))
    words = f"follows from the seed has hash {other.hash:016x}; the server's has {MODELS[0].hash:016x}"
    assert_refused(DeviceEnd(), seal_agreed(MODELS[0]), version=0, error=OutOfSync, words=words, seeded=other)


def sealed(arrays: Arrays, **stamp: Any) -> Array:
    return seal(arrays, codec=IdentityCodec(), context=NO_CONTEXT, stamp=Stamp(**stamp))[0]


def test_kinds_and_contents_that_cannot_start_a_plan() -> None:
    good = between(0, 1)
    torn = good.copy()
    torn[60] ^= 1
    infinite = tensors(np.inf)
    assert_refused(device_end(0), torn, version=1, error=CorruptPacket, words="checksum")
    for kind in set(PacketKind) - {PacketKind.WEIGHTS, PacketKind.RESIDUAL, PacketKind.AGREED, PacketKind.PATCH}:
        packet = sealed(tensors(1), kind=kind, version=1)
        assert_refused(
            device_end(0), packet, version=1, error=MismatchedPacket, words=f"kind {kind.name} cannot start a plan"
        )
    short = sealed({"w": tensors(1)["w"]}, kind=PacketKind.WEIGHTS, version=1)
    assert_refused(device_end(0), short, version=1, error=MismatchedPacket, words="are expected")
    long = sealed(tensors(1), kind=PacketKind.AGREED, version=0, state_hash=MODELS[0].hash)
    assert_refused(
        device_end(0), long, version=0, error=MismatchedPacket, words="a packet of .* bytes, where 64 are expected"
    )
    for kind, state in ((PacketKind.WEIGHTS, hash_arrays(infinite)), (PacketKind.RESIDUAL, MODELS[0].hash)):
        packet = sealed(infinite, kind=kind, version=1, state_hash=state)
        assert_refused(device_end(0), packet, version=1, error=UnfitPacket, words="holds NaN or infinity")


def test_a_failure_after_a_dense_packet_keeps_the_histories() -> None:
    torn = between(3, 2)
    torn[60] ^= 1
    assert_refused(
        device_end(0, sent=[SentUpdate(tensors(1), tensors(2))]),
        dense(3),
        torn,
        version=2,
        error=CorruptPacket,
        words="checksum",
    )


def update(arrays: Arrays, codec: Codec | None = None, *, prediction: Arrays, **stamp: Any) -> Array:
    fields = {"state_hash": hash_arrays(prediction)} | stamp
    stamped = Stamp(**{name: getattr(STAMP, name) for name in STAMP.__struct_fields__} | fields)
    return seal(arrays, codec=codec or IdentityCodec(), context=NO_CONTEXT, stamp=stamped)[0]


def receive_sealed(packet: Array, *, prediction: Arrays, residual: Residual = DELTA) -> tuple[Arrays, Arrays]:
    return receive_update(
        packet,
        prediction=prediction,
        residual=residual,
        codec=IdentityCodec(),
        expected=EXPECTED,
        context=NO_CONTEXT,
        stamp=Stamp(
            kind=STAMP.kind,
            version=STAMP.version,
            plan=STAMP.plan,
            attempt=STAMP.attempt,
            state_hash=hash_arrays(prediction),
        ),
    )


@pytest.mark.parametrize("residual", [DELTA, BITS], ids=["float", "bits"])
def test_an_update_yields_residuals_and_the_devices_model(residual: Residual) -> None:
    prediction, values = tensors(3), tensors(5)
    packet = update(residuals_of(values, prediction, residual), prediction=prediction)
    residuals, local = receive_sealed(packet, prediction=prediction, residual=residual)
    assert {name: array.tobytes() for name, array in local.items()} == {n: a.tobytes() for n, a in values.items()}
    assert local["s"].shape == ()
    if residual is DELTA:
        assert residuals["w"].tolist() == [[2, 2], [2, 2]]


def test_an_update_that_builds_on_another_state() -> None:
    packet = update(tensors(1), prediction=tensors(2))
    here = hash_arrays(tensors(3))
    with pytest.raises(
        OutOfSync, match=f"builds on state {hash_arrays(tensors(2)):016x}; the server predicts {here:016x}"
    ):
        receive_sealed(packet, prediction=tensors(3))


@pytest.mark.parametrize("field", ["version", "plan", "attempt", "sequence"])
def test_an_update_of_another_plan_is_mismatched_not_out_of_sync(field: str) -> None:
    packet = update(tensors(1), prediction=tensors(2), **{field: 99})
    with pytest.raises(MismatchedPacket, match=f"{field} is 99, expected"):
        receive_sealed(packet, prediction=tensors(2))


def test_an_update_of_another_kind() -> None:
    packet = update(tensors(1), prediction=tensors(2), kind=PacketKind.WEIGHTS)
    with pytest.raises(MismatchedPacket, match="kind is"):
        receive_sealed(packet, prediction=tensors(2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_residuals_that_are_not_finite(value: float) -> None:
    with pytest.raises(UnfitPacket, match="'w' holds NaN or infinity"):
        receive_sealed(update(tensors(value), prediction=tensors(2)), prediction=tensors(2))


def test_finite_residuals_that_lead_to_infinite_weights() -> None:
    large = tensors(3e38)
    with pytest.raises(UnfitPacket, match="'w' holds NaN or infinity"):
        receive_sealed(update(large, prediction=large), prediction=large)
    bits = {"w": np.full((2, 2), 0x7F800000, "<i4"), "s": np.array(0, "<i4")}  # to 0.0, the pattern of infinity
    with pytest.raises(UnfitPacket, match="'w' holds NaN or infinity"):
        receive_sealed(update(bits, prediction=tensors(0)), prediction=tensors(0), residual=BITS)


def test_feedback_carries_the_unsent_error() -> None:
    # 1/3 in half precision is 0.333251953125 (1365/4096); the rest of it is added to the next residual. 0.5 is exact.
    feedback = Residual(rule="delta", feedback=True)
    values, prediction = {"w": np.float32([1 / 3, 0.5])}, {"w": np.float32([0, 0])}
    first = update_residual(values, prediction, {}, feedback)
    assert first["w"].tolist() == values["w"].tolist()
    sent = Halve().encode(first, context=Context())[1]
    error = unsent_error(first, sent, {}, feedback)
    assert error["w"].tolist() == [float(np.float32(1 / 3)) - 1365 / 4096, 0]
    second = update_residual(values, prediction, error, feedback)
    assert second["w"].tolist() == (values["w"] + error["w"]).tolist()


def test_errors_of_absent_tensors_are_kept_and_those_of_another_width_dropped() -> None:
    feedback = Residual(rule="delta", feedback=True)
    error = {"w": np.float32([1]), "gone": np.float32([2]), "wide": np.float32([[3]]), "half": np.float16([4])}
    zeros = {"w": np.float32([0]), "new": np.float32([0]), "wide": np.zeros((1, 2), "<f4"), "half": np.float32([0])}
    values = {name: array + np.float32(7) for name, array in zeros.items()}
    residuals = update_residual(values, zeros, error, feedback)
    assert {name: array.tolist() for name, array in residuals.items()} == {
        "w": [8],
        "new": [7],
        "wide": [[7, 7]],
        "half": [7],
    }
    left = unsent_error(residuals, zeros, error, feedback)
    assert {name: array.tolist() for name, array in left.items()} == {
        "w": [8],
        "gone": [2],
        "wide": [[7, 7]],
        "half": [7],
        "new": [7],
    }


def test_without_feedback_nothing_is_carried() -> None:
    values, prediction = {"w": np.float32([3])}, {"w": np.float32([1])}
    assert unsent_error(values, prediction, {"w": np.float32([9])}, DELTA) == {}
    assert update_residual(values, prediction, {"w": np.float32([9])}, DELTA)["w"].tolist() == [2]


def test_contexts_and_history_entries_by_hand() -> None:
    context = context_for(
        (ArraySpec("w", (1,), "<f4", role="weight"), ArraySpec("v", (1,), "<f4", role="vector")), seed=4
    )
    assert (context.seed, context.roles) == (4, {"w": "weight", "v": "vector"})
    sent = sent_update({"a": np.float32([1]), "b": np.float32([2])}, {"b": np.float32([3])}, ["b"])
    assert (list(sent.base), list(sent.local)) == (["b"], ["b"])
