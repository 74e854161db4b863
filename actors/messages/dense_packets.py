"""Packets of links without memory: weights down to a leg of a plan, and the leg's update up."""

from collections.abc import Mapping

from torch import Tensor

from ...comms.codec import Array, Arrays
from ...comms.codecs.make_codec import make_codec
from ...comms.links.receive import context_for
from ...comms.packet import seal, unseal
from ...learning.parts.submodel import SubModel
from ...learning.tensors import as_arrays
from ...policies.plan import Plan
from .messages import array_specs, sealing_context, update_context, update_stamp, update_tensors, weights_stamp


def seal_weights(plan: Plan, tensors: Mapping[str, Tensor], submodel: SubModel) -> Array:
    """The packet of a part of the server's ``tensors``. It depends on version, part and codecs alone, so devices share it.

    ``submodel``: the part of one leg of the plan, compiled, here and below.
    """
    expected = array_specs(submodel.down)
    packet, _ = seal(
        as_arrays(submodel.gather(tensors)),
        codec=make_codec(plan.codec_down),
        context=context_for(expected, seed=plan.version),
        stamp=weights_stamp(plan.version),
    )
    return packet


def open_weights(packet: Array, plan: Plan, submodel: SubModel) -> Arrays:
    """The tensors of a part in a packet of ``seal_weights``; raises a ``PacketError`` for an invalid packet."""
    expected = array_specs(submodel.down)
    return unseal(
        packet,
        codec=make_codec(plan.codec_down),
        expected=expected,
        context=context_for(expected, seed=plan.version),
        stamp=weights_stamp(plan.version),
    )


def seal_update(
    trained: dict[str, Tensor], base: dict[str, Tensor], plan: Plan, *, submodel: SubModel, leg: int = 0
) -> Array:
    """The packet of a leg's update: what its part trains, as differences or as weights (``plan.upload.payload``).

    ``trained``, ``base``: tensors by name, after training and as they were received.
    """
    specs = array_specs(update_tensors(plan, submodel))
    values = as_arrays({tensor.name: trained[tensor.name] for tensor in specs})
    codec = make_codec(plan.codec_up)
    packet, _ = seal(
        values,
        codec=codec,
        context=sealing_context(specs, plan, codec, trained=values),
        stamp=update_stamp(plan, leg=leg),
        minus=as_arrays({name: base[name] for name in values}) if plan.upload.payload == "difference" else None,
    )
    return packet


def open_update(packet: Array, plan: Plan, submodel: SubModel, *, leg: int = 0) -> Arrays:
    """The tensors of a leg's update.

    Raises a ``PacketError`` for a packet that is invalid or holds values that are not finite.
    """
    specs = array_specs(update_tensors(plan, submodel))
    return unseal(
        packet,
        codec=make_codec(plan.codec_up),
        expected=specs,
        context=update_context(specs, plan),
        stamp=update_stamp(plan, leg=leg),
        finite=True,
    )
