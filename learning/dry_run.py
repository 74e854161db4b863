"""One training step of a part on tensors that may be fake: what costs are counted and measured on.

It does what local training does: frozen blocks before the first trained one run without gradients, only trained blocks get
them, autocast and checkpointing as the settings say. The model's own tensors are not touched.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .blocks import Blocks
from .part import Part
from .spec import Training
from .training import densify

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class DryRun:
    """What is asked; ``convert`` makes the tensors that the run uses up out of the model's own.

    ``ahead``: micro-batches that are out at once, see ``learning.ahead``.
    """

    blocks: Blocks
    part: Part
    example: tuple[Tensor, Tensor]
    training: Training
    loss: Loss
    entering_gradient: bool = True
    head: nn.Module | None = None
    ahead: int = 1
    convert: Callable[[Tensor], Tensor] = torch.clone

    def prepare(self, batch: int) -> "Step":
        """A training step on ``batch`` copies of the example."""
        names = self.blocks.spec.block_names
        first = names.index(self.part.blocks[0])
        x, y = (self.convert(t).unsqueeze(0).expand(batch, *t.shape).contiguous() for t in self.example)
        with torch.no_grad(), self.autocast():
            for name in names[:first]:
                x = functional_call(self.blocks.modules[name], self._state(name), (x,))
        if first > 0 and x.is_floating_point():
            x = x.detach().requires_grad_(self.entering_gradient)
        return Step(self, {name: self._state(name) for name in self._names}, x, y)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Blocks by name, and the auxiliary head."""
        return self.blocks.modules | ({self.part.head: self.head} if self.head is not None else {})

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of what is trained."""
        return self.part.trained + ((self.part.head,) if self.head is not None else ())

    @property
    def _names(self) -> tuple[str, ...]:
        """Names of what runs, in order."""
        return self.part.blocks + ((self.part.head,) if self.head is not None else ())

    def autocast(self) -> torch.autocast:
        """The plan's precision."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.training.precision == "bf16")

    def _state(self, name: str) -> dict[str, Tensor]:
        """The tensors of one block by name, tied ones as one; those to be trained require gradients."""
        block, made = self.modules[name], dict[int, Tensor]()
        state = {}
        named = [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]
        for key, tensor in named:
            if id(tensor) not in made:
                wanted = isinstance(tensor, nn.Parameter) and tensor.requires_grad and name in self.trained
                # Of a head there may be shapes only: made here, which allocates nothing while tensors are fake.
                usable = torch.zeros_like(tensor, device="cpu") if tensor.is_meta else self.convert(tensor)
                made[id(tensor)] = usable.detach().requires_grad_(wanted)
            state[key] = made[id(tensor)]
        return state


@dataclass(frozen=True)
class Step:
    """One training step: state of each block, input and target of one batch."""

    run: DryRun
    states: dict[str, dict[str, Tensor]]
    x: Tensor
    y: Tensor

    def forward(self) -> Any:
        """What leaves the last block."""
        x, modules, trained = self.x, self.run.modules, self.run.trained
        wanted = x.requires_grad
        for name, state in self.states.items():
            wanted = wanted or name in trained
            recomputed = self.run.training.checkpointing and name in trained
            with nullcontext() if wanted else torch.no_grad(), self.run.autocast():
                call = partial(functional_call, modules[name], state)
                x = checkpoint(call, (x,), use_reentrant=False, preserve_rng_state=False) if recomputed else call((x,))
        return x

    def backward(self, output: Any) -> None:
        """From the loss, or the sum of what leaves the part, to the gradients; nothing where nothing is trained."""
        if not self.trained:
            return
        with self.run.autocast():
            if self.run.head is not None or self.run.part.blocks[-1] == self.run.blocks.spec.block_names[-1]:
                value = self.run.loss(output, self.y)
            else:
                value = torch.stack([t.sum() for t in tree_leaves(output) if isinstance(t, Tensor)]).sum()
        value.backward()  # type: ignore[no-untyped-call]
        densify(self.trained)

    def copied(self) -> "Step":
        """The same with copies of all tensors of the state."""
        tensors = {id(t): t for state in self.states.values() for t in state.values()}
        made = {key: t.detach().clone().requires_grad_(t.requires_grad) for key, t in tensors.items()}
        states = {name: {key: made[id(t)] for key, t in state.items()} for name, state in self.states.items()}
        return replace(self, states=states)

    def forget_gradients(self) -> None:
        """Free those of the state."""
        for tensor in self.trained:
            tensor.grad = None

    @property
    def trained(self) -> list[Tensor]:
        """Tensors that get gradients."""
        return list({id(t): t for state in self.states.values() for t in state.values() if t.requires_grad}.values())
