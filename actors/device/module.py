"""A worker's module of the model: reused from plan to plan, with all state reset in between.

A plan sets the tensors that it was sent. Counters and buffers outside the state start as they were built. Tensors that the
model itself freezes stay as they were built, since no plan trains or sends them.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...comms.errors import OutOfSync
from ...learning.architecture import Architecture
from ...learning.parts.blocks import Blocks, cut_like
from ...learning.parts.part import Part
from ...learning.parts.submodel import SubModel
from ...learning.sparse.layers import make_packable
from ...learning.spec import Layout
from ...learning.training.precision import model_in_layout
from ..messages.trunk import content_hash

_MAX_MODULES = 8  # of different widths, families and layouts


class Module:
    """A module of one architecture, with its initial buffers and the auxiliaries that plans name."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        layout: Layout,
        blocks: tuple[str, ...] | None = None,
        lowered: tuple[str, ...] = (),
    ) -> None:
        """Build the model. ``blocks``: those that are held (None: all); the parameters of the others take no memory.

        ``lowered``: blocks whose weights are held in bfloat16.
        """
        model = architecture.new_model()
        if blocks is not None:
            _free_others(model, architecture, blocks)
        self.model = model_in_layout(model, layout)
        if layout == "channels_last":
            make_packable(model)
        self._fresh = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._architecture, self._auxiliaries = architecture, dict[str, nn.Module]()
        self._frozen: dict[tuple[str, ...], str] = {}  # by blocks, the hash of their frozen tensors
        if lowered:
            _ = self.blocks  # cut now: a block's specification is that of its own type
            weights = {t.name for t in architecture.blocks.spec.tensors_of(lowered) if t.is_weight}
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.data = parameter.data.bfloat16()

    @cached_property
    def blocks(self) -> Blocks:
        """The model in blocks, which share its tensors. (Flags such as ``requires_grad`` may be those of an earlier plan.)"""
        like = self._architecture.blocks
        return replace(cut_like(like, self.model), spec=like.spec)

    def check_frozen(self, submodel: SubModel, expected: str) -> None:
        """Raise ``OutOfSync`` unless the tensors that the model itself freezes have the ``expected`` hash ("": not checked)."""
        if not expected:
            return
        blocks = submodel.part.blocks
        if blocks not in self._frozen:
            state = self.model.state_dict()
            self._frozen[blocks] = content_hash({name: state[name] for name in submodel.frozen})
        if (own := self._frozen[blocks]) != expected:
            raise OutOfSync(
                f"the frozen tensors of this model are {own} here, where the plan names {expected}; a model must be built "
                "with the same ones everywhere"
            )

    def auxiliary(self, name: str) -> nn.Module:
        """The auxiliary of this name, built when it is first needed."""
        if name not in self._auxiliaries:
            self._auxiliaries[name] = self._architecture.new_auxiliary(name)
        return self._auxiliaries[name]

    def state(self, auxiliaries: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The tensors of the model, and of these auxiliaries, by name."""
        tensors: dict[str, Tensor] = self.model.state_dict()
        for name in auxiliaries:
            tensors |= {f"{name}.{key}": tensor for key, tensor in self.auxiliary(name).state_dict().items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor], auxiliaries: tuple[str, ...] = ()) -> None:
        """Set the named tensors, of the model and of ``auxiliaries``, and reset all other buffers.

        Parameters that are not named keep their values from the plan before.
        """
        state = self.state(auxiliaries)
        with torch.no_grad():
            for name, start in self._fresh.items():  # counters and buffers outside the state are never sent
                if name not in tensors:
                    self.model.get_buffer(name).copy_(start)
            for name, tensor in tensors.items():
                state[name].copy_(tensor)


def _free_others(model: nn.Module, architecture: Architecture, blocks: tuple[str, ...]) -> None:
    """Replace parameters and running statistics of all blocks but these by empty tensors; their dimensions say where to cut."""
    spec = architecture.blocks.spec
    held = {tensor.name for tensor in spec.tensors_of(blocks)}
    others = {t.name for block in spec.blocks for t in block.tensors if t.role != "counter"} - held
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if f"{prefix}.{name}".lstrip(".") in others:
                parameter.data = parameter.new_empty((0,) * parameter.dim())
        for name, buffer in list(module.named_buffers(recurse=False)):
            if f"{prefix}.{name}".lstrip(".") in others:
                module._buffers[name] = buffer.new_empty((0,) * buffer.dim())


class Modules:
    """The modules of a worker, by architecture, layout and blocks. The most recently used few are kept."""

    def __init__(self) -> None:
        """No module."""
        self._kept: OrderedDict[tuple[Any, ...], Module] = OrderedDict()

    def get(
        self,
        architecture: Architecture,
        *,
        layout: Layout,
        part: Part | None = None,
        lowered: tuple[str, ...] = (),
    ) -> Module:
        """The module of an architecture, with the blocks of ``part``; built when it is first needed.

        ``lowered``: blocks whose weights are held in bfloat16.
        """
        blocks = None if part is None or part.blocks == architecture.blocks.spec.block_names else part.blocks
        key = architecture, layout, blocks, lowered
        if key not in self._kept:
            if len(self._kept) >= _MAX_MODULES:  # before the new one is built: a worker may have room for few
                self._kept.popitem(last=False)
            self._kept[key] = Module(architecture, layout=layout, blocks=blocks, lowered=lowered)
        self._kept.move_to_end(key)
        return self._kept[key]
