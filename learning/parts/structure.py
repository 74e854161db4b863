"""The structure of a model as plain data: ordered blocks of named tensors. Imports no torch.

A *block* is a sequence of operations between two cuts (``parts.blocks``). Tensors keep their names in the user's model
(``layer1.0.conv1.weight``), so that an update of an older version can still be assigned.

Frozen tensors: parameters whose ``requires_grad`` the model's author has switched off, as in a pretrained base under adapters.
They are neither trained nor sent: both ends of a link build the model from the same settings and hold equal ones, which a hash
checks. A module all of whose own parameters are frozen runs in evaluation mode, and its buffers are frozen too, so that
frozen normalisation keeps its statistics. (torch by itself would update them, which is seldom intended, and they would differ
from device to device.)
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

if TYPE_CHECKING:  # this module must be readable without torch
    from torch import nn

# weight: parameter of two or more dimensions. sparse: weight of a layer with sparse products (``learning.sparse``). vector:
# parameter of one dimension or none (bias, normalisation scale and shift). statistic: floating-point buffer (running mean).
# counter: integer or boolean buffer, which is never sent.
Role = Literal["weight", "sparse", "vector", "statistic", "counter"]


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, shape, numpy type and role of one tensor of the full model. ``frozen``: by the model's author, see above."""

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
    def is_weight(self) -> bool:
        """Whether it is a parameter of two or more dimensions."""
        return self.role in ("weight", "sparse")

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter."""
        return self.is_weight or self.role == "vector"

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, uncompressed."""
        return self.items * np.dtype(self.dtype).itemsize


class BlockSpec(msgspec.Struct, frozen=True):
    """One block: its name and its tensors, in the model's order."""

    name: str
    tensors: tuple[TensorSpec, ...]


def no_auxiliaries(name: str) -> BlockSpec:
    """Raise ``ValueError``: the default for a model without data, where the shapes of auxiliaries are not known."""
    raise ValueError(f"part.auxiliaries names {name!r}; this model has no auxiliaries")


class ModelSpec(msgspec.Struct, frozen=True):
    """The whole model: ordered blocks. ``Part`` refers to blocks by the names used here.

    ``auxiliary``: returns the tensors of an auxiliary by name (``parts.auxiliaries``), which do not belong to the model; raises
    ``ValueError`` if the model cannot have it.
    """

    blocks: tuple[BlockSpec, ...]
    auxiliary: Callable[[str], BlockSpec] = no_auxiliaries

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks, from input to output."""
        return tuple(block.name for block in self.blocks)

    def tensors_of(self, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        """Tensors of the named blocks, in model order.

        Raises ``ValueError`` for a block that the model does not have.
        """
        selected = set(names)
        if unknown := selected - set(self.block_names):
            raise ValueError(
                f"part.blocks names {sorted(unknown)[0]!r}, which this model does not have; "
                f"its blocks are: {', '.join(self.block_names)}"
            )
        return tuple(tensor for block in self.blocks if block.name in selected for tensor in block.tensors)

    def auxiliary_tensors(self, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        """Tensors of the named auxiliaries. Raises ``ValueError`` for one that the model cannot have."""
        return tuple(tensor for name in names for tensor in self.auxiliary(name).tensors)

    @property
    def parameters(self) -> int:
        """Number of scalars in all parameters."""
        return sum(t.items for t in self._all() if t.is_parameter)

    @property
    def frozen_parameters(self) -> int:
        """Number of scalars in parameters that the model's author has frozen."""
        return sum(t.items for t in self._all() if t.frozen and t.is_parameter)

    def _all(self) -> Iterator[TensorSpec]:
        return (tensor for block in self.blocks for tensor in block.tensors)


def frozen_names(model: "nn.Module") -> set[str]:
    """Names of all frozen parameters and buffers of ``model``; of a tied one all names."""
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if _is_frozen(module):
            names |= {f"{prefix}.{name}".lstrip(".") for name, buffer in module.named_buffers(recurse=False)}
    return names


def frozen_modules(model: "nn.Module") -> "Iterator[nn.Module]":
    """Modules that stay in evaluation mode while ``model`` is trained."""
    return (module for module in model.modules() if _is_frozen(module))


def _is_frozen(module: "nn.Module") -> bool:
    """Whether a module has parameters of its own, and all of them are frozen."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)
