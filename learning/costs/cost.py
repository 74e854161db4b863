"""Cost of training a part: FLOPs, parameters, boundary size and peak memory, from training steps on two and four samples.

FLOPs are counted on the operations that are executed, so they are exact for the kinds that the counter supports: convolutions,
matrix products, attention and recurrent layers. Element-wise work is left out. A multiply-accumulate counts as two. ``memory``
documents what the memory figure covers, and how the peak of any batch size follows from two small ones.

The steps are executed on real tensors. (Fake tensors would save the computation, but importing them takes longer than these
steps, each operation is slower, and code that depends on values cannot run on them.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..data.batches import largest_micro_batch
from ..parts.auxiliaries import LinearHead
from ..parts.part import blocks_of, replaced_by
from ..parts.structure import frozen_modules
from ..parts.submodel import SubModel
from ..randomness import preserved_rng
from ..sparse.layers import trained_with
from ..spec import Optimiser, PartCost, Training
from .dry_run import DryRun, Loss, TrialStep
from .flops import FlopCounter
from .memory import Allocations, peak_of_batch, process_bytes
from .sparse_products import counted

SMALL, LARGE = 2, 4  # samples; batch normalisation cannot train on one


@dataclass(frozen=True)
class PartProfile:
    """Cost of a part for any batch size. FLOPs are per sample; ``boundary_items`` is as in ``PartCost``."""

    parameters: int
    forward_flops: int
    training_flops: int
    boundary_items: int
    small: Allocations
    large: Allocations

    def cost(self, training: Training) -> PartCost:
        """Cost under ``training``, which may differ from the profiled setting in its batch size alone."""
        batch = max(SMALL, largest_micro_batch(training.batch_size, training.accumulation))
        return PartCost(
            parameters=self.parameters,
            forward_flops=self.forward_flops,
            training_flops=self.training_flops,
            boundary_items=self.boundary_items,
            peak_memory_bytes=peak_of_batch(self.small, self.large, batch),
            process_memory_bytes=process_bytes(self.small, self.large, batch),
        )


def part_cost(
    submodel: SubModel,
    *,
    example: tuple[Tensor, Tensor],
    training: Training,
    loss: Loss,
    entering_gradient: bool = True,
    head: LinearHead | None = None,
    ahead: int = 1,
) -> PartCost:
    """Compute the cost of one part of a model, which is left unchanged.

    Args:
        submodel: neighbouring blocks. Frozen blocks before the first trained one run without gradients. The input of a part
            that does not begin with the model's first block is the output of the blocks before it.
        example: input and target of one sample, without batch dimension; any shape and type.
        training: ``peak_memory_bytes`` is for one full micro-batch of it (at least two samples, which is too much for a device
            that has fewer), its optimiser and its precision. With ``checkpointing`` each trained block is recomputed in the
            backward pass, which adds FLOPs.
        loss: ``loss(output, target)``, the mean over the batch. For a part without the model's last block the sum of its output
            is used instead.
        entering_gradient: whether the gradient of the part's input is computed.
        head: the auxiliary that ``part.head`` names, which is trained with the part; its output goes to the loss. It may be on
            the meta device.
        ahead: number of micro-batches whose backward pass is outstanding at the same time; each batch has its own copy
            of the weights (``training.ahead``).

    Raises:
        ValueError: if the part is not supported, or if the model or the loss fails on the example.
    """
    run = DryRun(submodel, example, training, loss, entering_gradient, head, ahead)
    return profile(run).cost(training)


def profile(run: DryRun) -> PartProfile:
    """Profile a part for batches of any size. Raises ``ValueError`` as ``part_cost`` does."""
    submodel = run.submodel
    _check(submodel, run.head)
    head_parameters = sum(parameter.numel() for parameter in run.head.parameters()) if run.head is not None else 0
    sparse = partial(trained_with, submodel.blocks.model, run.training.sparsity, counted)
    with preserved_rng(), _modes(submodel), _readable_errors(run):
        with sparse():
            small, forward_flops, training_flops, boundary_items = _measured(run, SMALL)
        with sparse():  # thresholds are found anew, so that both steps allocate the same
            large, *_ = _measured(run, LARGE)
    return PartProfile(
        parameters=submodel.parameters + head_parameters,
        forward_flops=forward_flops // SMALL,
        training_flops=training_flops // SMALL,
        boundary_items=boundary_items // SMALL,
        small=small,
        large=large,
    )


def _check(submodel: SubModel, head: nn.Module | None) -> None:
    part, names = submodel.part, submodel.spec.block_names
    submodel.spec.tensors_of(part.blocks)  # refuses unknown names
    covered = set(part.blocks)
    for auxiliary in part.auxiliaries:
        if replaced_by(auxiliary) is not None:
            covered |= set(blocks_of(auxiliary, names))
    start = names.index(part.blocks[0]) if part.blocks else 0
    neighbours = names[start : start + len(covered)]
    if not part.blocks or covered != set(neighbours) or part.blocks != tuple(n for n in names if n in part.blocks):
        raise ValueError(f"part.blocks is {part.blocks}; it must be neighbours, in order, of these: {', '.join(names)}")
    if extra := set(part.trained) - set(part.blocks):
        raise ValueError(f"part.trained names {min(extra)!r}, which is not in part.blocks: {', '.join(part.blocks)}")
    heads = tuple(name for name in part.auxiliaries if replaced_by(name) is None)
    if (head is None) != (not part.head) or heads != ((part.head,) if part.head else ()):
        raise ValueError(
            f"part has head {part.head!r} and {len(heads)} auxiliary heads; "
            f"costs are known with the model's own head, or one auxiliary head"
        )


@contextmanager
def _modes(submodel: SubModel) -> Iterator[None]:
    """Put trained blocks into training mode and the others into evaluation mode; all modes are restored afterwards."""
    blocks, trained = submodel.blocks, submodel.part.trained
    before = [(m, m.training) for block in (blocks.model, *blocks.modules.values()) for m in block.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see the products of its fused kernel
    try:
        for name, block in blocks.modules.items():
            block.train(name in trained)
            for module in frozen_modules(block):
                module.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in before:
            module.training = mode


@contextmanager
def _readable_errors(run: DryRun) -> Iterator[None]:
    """Turn any exception of the model or the loss into a ``ValueError`` that names shapes and types of the example."""
    try:
        yield
    except Exception as error:  # a user's code may raise anything
        x, y = run.example
        unusual = (x.is_floating_point() and x.dtype != torch.float32) or (
            not y.is_floating_point() and y.dtype != torch.int64
        )
        hint = "; most models and losses take float32 samples and int64 labels" if unusual else ""
        raise ValueError(
            f"the model and its loss fail on a sample of shape {tuple(x.shape)} ({x.dtype}) with target of shape "
            f"{tuple(y.shape)} ({y.dtype}): {type(error).__name__}: {error}{hint}"
        ) from error


def _measured(run: DryRun, batch: int) -> tuple[Allocations, int, int, int]:
    """Run one optimiser step, as after earlier steps: allocations, forward FLOPs, total FLOPs, elements of the output."""
    step, training = run.prepare(batch), run.training
    flops, memory = FlopCounter(), Allocations()
    if step.head is not None:
        step.head.flops, step.head.memory = flops, memory
    head_bytes = step.head.num_bytes if step.head is not None else 0
    trained_bytes = [*(t.nbytes for t in step.trained), *([head_bytes] if head_bytes else [])]
    with flops, memory:
        memory.add([t for state in step.states.values() for t in state.values()])
        memory.add([step.x, step.y])
        for num_bytes in [head_bytes, *(size for size in trained_bytes for _ in range(_slots(training.optimiser)))]:
            memory.reserve(num_bytes)
        if run.ahead == 1:
            output = step.forward()
            forward_flops, items = flops.total, _items(output)
            step.backward(output)
            training_flops = flops.total
            del output
            if training.accumulation > 1:
                # From the second micro-batch on, gradients exist while activations accumulate.
                step.backward(step.forward())
        else:
            if training.accumulation > 1:
                memory.reserve(sum(trained_bytes))  # the gradients of earlier micro-batches
            forward_flops, training_flops, items = _run_ahead(step, run, flops)
        if training.optimiser.proximal and trained_bytes:
            memory.release(memory.reserve(max(trained_bytes)))  # the step's one temporary: w - w_base
    return memory, forward_flops, training_flops, items


def _items(output: object) -> int:
    """Elements of all tensors in the output."""
    return sum(t.numel() for t in tree_leaves(output) if isinstance(t, Tensor))


def _run_ahead(step: TrialStep, run: DryRun, flops: FlopCounter) -> tuple[int, int, int]:
    """Run ``run.ahead`` forward passes, then their backward passes; every batch has its own copy of the weights.

    Returns forward FLOPs and total FLOPs of one micro-batch, and the elements of the output.
    """
    outstanding = []
    for number in range(run.ahead):
        if number % run.training.accumulation == 0:
            stashed = step.copied()
        outstanding.append((stashed, stashed.forward()))
    forward_flops, items = flops.total // run.ahead, _items(outstanding[0][1])
    while outstanding:
        stashed, output = outstanding.pop(0)
        stashed.backward(output)
        stashed.forget_gradients()
    return forward_flops, flops.total // run.ahead, items


def _slots(optimiser: Optimiser) -> int:
    """Copies of the trained tensors that the optimiser keeps, including FedProx's starting point."""
    slots = int(optimiser.momentum > 0) if optimiser.name == "sgd" else 2
    return slots + int(optimiser.proximal > 0)
