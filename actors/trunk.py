"""The trunk: blocks that nobody trains, which devices and hosts hold from the start, and which are never sent.

They are those of the model that everybody builds from the settings; a block is named by its hash, and whoever is told to use
one checks that its own is the same (EcoFed; Wu et al., TPDS 2024, arXiv 2304.05495).
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property

from msgspec.structs import replace
from torch import Tensor

from ..comms.errors import OutOfSync
from ..learning.part import Part
from ..learning.store import model_hash
from ..learning.structure import ModelSpec
from ..learning.workload import Workload

_HEX = 16  # digits of SHA-256 that name a block


class Trunk:
    """The blocks of the first model."""

    def __init__(self, workload: Workload) -> None:
        """Nothing is built before the first plan that needs it."""
        self._workload = workload
        self._hashes: dict[str, str] = {}

    def key(self, depth: str) -> str:
        """The hash of all blocks up to ``depth``."""
        names = self._workload.spec.block_names
        return trunk_hash([self._hash(name) for name in names[: names.index(depth) + 1]])

    def named(self, part: Part) -> Part:
        """A part whose frozen blocks are cached, by the hashes that they have here."""
        frozen = tuple(name for name in part.blocks if name not in part.trained)
        return replace(part, cached=tuple((name, self._hash(name)) for name in frozen))

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """The tensors of the blocks that a part has cached; raises ``OutOfSync`` where they are not those that it names."""
        for name, expected in part.cached:
            if (found := self._hash(name)) != expected:
                raise OutOfSync(f"block {name!r} of the trunk is {found} here, where the plan names {expected}")
        names = tuple(name for name, _ in part.cached)
        return {t.name: self._first[t.name] for t in self._workload.spec.tensors_of(names) if t.role != "counter"}

    def _hash(self, name: str) -> str:
        if name not in self._hashes:
            self._hashes[name] = block_hash(self._first, self._workload.spec, name)
        return self._hashes[name]

    @cached_property
    def _first(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = self._workload.new_model().state_dict()
        return tensors


def block_hash(tensors: Mapping[str, Tensor], spec: ModelSpec, name: str) -> str:
    """The hash that names a block of a model. Counters are left out: they never travel, and nothing depends on them."""
    return model_hash({t.name: tensors[t.name] for t in spec.tensors_of((name,)) if t.role != "counter"})[:_HEX]


def trunk_hash(blocks: list[str]) -> str:
    """The hash that names a trunk of blocks with these hashes."""
    return hashlib.sha256(" ".join(blocks).encode()).hexdigest()[:_HEX]
