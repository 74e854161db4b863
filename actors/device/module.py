"""A worker's module of the model: reused from plan to plan, with all state reset in between.

A plan sets the tensors that it was sent. Counters and buffers outside the state start as they were built. Tensors that the
model itself freezes stay as they were built, since no plan trains or sends them.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ...comms.errors import OutOfSync
from ...learning.parts.blocks import Blocks, cut
from ...learning.parts.part import Part, frozen_tensors
from ...learning.workload import Workload
from ..messages.trunk import content_hash


class Module:
    """A module of the workload's model, with its initial buffers and the auxiliaries that plans name."""

    def __init__(self, workload: Workload, *, channels_last: bool) -> None:
        """Build the model."""
        model = workload.new_model()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self._fresh = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._workload, self._auxiliaries = workload, dict[str, nn.Module]()
        self._frozen: dict[tuple[str, ...], str] = {}  # by blocks, the hash of their frozen tensors

    @cached_property
    def blocks(self) -> Blocks:
        """The model in blocks, which share its tensors. (Flags such as ``requires_grad`` may be those of an earlier plan.)"""
        return replace(cut(self.model), spec=self._workload.blocks.spec)

    def check_frozen(self, part: Part) -> None:
        """Raise ``OutOfSync`` if the tensors that the model itself freezes are not those that ``part.frozen`` names."""
        if not part.frozen:
            return
        if part.blocks not in self._frozen:
            state = self.model.state_dict()
            tensors = {t.name: state[t.name] for t in frozen_tensors(self._workload.spec, part.blocks)}
            self._frozen[part.blocks] = content_hash(tensors)
        if (own := self._frozen[part.blocks]) != part.frozen:
            raise OutOfSync(
                f"the frozen tensors of this model are {own} here, where the plan names {part.frozen}; a model must be built "
                "with the same ones everywhere"
            )

    def auxiliary(self, name: str) -> nn.Module:
        """The auxiliary of this name, built when it is first needed."""
        if name not in self._auxiliaries:
            self._auxiliaries[name] = self._workload.new_auxiliary(name)
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
