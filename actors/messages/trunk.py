"""The trunk: frozen first blocks, which devices and hosts build from the settings, and which are never sent.

A plan names a block by its hash; device and host check that theirs is the same (EcoFed; Wu et al., TPDS 2024,
arXiv 2304.05495).
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar

from msgspec.structs import replace
from torch import Tensor

from ...comms.errors import OutOfSync
from ...learning.parts.part import Part
from ...learning.parts.structure import ModelSpec
from ...learning.parts.submodel import frozen_tensors
from ...learning.store import model_hash
from ...learning.workload import Workload

_HEX = 16  # digits of SHA-256 that name a block


class BlockHashes:
    """Hashes of a model's blocks, computed on demand and cached until a tensor of the block changes."""

    SAVED: ClassVar = {"_hashes": dict[str, str]}  # by a checkpoint
    NOT_SAVED = ("_spec", "_tensors", "_block_of", "_frozen")

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        """``tensors``: the model's, by name; they may change in place (see ``changed``)."""
        self._spec, self._tensors = spec, tensors
        self._hashes: dict[str, str] = {}
        self._frozen: dict[tuple[str, ...], str] = {}
        self._block_of = {t.name: block.name for block in spec.blocks for t in block.tensors}

    def block(self, name: str) -> str:
        """The hash of a block, without its counters: those are never sent, and nothing depends on them."""
        if name not in self._hashes:
            tensors = {t.name: self._tensors[t.name] for t in self._spec.tensors_of((name,)) if t.role != "counter"}
            self._hashes[name] = content_hash(tensors)
        return self._hashes[name]

    def frozen(self, blocks: tuple[str, ...]) -> str:
        """The hash of the tensors of these blocks that the model itself freezes; "" if there are none. It never changes."""
        if blocks not in self._frozen:
            tensors = {t.name: self._tensors[t.name] for t in frozen_tensors(self._spec, blocks)}
            self._frozen[blocks] = content_hash(tensors) if tensors else ""
        return self._frozen[blocks]

    def trunk(self, depth: str) -> str:
        """The hash of all blocks up to ``depth``."""
        names = self._spec.block_names
        blocks = " ".join(self.block(name) for name in names[: names.index(depth) + 1])
        return hashlib.sha256(blocks.encode()).hexdigest()[:_HEX]

    def cached(self, part: Part) -> Part:
        """A part whose untrained blocks are named by hash instead of sent."""
        frozen = tuple(name for name in part.blocks if name not in part.trained)
        return replace(part, cached=tuple((name, self.block(name)) for name in frozen))

    def changed(self, tensor: str) -> None:
        """Forget the hash of the block that holds this tensor; names outside the model are ignored."""
        self._hashes.pop(self._block_of.get(tensor, ""), None)


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of the contents of tensors."""
    return model_hash(tensors)[:_HEX]


class Trunk:
    """The blocks of the initial model, as devices and hosts hold them."""

    def __init__(self, workload: Workload) -> None:
        """The model is built when a plan first needs it."""
        self._workload = workload

    @cached_property
    def hashes(self) -> BlockHashes:
        """Hashes of the initial model's blocks."""
        return BlockHashes(self._workload.spec, self._first)

    def tensors(self, cached: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """The tensors of these blocks, each with its hash; raises ``OutOfSync`` if a block has another hash."""
        if not cached:  # a device that holds a narrow part has no need to build the full model
            return {}
        for name, expected in cached:
            if (own := self.hashes.block(name)) != expected:
                raise OutOfSync(f"block {name!r} of the trunk is {own} here, where the plan names {expected}")
        names = tuple(name for name, _ in cached)
        return {t.name: self._first[t.name] for t in self._workload.spec.tensors_of(names) if t.role != "counter"}

    @cached_property
    def _first(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = self._workload.new_model().state_dict()
        return tensors
