"""Preparation of a plan before it is sent: hashes of what its receivers hold already, the host's part, new auxiliaries."""

from collections.abc import MutableMapping

import msgspec
from torch import Tensor

from ...learning.parts.part import complement
from ...learning.parts.structure import ModelSpec, Role
from ...learning.workload import Workload
from ...policies.plan import Plan
from ..messages.trunk import BlockHashes


def add_hashes(plan: Plan, spec: ModelSpec, hashes: BlockHashes) -> Plan:
    """The plan with the hashes of tensors that are not sent: those that the model itself freezes, and those of a trunk."""
    part = msgspec.structs.replace(plan.part, frozen=hashes.frozen(plan.part.blocks))
    if plan.split is None:
        return msgspec.structs.replace(plan, part=part)
    split = msgspec.structs.replace(plan.split, frozen=hashes.frozen(complement(spec, plan.part).blocks))
    if not split.method.trains_front:
        split, part = msgspec.structs.replace(split, trunk=hashes.trunk(split.depth)), hashes.cached(part)
    return msgspec.structs.replace(plan, split=split, part=part)


def plan_for_host(plan: Plan, spec: ModelSpec, hashes: BlockHashes) -> Plan:
    """A split plan with the host's part in place of the device's."""
    assert plan.split is not None
    part = complement(spec, plan.part, frozen_to=plan.split.depth)
    return msgspec.structs.replace(plan, part=part if plan.split.method.trains_front else hashes.cached(part))


def add_auxiliaries(
    names: tuple[str, ...],
    workload: Workload,
    *,
    tensors: MutableMapping[str, Tensor],
    roles: MutableMapping[str, Role],
) -> None:
    """Add the initial tensors of these auxiliaries to ``tensors`` (a section of the store) and ``roles``, unless present."""
    for name in names:
        specs = workload.spec.auxiliary(name).tensors
        if specs[0].name not in tensors:
            state = workload.new_auxiliary(name).state_dict()
            tensors.update({f"{name}.{key}": tensor for key, tensor in state.items()})
            roles.update({tensor.name: tensor.role for tensor in specs})
