"""One training step of a part on a few samples, on which costs are counted.

It does the same as local training: frozen blocks before the first trained one run without gradients, only trained blocks get
gradients, and autocast and checkpointing follow the settings. It runs on copies; the model's own tensors are not changed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from ..parts.auxiliaries import LinearHead
from ..parts.part import blocks_of, replaced_by
from ..parts.submodel import SubModel
from ..spec import Training
from ..training.precision import autocast
from ..training.recompute import call_with, recomputed
from ..training.staged import entering, frozen_before, imitation_loss, run_stages
from ..training.training import densify
from .flops import FlopCounter
from .memory import Allocations

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class DryRun:
    """Arguments of a dry run, see ``cost.part_cost``.

    ``head``: the auxiliary that ``part.head`` names; its weights are not used and may be on the meta device. ``ahead``: number
    of micro-batches whose backward pass is outstanding at the same time, see ``training.ahead``. ``proxies``: by name, those of
    the part; they may be on the meta device too. ``objective``: see ``training.staged``.
    """

    submodel: SubModel
    example: tuple[Tensor, Tensor]
    training: Training
    loss: Loss
    entering_gradient: bool = True
    head: LinearHead | None = None
    ahead: int = 1
    proxies: Mapping[str, nn.Module] = field(default_factory=lambda: MappingProxyType({}))
    objective: str = "train"

    def module(self, name: str) -> nn.Module:
        """A block or a proxy."""
        return self.proxies[name] if name in self.proxies else self.submodel.blocks.modules[name]

    def prepare(self, batch: int) -> "TrialStep":
        """Set up a training step on ``batch`` copies of the example."""
        names, modules = self.submodel.spec.block_names, self.submodel.blocks.modules
        first = names.index(self.submodel.part.blocks[0])
        x, y = (
            t.unsqueeze(0).expand(batch, *t.shape).clone(memory_format=torch.contiguous_format) for t in self.example
        )
        with torch.no_grad(), autocast(self.training.precision):
            for name in names[:first]:
                x = functional_call(modules[name], self._state(modules[name], trained=False), (x,))
        if first > 0 and x.is_floating_point():
            x = x.detach().requires_grad_(self.entering_gradient)
        head = HeadCost(self.head, self.training) if self.head is not None else None
        states = {
            stage.name: self._state(self.module(stage.name), trained=stage.trained) for stage in self.submodel.stages
        }
        if self.training.frozen_precision == "bf16":
            for name in frozen_before(self.submodel.stages):
                states[name] = {key: _lowered(tensor) for key, tensor in states[name].items()}
        learned = {*self.submodel.part.trained_auxiliaries}
        for name in self.proxies.keys() - states.keys():  # one that imitates blocks of the part
            states[name] = self._state(self.proxies[name], trained=name in learned)
        return TrialStep(self, states, x, y, head)

    def _state(self, block: nn.Module, *, trained: bool) -> dict[str, Tensor]:
        """Copies of one block's tensors by name; tied ones share a copy, and those to be trained require gradients.

        Zeros in place of a tensor on the meta device: what a step costs does not depend on its values.
        """
        copies = dict[int, Tensor]()
        state = {}
        named = [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]
        for key, tensor in named:
            if id(tensor) not in copies:
                learns = trained and isinstance(tensor, nn.Parameter) and tensor.requires_grad
                like = tensor.detach()
                copy = torch.zeros_like(like, device=self.example[0].device) if like.is_meta else like.clone()
                copies[id(tensor)] = copy.requires_grad_(learns)
            state[key] = copies[id(tensor)]
        return state


class HeadCost:
    """Stands in for an auxiliary head: counts its cost without allocating its weights.

    A head on a large map can be larger than its model. ``flops`` and ``memory`` are replaced by the counters of the run.
    ``num_bytes``: bytes of the weights.
    """

    def __init__(self, head: LinearHead, training: Training) -> None:
        """Only the sizes of ``head`` are used."""
        self._products = head.in_features * head.out_features
        self._cast_bytes = 2 * self._products if training.precision == "bf16" else 0
        self._leaving, self._dtype = head.leaving, torch.bfloat16 if self._cast_bytes else None
        self.num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in head.parameters())
        self.flops, self.memory = FlopCounter(), Allocations()
        self._anchor = torch.zeros((), requires_grad=True)  # for a backward pass behind frozen blocks
        self._gradient: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Map [n, ...] to zeros of [n, *leaving]."""
        output: Tensor = _HeadFunction.apply(x, self._anchor, self)  # type: ignore[no-untyped-call]
        return output

    def forward(self, x: Tensor) -> tuple[Tensor, int | None]:
        """The output, and the number of the cast copy of the weights, which the backward pass frees."""
        self.flops.total += 2 * len(x) * self._products
        cast = self.memory.reserve(self._cast_bytes) if self._cast_bytes else None
        return x.new_zeros(len(x), *self._leaving, dtype=self._dtype or x.dtype), cast

    def backward(self, samples: int, cast: int | None, *, entering: bool) -> None:
        """Count the gradients of the weights and, if ``entering``, of the input."""
        self.flops.total += 2 * samples * self._products * (1 + entering)
        gradient = self.memory.reserve(self.num_bytes)
        if cast is not None:
            self.memory.release(cast)
        if self._gradient is None:
            self._gradient = gradient
        else:  # added to the gradient of earlier micro-batches
            self.memory.release(gradient)

    def forget_gradient(self) -> None:
        """Free the gradient of the weights."""
        if self._gradient is not None:
            self.memory.release(self._gradient)
            self._gradient = None


class _HeadFunction(torch.autograd.Function):
    """The node of a head in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, head: HeadCost) -> Tensor:
        output, cast = head.forward(x)
        ctx.head, ctx.cast, ctx.like = head, cast, (x.shape, x.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        shape, dtype = ctx.like
        entering = gradient.new_zeros(shape, dtype=dtype) if ctx.needs_input_grad[0] else None
        ctx.head.backward(shape[0], ctx.cast, entering=entering is not None)
        return entering, None, None


@dataclass(frozen=True)
class TrialStep:
    """One training step: copied state of each block, input and target of one batch, and the auxiliary head."""

    run: DryRun
    states: dict[str, dict[str, Tensor]]
    x: Tensor
    y: Tensor
    head: HeadCost | None

    def forward(self) -> Any:
        """The output of the last stage, or of the head; of a proxy that imitates blocks, its output and theirs."""
        stages, x, frozen = self.run.submodel.stages, self.x, self.run.training.frozen_precision
        with autocast(self.run.training.precision):
            if self.run.objective == "imitate":
                (student,) = self.states.keys() - {stage.name for stage in stages}
                before, blocks = entering(stages, blocks_of(student, self.run.submodel.spec.block_names))
                h = run_stages(before, self._call, x, frozen=frozen)
                return self._call(student, h), run_stages(blocks, self._call, h, frozen=frozen)
            x = run_stages(stages, self._call, x, learning=x.requires_grad, frozen=frozen)
        return x if self.head is None else self.head(x)

    def _call(self, name: str, x: Any) -> Any:
        """The output of one stage; of a trained one, recomputed in the backward pass under ``training.checkpointing``."""
        call = partial(call_with, self.run.module(name), self.states[name])
        trained = {*self.run.submodel.part.trained, *self.run.submodel.part.trained_auxiliaries}
        if self.run.training.checkpointing and name in trained and self.run.objective == "train":
            buffers = [self.states[name][key] for key, _ in self.run.module(name).named_buffers()]
            return recomputed(call, x, buffers=buffers, precision=self.run.training.precision)
        return call(x)

    def backward(self, output: Any) -> None:
        """Backward pass from the loss, or from the sum of the part's output; does nothing if nothing is trained."""
        if not self.trained and self.head is None:
            return
        stages = self.run.submodel.stages
        with autocast(self.run.training.precision):
            if self.run.objective == "imitate":
                value = imitation_loss(*output)
            elif self.head is not None or stages[-1].name in _last_stages(self.run.submodel):
                value = self.run.loss(output, self.y)
            else:
                value = torch.stack([t.sum() for t in tree_leaves(output) if isinstance(t, Tensor)]).sum()
        value.backward()  # type: ignore[no-untyped-call]
        densify(self.trained)

    def copied(self) -> "TrialStep":
        """Return the same step with copies of all tensors of the state."""
        tensors = {id(t): t for state in self.states.values() for t in state.values()}
        copies = {key: t.detach().clone().requires_grad_(t.requires_grad) for key, t in tensors.items()}
        states = {name: {key: copies[id(t)] for key, t in state.items()} for name, state in self.states.items()}
        return replace(self, states=states)

    def forget_gradients(self) -> None:
        """Free the gradients of the state."""
        for tensor in self.trained:
            tensor.grad = None

    @property
    def trained(self) -> list[Tensor]:
        """Tensors that get gradients."""
        return list({id(t): t for state in self.states.values() for t in state.values() if t.requires_grad}.values())


def _last_stages(submodel: SubModel) -> set[str]:
    """The stages whose output is the model's: the last block, and a proxy that stands for it."""
    last = submodel.spec.block_names[-1]
    ends = {name: replaced_by(name) for name in submodel.part.auxiliaries}
    return {last, *(name for name, end in ends.items() if end is not None and end[1] == last)}


def _lowered(tensor: Tensor) -> Tensor:
    """A weight in bfloat16, as frozen blocks hold it; others as they are."""
    return tensor.bfloat16() if tensor.dim() > 1 and tensor.is_floating_point() else tensor
