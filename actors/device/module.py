"""A model that one plan after another is carried out on: its tensors are set anew for each, the rest starts as it was built.

What its author has frozen stays as it was built, too: no plan trains it, and none brings it.
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
    """A worker's module of the workload, and what its buffers held when it was new."""

    def __init__(self, workload: Workload, *, channels_last: bool) -> None:
        """Build it."""
        model = workload.new_model()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self._fresh = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._workload, self._auxiliaries = workload, dict[str, nn.Module]()
        self._frozen: dict[tuple[str, ...], str] = {}  # hashes by blocks

    @cached_property
    def blocks(self) -> Blocks:
        """The model in blocks, which share its tensors. (The flags of a module that has been trained are those of a plan.)"""
        return replace(cut(self.model), spec=self._workload.blocks.spec)

    def check_frozen(self, part: Part) -> None:
        """Raise ``OutOfSync`` where the tensors that the model's author has frozen are not those that a part names."""
        if not part.frozen:
            return
        if part.blocks not in self._frozen:
            state = self.model.state_dict()
            tensors = {t.name: state[t.name] for t in frozen_tensors(self._workload.spec, part.blocks)}
            self._frozen[part.blocks] = content_hash(tensors)
        if (found := self._frozen[part.blocks]) != part.frozen:
            raise OutOfSync(
                f"the frozen tensors of this model are {found} here, where the plan names {part.frozen}; a model must be built "
                "with the same ones everywhere"
            )

    def auxiliary(self, name: str) -> nn.Module:
        """The auxiliary of that name."""
        if name not in self._auxiliaries:
            self._auxiliaries[name] = self._workload.new_auxiliary(name)
        return self._auxiliaries[name]

    def state(self, auxiliaries: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The tensors of the model, and of these auxiliaries, by name."""
        found: dict[str, Tensor] = self.model.state_dict()
        for name in auxiliaries:
            found |= {f"{name}.{key}": tensor for key, tensor in self.auxiliary(name).state_dict().items()}
        return found

    def load(self, tensors: Mapping[str, Tensor], auxiliaries: tuple[str, ...] = ()) -> None:
        """Set the named tensors, ``auxiliaries``' too; those that no packet brings keep what the plan before left.

        Counters start anew.
        """
        held = self.state(auxiliaries)
        with torch.no_grad():
            for name, start in self._fresh.items():  # counters and buffers outside the state do not travel
                if name not in tensors:
                    self.model.get_buffer(name).copy_(start)
            for name, tensor in tensors.items():
                held[name].copy_(tensor)
