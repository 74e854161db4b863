"""Blocks of the model as packets of their own, named by their content: frozen ones are sent to a device once."""

from collections.abc import Mapping

from torch import Tensor

from ...comms.codec import Array, ArraySpec, Context, IdentityCodec
from ...comms.errors import MismatchedPacket
from ...comms.packet import PacketKind, Stamp, seal, sealed_bytes, unseal
from ...learning.parts.structure import ModelSpec
from ...learning.tensors import as_arrays, as_tensors
from .messages import array_specs
from .trunk import content_hash

MAX_BLOCKS = 64  # received blocks that a device keeps; the server takes it to have no more


def seal_block(tensors: Mapping[str, Tensor], block: str, name: str, spec: ModelSpec) -> Array:
    """The packet of a block. ``tensors``: the model's. ``name``: the block's hash (``BlockHashes.block``)."""
    arrays = as_arrays({each.name: tensors[each.name] for each in _specs(block, spec)})
    packet, _ = seal(arrays, codec=IdentityCodec(), context=Context(), stamp=_stamp(name))
    return packet


def open_block(packet: Array, block: str, name: str, spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors of a block from a packet of ``seal_block``; raises a ``PacketError``, also where the content is another."""
    expected = _specs(block, spec)
    opened = unseal(packet, codec=IdentityCodec(), expected=expected, context=Context(), stamp=_stamp(name))
    tensors = as_tensors(opened)
    if (content := content_hash(tensors)) != name:
        raise MismatchedPacket(f"block {block!r} with the hash {name} has the content of {content}")
    return tensors


def block_bytes(block: str, spec: ModelSpec) -> int:
    """Bytes of the packet of a block."""
    return sealed_bytes(IdentityCodec(), _specs(block, spec))[0]


def _specs(block: str, spec: ModelSpec) -> tuple[ArraySpec, ...]:
    """The arrays in the packet of a block: all of its tensors but counters, which no computation depends on."""
    return array_specs(tuple(t for t in spec.tensors_of((block,)) if t.role != "counter"))


def _stamp(name: str) -> Stamp:
    return Stamp(kind=PacketKind.BLOCK, state_hash=int(name, 16))
