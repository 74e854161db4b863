"""What the server makes of a split plan: the host's side of it, and the names of the blocks that nobody trains or sends."""

from collections.abc import Mapping

import msgspec
from torch import Tensor

from ..learning.part import Part, rest
from ..learning.structure import ModelSpec
from ..policies.plan import Plan
from .trunk import block_hash, trunk_hash


class SplitPlans:
    """Keeps the hashes of the blocks that were asked for, as long as nobody trains them."""

    def __init__(self, spec: ModelSpec, model: Mapping[str, Tensor]) -> None:
        """``model``: the server's own, which changes in place."""
        self._spec, self._model = spec, model
        self._hashes: dict[str, str] = {}
        self._block_of = {t.name: block.name for block in spec.blocks for t in block.tensors}

    def changed(self, name: str) -> None:
        """A tensor of the model has changed."""
        self._hashes.pop(self._block_of[name], None)

    def provisioned(self, plan: Plan) -> Plan:
        """A split plan with the hash of its trunk, and those of the blocks which its device holds already."""
        if plan.split is None or plan.split.mode != "ecofed":
            return plan
        names = self._spec.block_names
        trunk = trunk_hash([self._hash(name) for name in names[: names.index(plan.split.depth) + 1]])
        split = msgspec.structs.replace(plan.split, trunk=trunk)
        return msgspec.structs.replace(plan, split=split, part=self._cached(plan.part))

    def hosted(self, plan: Plan) -> Plan:
        """A split plan as its host has it: with the other blocks."""
        assert plan.split is not None
        part = rest(self._spec, plan.part, frozen_to=plan.split.depth)
        return msgspec.structs.replace(plan, part=self._cached(part) if plan.split.mode == "ecofed" else part)

    def _cached(self, part: Part) -> Part:
        """A part whose frozen blocks are not sent, but named."""
        frozen = tuple(name for name in part.blocks if name not in part.trained)
        return msgspec.structs.replace(part, cached=tuple((name, self._hash(name)) for name in frozen))

    def _hash(self, name: str) -> str:
        """The hash of a block of the current model."""
        if name not in self._hashes:
            self._hashes[name] = block_hash(self._model, self._spec, name)
        return self._hashes[name]
