"""The update of a memoryless uplink: what a leg of a plan has trained, sealed."""

from torch import Tensor, nn

from ..comms.codecs import Array
from ..comms.make_codec import make_codec
from ..comms.packet import seal
from ..learning.part import Part, up_tensors
from ..learning.structure import ModelSpec
from ..learning.tensors import as_arrays
from ..policies.plan import Plan
from .messages import array_specs, update_context, update_stamp


def seal_update(
    model: nn.Module, base: dict[str, Tensor], plan: Plan, *, part: Part, spec: ModelSpec, leg: int = 0
) -> Array:
    """The packet of what ``part`` of the model trained: differences to what came down, or the weights themselves."""
    specs = array_specs(up_tensors(spec, part, statistics=plan.upload.statistics))
    held = model.state_dict()
    values = as_arrays({tensor.name: held[tensor.name] for tensor in specs})
    packet, _ = seal(
        values,
        codec=make_codec(plan.codec_up),
        context=update_context(specs, plan),
        stamp=update_stamp(plan, leg=leg),
        minus=as_arrays({name: base[name] for name in values}) if plan.upload.payload == "difference" else None,
    )
    return packet
