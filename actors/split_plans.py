"""What the server makes of a split plan: the host's side of it, and the names of the blocks that nobody trains or sends."""

import msgspec

from ..learning.part import rest
from ..learning.structure import ModelSpec
from ..policies.plan import Plan
from .trunk import BlockHashes


def provisioned(plan: Plan, hashes: BlockHashes) -> Plan:
    """A split plan with the hash of its trunk, and those of the blocks which its device holds already."""
    if plan.split is None or plan.split.mode != "ecofed":
        return plan
    split = msgspec.structs.replace(plan.split, trunk=hashes.trunk(plan.split.depth))
    return msgspec.structs.replace(plan, split=split, part=hashes.cached(plan.part))


def hosted(plan: Plan, spec: ModelSpec, hashes: BlockHashes) -> Plan:
    """A split plan as its host has it: with the other blocks."""
    assert plan.split is not None
    part = rest(spec, plan.part, frozen_to=plan.split.depth)
    return msgspec.structs.replace(plan, part=hashes.cached(part) if plan.split.mode == "ecofed" else part)
