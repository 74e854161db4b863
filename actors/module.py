"""A model that one plan after another is carried out on: its tensors are set anew for each, the rest starts as it was built."""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from ..learning.blocks import Blocks, cut
from ..learning.workload import Workload


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

    @cached_property
    def blocks(self) -> Blocks:
        """The model in blocks, which share its tensors."""
        return cut(self.model)

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
