"""The trunk: blocks that nobody trains, which devices and hosts hold from the start, and which are never sent.

They are those of the model that everybody builds from the settings; a block is named by its hash, and whoever is told to use
one checks that its own is the same (EcoFed; Wu et al., TPDS 2024, arXiv 2304.05495).
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from msgspec.structs import replace
from torch import Tensor

from ...comms.errors import OutOfSync
from ...learning.parts.part import Part, frozen_tensors
from ...learning.parts.structure import ModelSpec
from ...learning.store import model_hash
from ...learning.workload import Workload

_HEX = 16  # digits of SHA-256 that name a block


class BlockHashes:
    """The hashes that name the blocks of a model, of those that were asked for, as long as nobody changes them."""

    SAVED: ClassVar = {"_hashes": dict[str, str]}  # by a checkpoint
    NOT_SAVED = ("_spec", "_tensors", "_block_of", "_frozen")

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        """``tensors``: of the model, by name; they may change in place."""
        self._spec, self._tensors = spec, tensors
        self._hashes: dict[str, str] = {}
        self._frozen: dict[tuple[str, ...], str] = {}
        self._block_of = {t.name: block.name for block in spec.blocks for t in block.tensors}

    def block(self, name: str) -> str:
        """The hash of a block. Counters are left out: they never travel, and nothing depends on them."""
        if name not in self._hashes:
            held = {t.name: self._tensors[t.name] for t in self._spec.tensors_of((name,)) if t.role != "counter"}
            self._hashes[name] = content_hash(held)
        return self._hashes[name]

    def frozen(self, blocks: tuple[str, ...]) -> str:
        """The hash of what the model's author has frozen in these blocks; "" where that is nothing. It never changes."""
        if blocks not in self._frozen:
            held = {t.name: self._tensors[t.name] for t in frozen_tensors(self._spec, blocks)}
            self._frozen[blocks] = content_hash(held) if held else ""
        return self._frozen[blocks]

    def trunk(self, depth: str) -> str:
        """The hash of all blocks up to ``depth``."""
        names = self._spec.block_names
        blocks = " ".join(self.block(name) for name in names[: names.index(depth) + 1])
        return hashlib.sha256(blocks.encode()).hexdigest()[:_HEX]

    def cached(self, part: Part) -> Part:
        """A part whose frozen blocks are not sent, but named."""
        frozen = tuple(name for name in part.blocks if name not in part.trained)
        return replace(part, cached=tuple((name, self.block(name)) for name in frozen))

    def changed(self, tensor: str) -> None:
        """A tensor has changed; one that is not of the model names no block."""
        self._hashes.pop(self._block_of.get(tensor, ""), None)


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """The short hash that names tensors by what they hold."""
    return model_hash(tensors)[:_HEX]


class Trunk:
    """The blocks of the first model, as devices and hosts have them."""

    def __init__(self, workload: Workload) -> None:
        """Nothing is built before the first plan that needs it."""
        self._workload = workload

    @cached_property
    def hashes(self) -> BlockHashes:
        """Their names."""
        return BlockHashes(self._workload.spec, self._first)

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """The tensors of the blocks that a part has cached; raises ``OutOfSync`` where they are not those that it names."""
        for name, expected in part.cached:
            if (found := self.hashes.block(name)) != expected:
                raise OutOfSync(f"block {name!r} of the trunk is {found} here, where the plan names {expected}")
        names = tuple(name for name, _ in part.cached)
        return {t.name: self._first[t.name] for t in self._workload.spec.tensors_of(names) if t.role != "counter"}

    @cached_property
    def _first(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = self._workload.new_model().state_dict()
        return tensors
