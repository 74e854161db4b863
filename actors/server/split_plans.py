"""What the server makes of a plan before it goes: the host's side of a split one, and the hashes of what is not sent."""

import msgspec

from ...learning.parts.part import complement
from ...learning.parts.structure import ModelSpec
from ...policies.plan import Plan
from ..messages.trunk import BlockHashes


def provisioned(plan: Plan, spec: ModelSpec, hashes: BlockHashes) -> Plan:
    """A plan with the hashes of what its device holds already: tensors that are frozen, the blocks of a trunk."""
    part = msgspec.structs.replace(plan.part, frozen=hashes.frozen(plan.part.blocks))
    if plan.split is None:
        return msgspec.structs.replace(plan, part=part)
    split = msgspec.structs.replace(plan.split, frozen=hashes.frozen(complement(spec, plan.part).blocks))
    if not split.method.trains_front:
        split, part = msgspec.structs.replace(split, trunk=hashes.trunk(split.depth)), hashes.cached(part)
    return msgspec.structs.replace(plan, split=split, part=part)


def hosted(plan: Plan, spec: ModelSpec, hashes: BlockHashes) -> Plan:
    """A split plan as its host has it: with the other blocks."""
    assert plan.split is not None
    part = complement(spec, plan.part, frozen_to=plan.split.depth)
    return msgspec.structs.replace(plan, part=part if plan.split.method.trains_front else hashes.cached(part))
