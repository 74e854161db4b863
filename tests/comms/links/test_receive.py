"""Receiving ends: what they accept, each way in which they refuse, and that a refusal leaves no trace."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, Array, Arrays, ArraySpec, Codec, Context, IdentityCodec, specs_of
from fedbonsai.comms.errors import CorruptPacket, MismatchedPacket, OutOfSync, PacketError, UnfitPacket
from fedbonsai.comms.links.broadcast import seal_agreed, seal_dense, seal_model
from fedbonsai.comms.links.link import DeviceEnd, Memory, Model, Pending, Sent
from fedbonsai.comms.links.predict import Residual, difference, hash_arrays
from fedbonsai.comms.links.receive import (
    context_for,
    left_over,
    receive_models,
    receive_update,
    sent_model,
    update_residual,
)
from fedbonsai.comms.packet import PacketKind, Stamp, seal

from ..fakes import Halve

STATIONARY, HALF_STEP = Residual(rule="stationary"), Residual(rule="half_step")
DELTA, BITS = Residual(rule="delta"), Residual(rule="delta", arithmetic="bits")
STAMP = Stamp(kind=PacketKind.UPDATE, version=3, plan=17, attempt=1)


def tensors(value: float) -> dict[str, Array]:
    return {"w": np.full((2, 2), value, "<f4"), "s": np.array(-value, "<f4")}


MODELS = [Model.of(version, tensors(10 * version)) for version in range(4)]
EXPECTED = specs_of(tensors(0))


def way(start: int, end: int, *, residual: Residual = STATIONARY, sent: Sequence[Sent] = ()) -> Array:
    """The residual packet between two of the models."""
    memory = Memory(models=[MODELS[start]], sent=list(sent))
    packet, _ = seal_model(
        MODELS[end].arrays, end, memory=memory, residual=residual, codec=IdentityCodec(), context=NO_CONTEXT
    )
    return packet


def dense(version: int) -> Array:
    return seal_dense(MODELS[version], codec=IdentityCodec(), context=NO_CONTEXT)


def an_end(*versions: int, sent: Sequence[Sent] = ()) -> DeviceEnd:
    """An end with all that it can remember."""
    return DeviceEnd(
        memory=Memory(models=[MODELS[v] for v in versions], sent=list(sent)),
        error=tensors(0.5),
        pending=Pending(3, Sent(tensors(1), tensors(2)), tensors(4)),
    )


def receive(
    end: DeviceEnd,
    *packets: Array,
    version: int,
    residual: Residual = STATIONARY,
    expected: tuple[ArraySpec, ...] = EXPECTED,
    seeded: Model = MODELS[0],
) -> Model:
    return receive_models(
        end,
        packets,
        version=version,
        residual=residual,
        codec=IdentityCodec(),
        expected=expected,
        agreed=lambda: seeded.arrays,
    )


def refused(end: DeviceEnd, *packets: Array, version: int, error: type[PacketError], words: str, **more: Any) -> None:
    """The end is what it was, to the bit and to the object."""
    before = end.to_state()
    lists = end.memory, end.memory.models, end.memory.sent
    with pytest.raises(error, match=words):
        receive(end, *packets, version=version, **more)
    after = end.to_state()
    assert list(after) == list(before)
    assert all(after[name].tobytes() == array.tobytes() for name, array in before.items())
    assert all(a is b for a, b in zip((end.memory, end.memory.models, end.memory.sent), lists, strict=True))


def versions(end: DeviceEnd) -> list[int]:
    return [model.version for model in end.memory.models]


def test_a_residual_leads_to_the_next_model() -> None:
    end = an_end(1)
    model = receive(end, way(1, 2), version=2)
    assert (model.version, model.hash) == (2, MODELS[2].hash)
    assert model.arrays["w"].tolist() == [[20, 20], [20, 20]]
    assert versions(end) == [2]
    assert end.pending is not None


def test_who_missed_rounds_reads_several_packets() -> None:
    end = an_end(0)
    assert receive(end, way(0, 1), way(1, 3), version=3).hash == MODELS[3].hash
    assert versions(end) == [3]


def test_of_the_models_on_the_way_as_many_are_kept_as_the_rule_looks_back_on() -> None:
    # Each residual is against what two models, and nothing that was sent, predict: the newest.
    end = an_end(0)
    receive(end, way(0, 1), way(1, 2), way(2, 3), version=3, residual=Residual(rule="second_order"))
    assert versions(end) == [2, 3]


def test_no_packet_where_the_version_is_already_there() -> None:
    end = an_end(1, 2)
    assert receive(end, version=2) is MODELS[2]
    assert versions(end) == [1, 2]


def test_a_memory_that_was_damaged_is_noticed_where_no_packet_tells() -> None:
    damaged = DeviceEnd(memory=Memory(models=[Model(2, MODELS[2].hash, tensors(21))]))
    words = f"the model that is remembered has hash .*; it was {MODELS[2].hash:016x}"
    refused(damaged, version=2, error=OutOfSync, words=words)


# What is held is another part's: a tensor is missing, is narrower, or is not in this part.
@pytest.mark.parametrize("packets", [[], [way(1, 2)]], ids=["no packet", "residual"])
@pytest.mark.parametrize(
    "held", [{"w": tensors(10)["w"]}, tensors(10) | {"w": np.full((2, 1), 10, "<f4")}], ids=["missing", "narrower"]
)
def test_a_model_of_another_part_is_out_of_sync(held: dict[str, Array], packets: list[Array]) -> None:
    version = 2 if packets else 1
    end = DeviceEnd(memory=Memory(models=[Model.of(1, held)]))
    refused(end, *packets, version=version, error=OutOfSync, words="the device holds")


def test_a_model_of_a_larger_part_is_out_of_sync_where_no_packet_comes() -> None:
    end = DeviceEnd(memory=Memory(models=[Model.of(1, tensors(10) | {"x": np.zeros(1, "<f4")})]))
    refused(end, version=1, error=OutOfSync, words="the device holds 3 tensors; the plan's part has 2")


def test_a_finite_residual_to_a_model_that_is_not() -> None:
    large = Model.of(1, tensors(3e38))
    packet = sealed(tensors(3e38), kind=PacketKind.RESIDUAL, version=2, state_hash=large.hash)
    end = DeviceEnd(memory=Memory(models=[large]))
    refused(end, packet, version=2, error=UnfitPacket, words="'w' holds NaN or infinity")


def test_a_dense_model_begins_the_histories_anew_and_keeps_the_error() -> None:
    end = an_end(0, 1, sent=[Sent(tensors(1), tensors(2))])
    model = receive(end, dense(3), version=3)
    assert model.hash == MODELS[3].hash
    assert versions(end) == [3]
    assert not end.memory.sent
    assert end.error["s"] == -0.5
    assert end.pending is not None


def test_a_device_without_a_model_starts_from_the_seed() -> None:
    end = DeviceEnd()
    assert receive(end, seal_agreed(MODELS[0]), way(0, 1), version=1).hash == MODELS[1].hash
    assert versions(end) == [1]


def test_the_agreed_model_is_cut_to_what_is_expected() -> None:
    part = {"s": MODELS[0].arrays["s"]}
    model = receive(DeviceEnd(), seal_agreed(Model.of(0, part)), version=0, expected=specs_of(part))
    assert list(model.arrays) == ["s"]


def test_own_predictions_look_at_what_was_sent_up() -> None:
    # Own 10, other 3 and 8: half_step predicts 12.5.
    sent = [Sent(tensors(9), tensors(3)), Sent(tensors(10), tensors(8))]
    end = an_end(1, sent=sent)
    packet = way(1, 2, residual=HALF_STEP, sent=sent)
    assert receive(end, packet, version=2, residual=HALF_STEP).arrays["w"].tolist() == [[20, 20], [20, 20]]
    refused(an_end(1), packet, version=2, error=OutOfSync, words="the device predicts")


OUT_OF_SYNC = {
    "a residual to a device without a model": ((), [way(0, 1)], 1, "came to a device that holds no model"),
    "nothing to a device without a model": ((), [], 1, "hold version none after this message; its plan starts from 1"),
    "a residual of another start": ((0,), [way(1, 2)], 2, "builds on state .* the device predicts"),
    "the same residual again": ((0, 1), [way(0, 1)], 1, "a residual to version 1 builds on state"),
    "packets in the wrong order": ((0,), [way(1, 2), way(0, 1)], 2, "a residual to version 2 builds on state"),
    "a packet between is missing": ((0,), [way(0, 1), way(2, 3)], 3, "a residual to version 3 builds on state"),
    "the same packet twice in a message": ((0,), [way(0, 1), way(0, 1)], 1, "a residual to version 1 builds on state"),
    "a packet too few": ((0,), [way(0, 1)], 2, "hold version 1 after this message; its plan starts from 2"),
    "a packet too many": ((0,), [way(0, 1), way(1, 2)], 1, "hold version 2 after this message"),
    "an old dense model": ((2,), [dense(1)], 3, "hold version 1 after this message"),
    "nothing where something is due": ((1,), [], 2, "hold version 1 after this message"),
    "after a sound dense model, a residual of another": ((2,), [dense(1), way(2, 3)], 3, "to version 3 builds on"),
}


@pytest.mark.parametrize(("held", "packets", "version", "words"), OUT_OF_SYNC.values(), ids=OUT_OF_SYNC)
def test_out_of_sync_and_no_trace_of_it(held: tuple[int, ...], packets: list[Array], version: int, words: str) -> None:
    refused(an_end(*held), *packets, version=version, error=OutOfSync, words=words)


def test_a_dense_model_that_is_not_what_its_stamp_says() -> None:
    lying = seal_dense(Model(3, MODELS[3].hash, tensors(31)), codec=IdentityCodec(), context=NO_CONTEXT)
    words = f"the model that came has hash .*; the server's has {MODELS[3].hash:016x}"
    refused(an_end(1), lying, version=3, error=OutOfSync, words=words)


def test_a_seed_that_gives_another_model() -> None:
    other = Model.of(0, tensors(-1))
    words = f"follows from the seed has hash {other.hash:016x}; the server's has {MODELS[0].hash:016x}"
    refused(DeviceEnd(), seal_agreed(MODELS[0]), version=0, error=OutOfSync, words=words, seeded=other)


def sealed(arrays: Arrays, **stamp: Any) -> Array:
    return seal(arrays, codec=IdentityCodec(), context=NO_CONTEXT, stamp=Stamp(**stamp))[0]


def test_kinds_and_contents_that_cannot_start_a_plan() -> None:
    good = way(0, 1)
    torn = good.copy()
    torn[60] ^= 1
    infinite = tensors(np.inf)
    refused(an_end(0), torn, version=1, error=CorruptPacket, words="checksum")
    for kind in set(PacketKind) - {PacketKind.WEIGHTS, PacketKind.RESIDUAL, PacketKind.AGREED}:
        packet = sealed(tensors(1), kind=kind, version=1)
        refused(an_end(0), packet, version=1, error=MismatchedPacket, words=f"kind {kind.name} cannot start a plan")
    short = sealed({"w": tensors(1)["w"]}, kind=PacketKind.WEIGHTS, version=1)
    refused(an_end(0), short, version=1, error=MismatchedPacket, words="are expected")
    long = sealed(tensors(1), kind=PacketKind.AGREED, version=0, state_hash=MODELS[0].hash)
    refused(an_end(0), long, version=0, error=MismatchedPacket, words="a packet of .* bytes, where 64 are expected")
    for kind, state in ((PacketKind.WEIGHTS, hash_arrays(infinite)), (PacketKind.RESIDUAL, MODELS[0].hash)):
        packet = sealed(infinite, kind=kind, version=1, state_hash=state)
        refused(an_end(0), packet, version=1, error=UnfitPacket, words="holds NaN or infinity")


def test_a_failure_after_a_dense_packet_keeps_the_histories() -> None:
    torn = way(3, 2)
    torn[60] ^= 1
    refused(
        an_end(0, sent=[Sent(tensors(1), tensors(2))]), dense(3), torn, version=2, error=CorruptPacket, words="checksum"
    )


def update(arrays: Arrays, codec: Codec | None = None, *, prediction: Arrays, **stamp: Any) -> Array:
    fields = {"state_hash": hash_arrays(prediction)} | stamp
    stamped = Stamp(**{name: getattr(STAMP, name) for name in STAMP.__struct_fields__} | fields)
    return seal(arrays, codec=codec or IdentityCodec(), context=NO_CONTEXT, stamp=stamped)[0]


def receive_it(packet: Array, *, prediction: Arrays, residual: Residual = DELTA) -> tuple[Arrays, Arrays]:
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
def test_an_update_is_residuals_and_the_model_that_they_make(residual: Residual) -> None:
    prediction, values = tensors(3), tensors(5)
    packet = update(difference(values, prediction, residual), prediction=prediction)
    residuals, local = receive_it(packet, prediction=prediction, residual=residual)
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
        receive_it(packet, prediction=tensors(3))


@pytest.mark.parametrize("field", ["version", "plan", "attempt", "sequence"])
def test_an_update_of_another_plan_is_mismatched_not_out_of_sync(field: str) -> None:
    packet = update(tensors(1), prediction=tensors(2), **{field: 99})
    with pytest.raises(MismatchedPacket, match=f"{field} is 99, expected"):
        receive_it(packet, prediction=tensors(2))


def test_an_update_of_another_kind() -> None:
    packet = update(tensors(1), prediction=tensors(2), kind=PacketKind.WEIGHTS)
    with pytest.raises(MismatchedPacket, match="kind is"):
        receive_it(packet, prediction=tensors(2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_residuals_that_are_not_finite(value: float) -> None:
    with pytest.raises(UnfitPacket, match="'w' holds NaN or infinity"):
        receive_it(update(tensors(value), prediction=tensors(2)), prediction=tensors(2))


def test_finite_residuals_of_a_model_that_is_not() -> None:
    large = tensors(3e38)
    with pytest.raises(UnfitPacket, match="'w' holds NaN or infinity"):
        receive_it(update(large, prediction=large), prediction=large)
    bits = {"w": np.full((2, 2), 0x7F800000, "<i4"), "s": np.array(0, "<i4")}  # to 0.0, the pattern of infinity
    with pytest.raises(UnfitPacket, match="'w' holds NaN or infinity"):
        receive_it(update(bits, prediction=tensors(0)), prediction=tensors(0), residual=BITS)


def test_feedback_carries_what_was_not_sent() -> None:
    # 1/3 in half precision is 0.333251953125 (1365/4096); what is left of it, and of 0.5, goes with the next one.
    feedback = Residual(rule="delta", feedback=True)
    values, prediction = {"w": np.float32([1 / 3, 0.5])}, {"w": np.float32([0, 0])}
    first = update_residual(values, prediction, {}, feedback)
    assert first["w"].tolist() == values["w"].tolist()
    sent = Halve().encode(first, context=Context())[1]
    error = left_over(first, sent, {}, feedback)
    assert error["w"].tolist() == [float(np.float32(1 / 3)) - 1365 / 4096, 0]
    second = update_residual(values, prediction, error, feedback)
    assert second["w"].tolist() == (values["w"] + error["w"]).tolist()


def test_errors_of_other_tensors_wait_and_those_of_another_width_are_left_out() -> None:
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
    left = left_over(residuals, zeros, error, feedback)
    assert {name: array.tolist() for name, array in left.items()} == {
        "w": [8],
        "gone": [2],
        "wide": [[7, 7]],
        "half": [7],
        "new": [7],
    }


def test_without_feedback_nothing_is_carried() -> None:
    values, prediction = {"w": np.float32([3])}, {"w": np.float32([1])}
    assert left_over(values, prediction, {"w": np.float32([9])}, DELTA) == {}
    assert update_residual(values, prediction, {"w": np.float32([9])}, DELTA)["w"].tolist() == [2]


def test_what_both_ends_derive() -> None:
    context = context_for(
        (ArraySpec("w", (1,), "<f4", role="weight"), ArraySpec("v", (1,), "<f4", role="vector")), seed=4
    )
    assert (context.seed, context.roles) == (4, {"w": "weight", "v": "vector"})
    sent = sent_model({"a": np.float32([1]), "b": np.float32([2])}, {"b": np.float32([3])}, ["b"])
    assert (list(sent.base), list(sent.local)) == (["b"], ["b"])
