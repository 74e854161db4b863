"""Preparation of a plan before it is sent: hashes of what its receivers hold already, the host's part, new auxiliaries."""

from collections.abc import MutableMapping

import msgspec
from torch import Tensor

from ...learning.parts.part import Part
from ...learning.parts.structure import Role
from ...learning.parts.submodel import SubModel
from ...learning.workload import Workload
from ...policies.plan import Plan
from ..messages.trunk import BlockHashes


def normal(plan: Plan) -> Plan:
    """The plan without settings of its part that have no meaning at the whole width, so that equal parts share packets."""
    if plan.part.width < 1:
        return plan
    part = msgspec.structs.replace(plan.part, min_channels=1, channels="prefix", turn=0, scaled=False)
    return msgspec.structs.replace(plan, part=part)


def add_hashes(plan: Plan, submodel: SubModel, hashes: BlockHashes) -> Plan:
    """The plan with the hashes of tensors that are not sent: those that the model itself freezes, and those of a trunk."""
    if plan.part.model or plan.part.width < 1:  # these have no tensors that the model itself freezes, and no trunk
        return plan
    part = msgspec.structs.replace(plan.part, frozen=hashes.frozen(plan.part.blocks))
    if plan.split is None:
        return msgspec.structs.replace(plan, part=part)
    split = msgspec.structs.replace(plan.split, frozen=hashes.frozen(submodel.rest().blocks))
    if not split.method.trains_front:
        split, part = msgspec.structs.replace(split, trunk=hashes.trunk(split.depth)), hashes.cached(part)
    return msgspec.structs.replace(plan, split=split, part=part)


def plan_for_host(plan: Plan, submodel: SubModel, hashes: BlockHashes) -> Plan:
    """A split plan with the host's part in place of the device's."""
    assert plan.split is not None
    part = submodel.rest(frozen_to=plan.split.depth)
    return msgspec.structs.replace(plan, part=part if plan.split.method.trains_front else hashes.cached(part))


def add_auxiliaries(
    part: Part,
    workload: Workload,
    *,
    tensors: MutableMapping[str, Tensor],
    roles: MutableMapping[str, Role],
) -> None:
    """Add the initial tensors of a part's auxiliaries to ``tensors`` (a section of the store) and ``roles``, unless present."""
    architecture, prefix = workload.family(part.model), f"{part.model}:" if part.model else ""
    for name in part.auxiliaries:
        specs = architecture.spec.auxiliary(name).tensors
        if prefix + specs[0].name not in tensors:
            state = architecture.new_auxiliary(name).state_dict()
            tensors.update({f"{prefix}{name}.{key}": tensor for key, tensor in state.items()})
            roles.update({prefix + tensor.name: tensor.role for tensor in specs})
