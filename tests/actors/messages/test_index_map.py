"""Index maps as packets: one bit for each channel, and nothing else is accepted."""

import numpy as np
import pytest
from fedbonsai.actors.messages.index_map import open_map, packet_bytes, seal_map
from fedbonsai.comms.codec import NO_CONTEXT, IdentityCodec
from fedbonsai.comms.errors import PacketError
from fedbonsai.comms.packet import PacketKind, Stamp, read_stamp, seal
from fedbonsai.learning.parts.channels import ChannelGroups, map_bytes, map_hash

# Two groups of six and four channels.
OWNERS = {"a.weight": {0: np.arange(6, dtype=np.int32)}, "b.weight": {0: np.arange(6, 10, dtype=np.int32)}}
GROUPS = ChannelGroups(("a", "b"), (6, 4), OWNERS, (("a.weight",), ("b.weight",)), ((), ()), {})
KEPT = np.array([1, 0, 1, 0, 0, 0, 0, 0, 0, 1], bool)
NAME = map_hash(KEPT)


def test_a_map_takes_one_bit_for_each_channel() -> None:
    packet = seal_map(KEPT, NAME)
    assert packet.nbytes == packet_bytes(GROUPS)
    assert read_stamp(packet) == Stamp(kind=PacketKind.INDEX_MAP, state_hash=int(NAME, 16))
    assert open_map(packet, NAME, GROUPS).tolist() == KEPT.tolist()
    wide = np.ones(8 * 100, bool)
    assert seal_map(wide, map_hash(wide)).nbytes - packet.nbytes == 100 - 2


def test_the_name_decides_which_map_is_expected() -> None:
    with pytest.raises(PacketError):
        open_map(seal_map(KEPT, NAME), f"{int(NAME, 16) ^ 1:016x}", GROUPS)


def test_the_content_must_be_what_the_name_says() -> None:
    with pytest.raises(PacketError, match="content"):
        open_map(seal_map(~KEPT, NAME), NAME, GROUPS)


def test_no_byte_of_a_packet_can_be_changed() -> None:
    packet = seal_map(KEPT, NAME)
    for position in range(packet.nbytes):
        damaged = packet.copy()
        damaged[position] ^= 1
        with pytest.raises(PacketError):
            open_map(damaged, NAME, GROUPS)
        with pytest.raises(PacketError):
            open_map(packet[:position], NAME, GROUPS)


@pytest.mark.parametrize(
    ("bits", "problem"),
    [
        ([1] * 6 + [0] * 4, "keeps none of 'b'"),
        ([1] * 10 + [1], "more channels than the model's 10"),
        ([1] * 17, ""),  # another length
        ([1] * 8, ""),
    ],
)
def test_a_map_that_does_not_fit_the_model_is_refused(bits: list[int], problem: str) -> None:
    kept = np.array(bits, bool)
    with pytest.raises(PacketError, match=problem or None):
        open_map(seal_map(kept, map_hash(kept)), map_hash(kept), GROUPS)


def test_a_packet_of_another_kind_is_no_map() -> None:
    values = {"channels": map_bytes(KEPT)}
    stamp = Stamp(kind=PacketKind.WEIGHTS, state_hash=int(NAME, 16))
    packet, _ = seal(values, codec=IdentityCodec(), context=NO_CONTEXT, stamp=stamp)
    with pytest.raises(PacketError):
        open_map(packet, NAME, GROUPS)
