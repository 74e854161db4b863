"""Packets of links without memory: weights down to a leg of a plan, and the leg's update up."""

from collections.abc import Mapping

from torch import Tensor

from ...comms.codec import Array, Arrays
from ...comms.codecs.make_codec import make_codec
from ...comms.links.receive import context_for
from ...comms.packet import seal, unseal
from ...learning.parts.part import Part, down_tensors, up_tensors
from ...learning.parts.structure import ModelSpec
from ...learning.tensors import as_arrays
from ...policies.plan import Plan
from .messages import array_specs, update_context, update_stamp, weights_stamp


def seal_weights(plan: Plan, model: Mapping[str, Tensor], spec: ModelSpec) -> Array:
    """The packet of the plan's part of ``model``. It depends on version, part and codecs alone, so devices can share it."""
    expected = array_specs(down_tensors(spec, plan.part))
    packet, _ = seal(
        as_arrays({tensor.name: model[tensor.name] for tensor in expected}),
        codec=make_codec(plan.codec_down),
        context=context_for(expected, seed=plan.version),
        stamp=weights_stamp(plan.version),
    )
    return packet


def open_weights(packet: Array, plan: Plan, part: Part, spec: ModelSpec) -> Arrays:
    """The tensors of ``part`` in a packet of ``seal_weights``; raises a ``PacketError`` for an invalid packet."""
    expected = array_specs(down_tensors(spec, part))
    return unseal(
        packet,
        codec=make_codec(plan.codec_down),
        expected=expected,
        context=context_for(expected, seed=plan.version),
        stamp=weights_stamp(plan.version),
    )


def seal_update(
    trained: dict[str, Tensor], base: dict[str, Tensor], plan: Plan, *, part: Part, spec: ModelSpec, leg: int = 0
) -> Array:
    """The packet of a leg's update: what ``part`` trains, as differences or as weights (``plan.upload.payload``).

    ``trained``, ``base``: tensors by name, after training and as they were received.
    """
    specs = array_specs(up_tensors(spec, part, statistics=plan.upload.statistics))
    values = as_arrays({tensor.name: trained[tensor.name] for tensor in specs})
    packet, _ = seal(
        values,
        codec=make_codec(plan.codec_up),
        context=update_context(specs, plan),
        stamp=update_stamp(plan, leg=leg),
        minus=as_arrays({name: base[name] for name in values}) if plan.upload.payload == "difference" else None,
    )
    return packet


def open_update(packet: Array, plan: Plan, spec: ModelSpec, *, leg: int = 0) -> Arrays:
    """The tensors of a leg's update; ``plan.part`` is that leg's part.

    Raises a ``PacketError`` for a packet that is invalid or holds values that are not finite.
    """
    specs = array_specs(up_tensors(spec, plan.part, statistics=plan.upload.statistics))
    return unseal(
        packet,
        codec=make_codec(plan.codec_up),
        expected=specs,
        context=update_context(specs, plan),
        stamp=update_stamp(plan, leg=leg),
        finite=True,
    )
