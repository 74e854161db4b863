"""Broadcast residuals: the ring of packets, its limit, and the model that receivers hold."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, Array, Codec, IdentityCodec, specs_of
from fedbonsai.comms.codecs.sparsify import TopK
from fedbonsai.comms.errors import MismatchedPacket
from fedbonsai.comms.links.broadcast import Broadcast, seal_agreed, seal_dense, seal_model
from fedbonsai.comms.links.memory import HeldModel, LinkMemory, SentUpdate
from fedbonsai.comms.links.predict import Residual, hash_arrays
from fedbonsai.comms.packet import PacketKind, Stamp, read_stamp, unseal

from ..fakes import Drop, Halve

STATIONARY = Residual(rule="stationary", feedback=True)
ITEMS = 100  # 400 bytes; a packet of all is 48 + 8 + 400 + 8
PACKET_BYTES = 464


@dataclass
class Store:
    """A channel that keeps all packets."""

    packets: list[Array] = field(default_factory=list)

    def put(self, packet: Array) -> int:
        self.packets.append(packet)
        return len(self.packets) - 1


def model(value: float, items: int = ITEMS) -> dict[str, Array]:
    return {"w": np.full(items, value, "<f4")}


def started(store: Store, items: int = ITEMS) -> Broadcast:
    return Broadcast(HeldModel.of(0, model(0, items)), put=store.put)


def advance(broadcast: Broadcast, version: int, codec: Codec | None = None, items: int = ITEMS) -> int:
    sealed = broadcast.advance(
        model(version, items), version, residual=STATIONARY, codec=codec or Drop(), context=NO_CONTEXT
    )
    return sealed.num_bytes


def versions_since(broadcast: Broadcast, version: int) -> list[tuple[int, int]] | None:
    found = broadcast.since(version)
    return None if found is None else [(sealed.start, sealed.end) for sealed in found]


SPARSE = TopK(0.01, scope="global", roles=("vector",))


def test_packets_lead_from_version_to_version() -> None:
    broadcast = started(Store(), 1000)  # 4,000 bytes, of which one packet takes some 8,100: one is always kept
    assert versions_since(broadcast, 0) == []
    assert versions_since(broadcast, 1) is None
    advance(broadcast, 1, items=1000)
    assert versions_since(broadcast, 0) == [(0, 1)]
    assert versions_since(broadcast, 1) == []
    assert versions_since(broadcast, 2) is None


def test_a_sequence_may_skip_versions() -> None:
    """A version that no device of this sequence was sent has no packet."""
    store = Store()
    broadcast = Broadcast(HeldModel.of(0, {"w": np.zeros(100, "<f4")}), put=store.put)
    for version in (1, 4):
        values = np.zeros(100, "<f4")
        values[version] = 1  # each packet: position and value, or two of them: far below 400 bytes
        broadcast.advance({"w": values}, version, residual=STATIONARY, codec=Drop(), context=NO_CONTEXT)
    assert versions_since(broadcast, 0) == [(0, 1), (1, 4)]
    assert versions_since(broadcast, 1) == [(1, 4)]
    assert versions_since(broadcast, 4) == []
    # A device may go on to another sequence, which grew out of this one at an earlier version.
    assert [sealed.end for sealed in broadcast.since(0, until=1) or []] == [1]
    assert broadcast.since(1, until=1) == []
    assert broadcast.since(4, until=1) is None
    assert broadcast.since(0, until=3) is None
    for between in (2, 3, 5):  # no packet of this sequence leads to such a version
        assert versions_since(broadcast, between) is None


def test_the_ring_is_limited_to_one_dense_model_but_keeps_the_newest_packet() -> None:
    store = Store()
    broadcast = started(store)
    assert advance(broadcast, 1, IdentityCodec()) == PACKET_BYTES
    assert versions_since(broadcast, 0) == [(0, 1)]  # larger than 400 bytes by itself, and kept
    advance(broadcast, 2, IdentityCodec())
    assert versions_since(broadcast, 0) is None
    assert versions_since(broadcast, 1) == [(1, 2)]


def test_the_ring_keeps_packets_up_to_the_size_of_one_dense_model() -> None:
    # 400 items: 1,600 bytes. One entry differs from version to version: 48 + 8 + (4 + 4) + 8 = 72 bytes a packet; 22 fit.
    broadcast = started(Store(), 400)
    sizes = []
    for version in range(1, 31):
        values = np.zeros(400, "<f4")
        values[:version] = 1
        sealed = broadcast.advance({"w": values}, version, residual=STATIONARY, codec=Drop(), context=NO_CONTEXT)
        sizes.append(sealed.num_bytes)
    assert set(sizes) == {72}
    assert [versions_since(broadcast, version) is None for version in (7, 8)] == [True, False]
    found = broadcast.since(8)
    assert found is not None
    assert [sealed.start for sealed in found] == list(range(8, 30))


def test_entries_left_out_are_part_of_the_next_residual() -> None:
    # One entry of 3, 2, 1 is sent in each version: 3 first, then 2, then 1, then none.
    broadcast = Broadcast(HeldModel.of(0, {"w": np.zeros(3, "<f4")}), put=Store().put)
    held = []
    for version in range(1, 5):
        broadcast.advance({"w": np.float32([1, 2, 3])}, version, residual=STATIONARY, codec=SPARSE, context=NO_CONTEXT)
        held.append(broadcast.held.arrays["w"].tolist())
    assert held == [[0, 0, 3], [0, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert broadcast.held.version == 4


def test_receivers_hold_the_reconstruction() -> None:
    store = Store()
    broadcast = Broadcast(HeldModel.of(0, {"w": np.zeros(2, "<f4")}), put=store.put)
    start = broadcast.held
    sealed = broadcast.advance({"w": np.float32([1 / 3, 1])}, 5, residual=STATIONARY, codec=Halve(), context=NO_CONTEXT)
    assert broadcast.held.arrays["w"].tolist() == [float(np.float16(1 / 3)), 1]
    assert broadcast.held.hash == hash_arrays(broadcast.held.arrays)
    assert (sealed.start, sealed.end, sealed.num_bytes) == (0, 5, store.packets[sealed.reference].nbytes)
    assert read_stamp(store.packets[sealed.reference]) == Stamp(
        kind=PacketKind.RESIDUAL, version=5, state_hash=start.hash
    )
    assert start.arrays["w"].tolist() == [0, 0]


def test_a_dense_model_is_sealed_once_per_version() -> None:
    store = Store()
    broadcast = started(store)
    advance(broadcast, 1)
    dense = [broadcast.dense(codec=IdentityCodec(), context=NO_CONTEXT) for _ in range(3)]
    assert len(store.packets) == 2
    assert len({sealed.reference for sealed in dense}) == 1
    assert (dense[0].start, dense[0].end, dense[0].num_bytes) == (1, 1, PACKET_BYTES)
    packet = store.packets[dense[0].reference]
    assert read_stamp(packet) == Stamp(kind=PacketKind.WEIGHTS, version=1, state_hash=broadcast.held.hash)
    advance(broadcast, 2)
    assert broadcast.dense(codec=IdentityCodec(), context=NO_CONTEXT).reference != dense[0].reference
    assert len(store.packets) == 4


def test_a_residual_packet_of_one_device_is_against_its_own_prediction() -> None:
    # own 10, other 3 and 8: half_step predicts 10 + 5/2 = 12.5, so the residual of 14 is 1.5.
    memory = LinkMemory(
        models=[HeldModel.of(1, {"w": np.float32([10])})],
        sent=[
            SentUpdate({"w": np.float32([9])}, {"w": np.float32([3])}),
            SentUpdate({"w": np.float32([10])}, {"w": np.float32([8])}),
        ],
    )
    packet, held = seal_model(
        {"w": np.float32([14])},
        2,
        memory=memory,
        residual=Residual(rule="half_step"),
        codec=IdentityCodec(),
        context=NO_CONTEXT,
    )
    assert packet[56:60].view("<f4").tolist() == [1.5]
    assert (held.version, held.arrays["w"].tolist()) == (2, [14])
    assert read_stamp(packet).state_hash == hash_arrays({"w": np.float32([12.5])})


def test_packets_of_dense_and_agreed_models() -> None:
    whole = HeldModel.of(7, model(2, 3))
    dense, agreed = seal_dense(whole, codec=IdentityCodec(), context=NO_CONTEXT), seal_agreed(whole)
    assert read_stamp(dense) == Stamp(kind=PacketKind.WEIGHTS, version=7, state_hash=whole.hash)
    assert read_stamp(agreed) == Stamp(kind=PacketKind.AGREED, version=7, state_hash=whole.hash)
    assert agreed.nbytes == 64
    assert unseal(agreed, codec=IdentityCodec(), expected=(), context=NO_CONTEXT) == {}
    with pytest.raises(MismatchedPacket):
        unseal(agreed, codec=IdentityCodec(), expected=specs_of(whole.arrays), context=NO_CONTEXT)
