"""Patches: what is sent when a device's channels change, and that both ends come to the same memory by it."""

from itertools import pairwise

import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, Array, Arrays, IdentityCodec, specs_of
from fedbonsai.comms.codecs.make_codec import make_codec
from fedbonsai.comms.errors import CorruptPacket, OutOfSync, PacketError, UnfitPacket
from fedbonsai.comms.links.broadcast import Broadcast, seal_dense, seal_model
from fedbonsai.comms.links.memory import WHOLE, DeviceEnd, HeldModel, LinkMemory, Move, SentUpdate
from fedbonsai.comms.links.patch import apply_patch, seal_patch
from fedbonsai.comms.links.predict import Residual
from fedbonsai.comms.links.receive import receive_models
from fedbonsai.comms.links.state import from_state, to_state
from fedbonsai.comms.packet import PacketKind, Stamp, read_stamp, seal, unseal
from hypothesis import given
from hypothesis import strategies as st

from ..fakes import Halve

STATIONARY, HALF_STEP = Residual(rule="stationary"), Residual(rule="half_step")


def moving(old: bytes, new: bytes) -> Move:
    """Places are the indices of ``w`` that are held; ``b`` is whole everywhere."""

    def move(name: str, array: Array) -> Array:
        if name == "b":
            return array
        moved = np.zeros(len(new), array.dtype)
        for position, index in enumerate(new):
            if index in old:
                moved[position] = array[old.index(index)]
        return moved

    return move


def at(place: bytes, full: list[float], b: float = 9) -> Arrays:
    return {"w": np.float32([full[index] for index in place]), "b": np.array(b, "<f4")}


OLD, NEW = bytes([0, 1]), bytes([1, 3])
SERVER = [10, 11, 12, 13]  # its newest values of w
HELD = HeldModel.of(4, at(OLD, [1, 2, 3, 4]))


def sealed(memory: LinkMemory | None = None, new: bytes = NEW) -> tuple[Array, LinkMemory]:
    return seal_patch(memory or LinkMemory(models=[HELD]), moving(OLD, new), at(new, SERVER))


def receive(end: DeviceEnd, *packets: Array, version: int = 4, place: bytes = NEW, b: float = 9) -> HeldModel:
    """A plan at ``place``."""
    return receive_models(
        end,
        packets,
        version=version,
        residual=STATIONARY,
        codec=IdentityCodec(),
        expected=specs_of(at(place, SERVER, b)),
        agreed=dict,
        place=place,
        move=moving(end.place, place) if end.place != place else None,
    )


def device_end(place: bytes = OLD) -> DeviceEnd:
    return DeviceEnd(
        memory=LinkMemory(models=[HELD], sent=[SentUpdate(at(OLD, [1, 2, 0, 0]), at(OLD, [3, 4, 0, 0]))]),
        error=at(OLD, [5, 6, 0, 0], 7),
        place=place,
    )


def test_a_patch_holds_exactly_what_is_new() -> None:
    packet, moved = sealed()
    assert packet.nbytes == 48 + 8 + 4 + 8  # header and one float: element 1 is held, element 3 is new
    assert packet[56:60].view("<f4").tolist() == [13]
    assert moved.models[0].arrays["w"].tolist() == [2, 13]
    assert moved.models[0].arrays["b"] is HELD.arrays["b"]
    assert read_stamp(packet) == Stamp(kind=PacketKind.PATCH, version=4, state_hash=moved.models[0].hash)
    assert HELD.arrays["w"].tolist() == [1, 2]  # the memory itself is not changed


def test_channels_that_are_all_held_need_a_patch_without_values() -> None:
    packet, moved = sealed(new=bytes([1]))
    assert packet.nbytes == 64
    assert moved.models[0].arrays["w"].tolist() == [2]


def test_values_are_in_the_order_of_tensors_and_elements() -> None:
    """Of a matrix [2, 2] with the first element held, as of two tensors."""
    full = {"m": np.float32([[1, 2], [3, 4]]), "v": np.float32([5, 6])}

    def move(name: str, array: Array) -> Array:
        moved = np.zeros(full[name].shape, array.dtype)
        moved[(0,) * array.ndim] = array[(0,) * array.ndim]
        return moved

    held = {"m": np.float32([[7]]), "v": np.float32([8])}
    packet, moved = seal_patch(LinkMemory(models=[HeldModel.of(0, held)]), move, full)
    assert packet[56:72].view("<f4").tolist() == [2, 3, 4, 6]
    assert moved.models[0].arrays["m"].tolist() == [[7, 2], [3, 4]]


def test_a_device_moves_all_that_it_remembers() -> None:
    end, (packet, moved) = device_end(), sealed()
    model = receive(end, packet)
    assert model.hash == moved.models[0].hash
    assert end.place == NEW
    assert end.error["w"].tolist() == [6, 0]
    assert end.error["b"] == 7
    assert end.memory.sent[0].base["w"].tolist() == [2, 0]
    assert end.memory.sent[0].local["w"].tolist() == [4, 0]
    assert from_state(to_state(end)).place == NEW


def test_residuals_before_a_patch_are_of_the_old_channels_and_those_behind_it_of_the_new_ones() -> None:
    broadcast = Broadcast(HELD, put=lambda packet: packet, place=OLD)
    before = broadcast.advance(at(OLD, [4, 5, 0, 0]), 5, residual=STATIONARY, codec=Halve(), context=NO_CONTEXT)
    grown = broadcast.grow("old", NEW, moving(OLD, NEW), at(NEW, SERVER))
    assert grown.origin is not None
    assert (grown.origin.key, grown.place, grown.held.version) == ("old", NEW, 5)
    after = grown.advance(at(NEW, [0, 7, 0, 8], 9), 6, residual=STATIONARY, codec=Halve(), context=NO_CONTEXT)
    packets = [before.reference, grown.origin.patch.reference, after.reference]
    end = device_end()
    model = receive_models(
        end,
        packets,
        version=6,
        residual=STATIONARY,
        codec=Halve(),
        expected=specs_of(at(NEW, SERVER)),
        agreed=dict,
        place=NEW,
        move=moving(OLD, NEW),
    )
    assert model.hash == grown.held.hash
    assert model.arrays["w"].tolist() == [7, 8]


def test_a_rule_with_a_history_predicts_from_the_moved_one() -> None:
    """half_step: own 2 and, of the device, 4 minus an earlier 0, a half of which is added; of what is new, the patch alone."""
    zeros = SentUpdate(at(OLD, [0] * 4), at(OLD, [0] * 4))
    server = LinkMemory(models=[HELD], sent=[zeros, *device_end().memory.sent])
    patch, moved = seal_patch(server, moving(OLD, NEW), at(NEW, SERVER))
    packet, sent = seal_model(
        at(NEW, SERVER), 5, memory=moved, residual=HALF_STEP, codec=IdentityCodec(), context=NO_CONTEXT
    )
    assert packet[56:64].view("<f4").tolist() == [11 - (2 + 2), 0]
    end = DeviceEnd(memory=server, place=OLD)
    model = receive_models(
        end,
        [patch, packet],
        version=5,
        residual=HALF_STEP,
        codec=IdentityCodec(),
        expected=specs_of(at(NEW, SERVER)),
        agreed=dict,
        place=NEW,
        move=moving(OLD, NEW),
    )
    assert model.hash == sent.hash


def test_a_dense_model_at_other_channels_keeps_the_moved_error() -> None:
    end, model = device_end(), HeldModel.of(8, at(NEW, SERVER))
    receive(end, seal_dense(model, codec=IdentityCodec(), context=NO_CONTEXT), version=8)
    assert (end.place, len(end.memory.models), end.memory.sent) == (NEW, 1, [])
    assert end.error["w"].tolist() == [6, 0]


def test_another_family_has_nothing_in_common() -> None:
    end, model = device_end(), HeldModel.of(8, at(NEW, SERVER))
    receive_models(
        end,
        [seal_dense(model, codec=IdentityCodec(), context=NO_CONTEXT)],
        version=8,
        residual=STATIONARY,
        codec=IdentityCodec(),
        expected=specs_of(model.arrays),
        agreed=dict,
        place=b"other",
        move=None,
    )
    assert (end.place, end.error, end.memory.models[0].hash, end.memory.sent) == (b"other", {}, model.hash, [])
    assert LinkMemory(models=[HELD], sent=device_end().memory.sent).moved(None) == LinkMemory()


def damaged(packet: Array) -> Array:
    torn = packet.copy()
    torn[57] ^= 1
    return torn


def packed(values: Arrays, state_hash: int = 0, version: int = 4) -> Array:
    stamp = Stamp(kind=PacketKind.PATCH, version=version, state_hash=state_hash)
    return seal(values, codec=IdentityCodec(), context=NO_CONTEXT, stamp=stamp)[0]


@pytest.mark.parametrize(
    ("end", "packets", "error", "words"),
    [
        (device_end(), [damaged(sealed()[0])], CorruptPacket, "checksum"),
        (device_end(), [], OutOfSync, "neither a patch nor a dense model"),
        (
            DeviceEnd(place=OLD),
            [sealed()[0]],
            OutOfSync,
            "a patch of version 4 was sent to a device that holds no model",
        ),
        # The device has moved already, which the server does not know.
        (DeviceEnd(memory=sealed()[1], place=NEW), [sealed()[0]], OutOfSync, "or none that it could move"),
        # It was elsewhere: another number of new elements, and an equal one.
        (device_end(bytes([0, 2])), [sealed()[0]], OutOfSync, "does not fit the channels"),
        (device_end(bytes([1, 2])), [sealed()[0]], OutOfSync, "leads to a model with hash"),
        (device_end(), [packed({"w": np.float32([13])}, version=3)], OutOfSync, "of version 3 .* holds version 4"),
        (device_end(), [packed({"w": np.float32([14])}, sealed()[1].models[0].hash)], OutOfSync, "leads to a model"),
        (device_end(), [packed({"w": np.float32([np.nan])})], UnfitPacket, "NaN"),
        (device_end(), [packed({"w": np.float32([1, 2])})], OutOfSync, "does not fit the channels"),
    ],
)
def test_a_refused_patch_leaves_the_end_as_it_was(
    end: DeviceEnd, packets: list[Array], error: type[PacketError], words: str
) -> None:
    before = {name: array.tobytes() for name, array in to_state(end).items()}
    with pytest.raises(error, match=words):
        receive(end, *packets)
    assert {name: array.tobytes() for name, array in to_state(end).items()} == before


def test_an_end_starts_at_the_whole_model() -> None:
    assert DeviceEnd().place == WHOLE
    assert from_state(to_state(DeviceEnd())).place == WHOLE


PLACES = st.sets(st.integers(0, 3), min_size=1).map(lambda held: bytes(sorted(held)))


@given(st.lists(PLACES, min_size=2, max_size=6), st.integers(0, 2**32 - 1))
def test_after_any_moves_both_ends_hold_the_same_and_what_is_common_keeps_its_bits(
    places: list[bytes], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    server = LinkMemory(models=[HeldModel.of(0, at(places[0], rng.standard_normal(4).tolist()))])
    device = LinkMemory(models=list(server.models))
    for old, new in pairwise(places):
        model = at(new, rng.standard_normal(4).tolist())
        before = dict(zip(old, server.models[0].arrays["w"].tolist(), strict=True))
        packet, server = seal_patch(server, moving(old, new), model)
        device = apply_patch(packet, read_stamp(packet), device, moving(old, new))
        after = dict(zip(new, device.models[0].arrays["w"].tolist(), strict=True))
        assert device.models[0].hash == server.models[0].hash
        fresh = dict(zip(new, model["w"].tolist(), strict=True))
        assert after == {index: before.get(index, fresh[index]) for index in new}
        values = unseal(
            packet,
            codec=make_codec(()),
            expected=specs_of({"w": np.zeros(len(set(new) - set(old)), "<f4")}) if set(new) - set(old) else (),
            context=NO_CONTEXT,
        )
        assert sum(array.size for array in values.values()) == len(set(new) - set(old))
