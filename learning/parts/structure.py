"""What a model is made of, as plain data: ordered blocks of named tensors. No torch is needed to read it.

A *block* is a stretch of the model between two clean cuts (``learning.blocks``). Tensors keep the names they have in the
user's model (``layer1.0.conv1.weight``), so that a report of an old version still lands in the right place.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec
import numpy as np

# weight: two or more dimensions, trained. vector: one dimension or none, trained (bias, normalisation scale and shift).
# statistic: a floating-point buffer (running mean). counter: an integer or boolean buffer; it never travels.
Role = Literal["weight", "vector", "statistic", "counter"]


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, shape, numpy type and role of one tensor of the full model. ``frozen``: by its author, see ``learning.frozen``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    frozen: bool = False

    @property
    def items(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, uncompressed."""
        return self.items * np.dtype(self.dtype).itemsize


class BlockSpec(msgspec.Struct, frozen=True):
    """One block: its name and its tensors, in the model's own order."""

    name: str
    tensors: tuple[TensorSpec, ...]


def no_auxiliaries(name: str) -> BlockSpec:
    """Of a model by itself, without the data that tell what an auxiliary must take and give."""
    raise ValueError(f"part.auxiliaries names {name!r}; this model has no auxiliaries")


class ModelSpec(msgspec.Struct, frozen=True):
    """The whole model: ordered blocks. ``Part`` speaks of blocks by the names used here.

    ``auxiliary``: the tensors of the auxiliary of that name (``learning.auxiliaries``), which is no part of the model; raises
    ``ValueError`` where there can be none.
    """

    blocks: tuple[BlockSpec, ...]
    auxiliary: Callable[[str], BlockSpec] = no_auxiliaries

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks, front to back."""
        return tuple(block.name for block in self.blocks)

    def tensors_of(self, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        """Tensors of the named blocks, in model order.

        Raises ``ValueError`` for a block that the model does not have.
        """
        wanted = set(names)
        if unknown := wanted - set(self.block_names):
            raise ValueError(
                f"part.blocks names {sorted(unknown)[0]!r}, which this model does not have; "
                f"its blocks are: {', '.join(self.block_names)}"
            )
        return tuple(tensor for block in self.blocks if block.name in wanted for tensor in block.tensors)

    def auxiliary_tensors(self, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        """Tensors of the named auxiliaries; raises ``ValueError`` for one that cannot be."""
        return tuple(tensor for name in names for tensor in self.auxiliary(name).tensors)

    @property
    def parameters(self) -> int:
        """Number of scalars in all parameters."""
        return sum(t.items for t in self._all() if t.role in ("weight", "vector"))

    @property
    def frozen_parameters(self) -> int:
        """Of those, how many are frozen by the model's author."""
        return sum(t.items for t in self._all() if t.frozen and t.role in ("weight", "vector"))

    def _all(self) -> Iterator[TensorSpec]:
        return (tensor for block in self.blocks for tensor in block.tensors)
