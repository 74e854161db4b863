"""The update of a memoryless uplink: what a leg of a plan has trained, sealed and opened."""

from torch import Tensor

from ...comms.codec import Array, Arrays
from ...comms.codecs.make_codec import make_codec
from ...comms.packet import seal, unseal
from ...learning.parts.part import Part, up_tensors
from ...learning.parts.structure import ModelSpec
from ...learning.tensors import as_arrays
from ...policies.plan import Plan
from .messages import array_specs, update_context, update_stamp


def seal_update(
    held: dict[str, Tensor], base: dict[str, Tensor], plan: Plan, *, part: Part, spec: ModelSpec, leg: int = 0
) -> Array:
    """The packet of what ``part`` has trained: differences to what came down, or the weights themselves.

    ``held``, ``base``: tensors by name, now and as they came.
    """
    specs = array_specs(up_tensors(spec, part, statistics=plan.upload.statistics))
    values = as_arrays({tensor.name: held[tensor.name] for tensor in specs})
    packet, _ = seal(
        values,
        codec=make_codec(plan.codec_up),
        context=update_context(specs, plan),
        stamp=update_stamp(plan, leg=leg),
        minus=as_arrays({name: base[name] for name in values}) if plan.upload.payload == "difference" else None,
    )
    return packet


def open_update(packet: Array, plan: Plan, spec: ModelSpec, *, leg: int = 0) -> Arrays:
    """What a leg of the plan sent, whose part is the plan's; raises a ``PacketError`` where it is not sound, or not finite."""
    specs = array_specs(up_tensors(spec, plan.part, statistics=plan.upload.statistics))
    return unseal(
        packet,
        codec=make_codec(plan.codec_up),
        expected=specs,
        context=update_context(specs, plan),
        stamp=update_stamp(plan, leg=leg),
        finite=True,
    )
