"""A worker's module of the model: reused from plan to plan, with all state reset in between.

A plan sets the tensors that it was sent. Counters and buffers outside the state start as they were built. Tensors that the
model itself freezes stay as they were built, since no plan trains or sends them.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ...comms.errors import OutOfSync
from ...learning.architecture import Architecture
from ...learning.parts.blocks import Blocks, cut
from ...learning.parts.submodel import SubModel
from ..messages.trunk import content_hash

_MAX_MODULES = 8  # of different widths, families and memory formats


class Module:
    """A module of one architecture, with its initial buffers and the auxiliaries that plans name."""

    def __init__(self, architecture: Architecture, *, channels_last: bool) -> None:
        """Build the model."""
        model = architecture.new_model()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self._fresh = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._architecture, self._auxiliaries = architecture, dict[str, nn.Module]()
        self._frozen: dict[tuple[str, ...], str] = {}  # by blocks, the hash of their frozen tensors

    @cached_property
    def blocks(self) -> Blocks:
        """The model in blocks, which share its tensors. (Flags such as ``requires_grad`` may be those of an earlier plan.)"""
        return replace(cut(self.model), spec=self._architecture.blocks.spec)

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


class Modules:
    """The modules of a worker, by architecture and memory format. The most recently used few are kept."""

    def __init__(self) -> None:
        """No module."""
        self._kept: OrderedDict[tuple[Architecture, bool], Module] = OrderedDict()

    def get(self, architecture: Architecture, *, channels_last: bool) -> Module:
        """The module of an architecture; built when it is first needed."""
        key = architecture, channels_last
        if key not in self._kept:
            if len(self._kept) >= _MAX_MODULES:  # before the new one is built: a worker may have room for few
                self._kept.popitem(last=False)
            self._kept[key] = Module(architecture, channels_last=channels_last)
        self._kept.move_to_end(key)
        return self._kept[key]
