"""Packets of whole models without a codec, between the server and actors beside it."""

from collections.abc import Mapping

from torch import Tensor

from ...comms.codec import Array, IdentityCodec
from ...comms.links.receive import context_for
from ...comms.packet import seal, unseal
from ...learning.parts.submodel import SubModel
from ...learning.tensors import as_arrays, as_tensors
from .messages import array_specs, weights_stamp


def seal_model(tensors: Mapping[str, Tensor], submodel: SubModel) -> Array:
    """The packet of a part's tensors, by their own names."""
    specs = array_specs(submodel.down)
    values = as_arrays({spec.name: tensors[spec.name].contiguous() for spec in specs})
    packet, _ = seal(values, codec=IdentityCodec(), context=context_for(specs, seed=0), stamp=weights_stamp(0))
    return packet


def open_model(packet: Array, submodel: SubModel, *, finite: bool = False) -> dict[str, Tensor]:
    """The tensors in a packet of ``seal_model``; raises a ``PacketError``."""
    specs = array_specs(submodel.down)
    context = context_for(specs, seed=0)
    return as_tensors(
        unseal(packet, codec=IdentityCodec(), expected=specs, context=context, stamp=weights_stamp(0), finite=finite)
    )
