"""Index maps as packets: which channels a narrow part holds, one bit for each channel of the full model."""

from ...comms.codec import Array, ArraySpec, Context, IdentityCodec
from ...comms.errors import MismatchedPacket
from ...comms.packet import PacketKind, Stamp, seal, unseal
from ...learning.architecture import Kept
from ...learning.parts.channels import ChannelGroups, map_bytes, read_map

_NAME = "channels"


def seal_map(kept: Kept, name: str) -> Array:
    """The packet of a map. ``name``: its content hash, 16 hexadecimal digits."""
    packet, _ = seal({_NAME: map_bytes(kept)}, codec=IdentityCodec(), context=Context(), stamp=_stamp(name))
    return packet


def open_map(packet: Array, name: str, groups: ChannelGroups) -> Kept:
    """The map in a packet of ``seal_map``, for a model with these groups of channels; raises a ``PacketError``."""
    expected = (ArraySpec(_NAME, (-(-groups.channels // 8),), "|u1"),)
    opened = unseal(packet, codec=IdentityCodec(), expected=expected, context=Context(), stamp=_stamp(name))
    try:
        return read_map(opened[_NAME], groups)
    except ValueError as error:
        raise MismatchedPacket(f"index map {name}: {error}") from error


def _stamp(name: str) -> Stamp:
    return Stamp(kind=PacketKind.INDEX_MAP, state_hash=int(name, 16))
