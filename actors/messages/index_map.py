"""Index maps as packets: which channels a narrow part holds, one bit for each channel of the full model."""

from ...comms.codec import Array, ArraySpec, Context, IdentityCodec
from ...comms.errors import MismatchedPacket
from ...comms.packet import PacketKind, Stamp, seal, sealed_bytes, unseal
from ...learning.architecture import Kept
from ...learning.parts.channels import ChannelGroups, map_bytes, map_hash, read_map

MAX_MAPS = (
    1024  # that server and devices keep, besides those of plans in flight; the server takes a device to have far fewer
)
_NAME = "channels"


def seal_map(kept: Kept, name: str) -> Array:
    """The packet of a map. ``name``: its content hash, 16 hexadecimal digits."""
    packet, _ = seal({_NAME: map_bytes(kept)}, codec=IdentityCodec(), context=Context(), stamp=_stamp(name))
    return packet


def open_map(packet: Array, name: str, groups: ChannelGroups) -> Kept:
    """The map in a packet of ``seal_map``, for a model with these groups of channels; raises a ``PacketError``."""
    opened = unseal(packet, codec=IdentityCodec(), expected=_specs(groups), context=Context(), stamp=_stamp(name))
    try:
        kept = read_map(opened[_NAME], groups)
    except ValueError as error:
        raise MismatchedPacket(f"index map {name}: {error}") from error
    if (content := map_hash(kept)) != name:
        raise MismatchedPacket(f"index map {name} has the content of the map {content}")
    return kept


def packet_bytes(groups: ChannelGroups) -> int:
    """Bytes of the packet of any map of a model with these groups of channels."""
    return sealed_bytes(IdentityCodec(), _specs(groups))[0]


def _specs(groups: ChannelGroups) -> tuple[ArraySpec, ...]:
    return (ArraySpec(_NAME, (-(-groups.channels // 8),), "|u1"),)


def _stamp(name: str) -> Stamp:
    return Stamp(kind=PacketKind.INDEX_MAP, state_hash=int(name, 16))
