"""What training a part costs: FLOPs, parameters, boundary size and peak memory, from training steps on two and four samples.

FLOPs are counted on the operations that really run, so they are exact for what the counter knows: convolutions, matrix
products, attention and recurrent layers. Element-wise work is left out. A multiply-accumulate is two. What the memory figure
means, and what it leaves out, is told in ``learning.memory``, and how the peak of any batch follows from two small ones.

The steps are real ones. (Fake tensors would compute nothing at all, but importing what they need takes longer than these steps,
they are slower for each operation, and code that looks at values cannot run on them.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..data.batches import largest_micro_batch
from ..parts.auxiliaries import LinearHead
from ..parts.blocks import Blocks
from ..parts.frozen import frozen_modules
from ..parts.part import Part
from ..parts.structure import ModelSpec
from ..randomness import undisturbed
from ..spec import Optimiser, PartCost, Training
from .dry_run import DryRun, Loss, TrialStep
from .flops import FlopCounter
from .memory import Allocations, peak_of_batch

SMALL, LARGE = 2, 4  # samples; batch normalisation refuses to train on one


@dataclass(frozen=True)
class PartProfile:
    """What a part costs with batches of any size. FLOPs are per sample; ``boundary_items``: as in ``PartCost``."""

    parameters: int
    forward_flops: int
    training_flops: int
    boundary_items: int
    small: Allocations
    large: Allocations

    def cost(self, training: Training) -> PartCost:
        """With the micro-batches of a training setting that differs in its batch size alone."""
        batch = max(SMALL, largest_micro_batch(training.batch_size, training.accumulation))
        return PartCost(
            parameters=self.parameters,
            forward_flops=self.forward_flops,
            training_flops=self.training_flops,
            boundary_items=self.boundary_items,
            peak_memory_bytes=peak_of_batch(self.small, self.large, batch),
        )


def part_cost(
    model: nn.Module,
    blocks: Blocks,
    part: Part,
    *,
    example: tuple[Tensor, Tensor],
    training: Training,
    loss: Loss,
    entering_gradient: bool = True,
    head: LinearHead | None = None,
    ahead: int = 1,
) -> PartCost:
    """Cost of one part of ``model``, which ``blocks`` cuts.

    ``example``: one sample of the data, input and target, without batch dimension; any shape and type. A part that does not
    begin with the model's first block gets what the blocks before it make of the input, and makes a gradient for it if
    ``entering_gradient``.
    ``head``: the auxiliary that ``part.head`` names, which is trained with the part; what leaves it goes to the loss. It may be
    on the meta device.
    ``loss``: mean over the batch, as ``loss(output, target)``; a part without the model's last block has none, and its output
    is summed instead. Frozen blocks before the first trained one run without gradients.

    ``peak_memory_bytes`` is for one full micro-batch of ``training`` (two samples at least; too much for a device that has
    fewer), its optimiser and its precision; with ``ahead`` above 1, for as many that have gone forward and not yet back, with
    the weights of each (``learning.ahead``). Under ``checkpointing`` each trained block is recomputed in the backward pass,
    which costs FLOPs.

    Raises ``ValueError`` for a part that is not a stretch of neighbouring blocks at full width, and when the model or the loss
    fails on the example.
    """
    assert blocks.model is model
    run = DryRun(blocks, part, example, training, loss, entering_gradient, head, ahead)
    return profile(run).cost(training)


def profile(run: DryRun) -> PartProfile:
    """The cost of a part with batches of any size. Raises ``ValueError`` as ``part_cost`` does."""
    blocks, part = run.blocks, run.part
    _check(blocks, part, run.head)
    spec = ModelSpec(tuple(block for block in blocks.spec.blocks if block.name in part.blocks))
    beside = sum(parameter.numel() for parameter in run.head.parameters()) if run.head is not None else 0
    with undisturbed(), _modes(blocks, part), _clearly(run):
        small, forward_flops, training_flops, boundary_items = _measured(run, SMALL)
        large, *_ = _measured(run, LARGE)
    return PartProfile(
        parameters=spec.parameters + beside,
        forward_flops=forward_flops // SMALL,
        training_flops=training_flops // SMALL,
        boundary_items=boundary_items // SMALL,
        small=small,
        large=large,
    )


def _check(blocks: Blocks, part: Part, head: nn.Module | None) -> None:
    names = blocks.spec.block_names
    blocks.spec.tensors_of(part.blocks)  # refuses unknown names
    start = names.index(part.blocks[0]) if part.blocks else 0
    if not part.blocks or part.blocks != names[start : start + len(part.blocks)]:
        raise ValueError(f"part.blocks is {part.blocks}; it must be neighbours, in order, of these: {', '.join(names)}")
    if extra := set(part.trained) - set(part.blocks):
        raise ValueError(f"part.trained names {min(extra)!r}, which is not in part.blocks: {', '.join(part.blocks)}")
    if (head is None) != (not part.head) or part.auxiliaries != ((part.head,) if part.head else ()) or part.width != 1:
        raise ValueError(
            f"part has width {part.width:g}, head {part.head!r} and {len(part.auxiliaries)} auxiliaries; "
            f"costs are known for width 1 with the model's own head, or one auxiliary head"
        )


@contextmanager
def _modes(blocks: Blocks, part: Part) -> Iterator[None]:
    """Trained blocks in training mode, the others in evaluation mode; afterwards all as they were."""
    before = [(m, m.training) for block in (blocks.model, *blocks.modules.values()) for m in block.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel hides its products from the counter
    try:
        for name, block in blocks.modules.items():
            block.train(name in part.trained)
            for module in frozen_modules(block):
                module.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in before:
            module.training = mode


@contextmanager
def _clearly(run: DryRun) -> Iterator[None]:
    """What the model or the loss raises, with what it was given, as one ``ValueError``."""
    try:
        yield
    except Exception as error:  # of a user's code: anything
        x, y = run.example
        odd = (x.is_floating_point() and x.dtype != torch.float32) or (
            not y.is_floating_point() and y.dtype != torch.int64
        )
        hint = "; most models and losses take float32 samples and int64 labels" if odd else ""
        raise ValueError(
            f"the model and its loss fail on a sample of shape {tuple(x.shape)} ({x.dtype}) with target of shape "
            f"{tuple(y.shape)} ({y.dtype}): {type(error).__name__}: {error}{hint}"
        ) from error


def _measured(run: DryRun, batch: int) -> tuple[Allocations, int, int, int]:
    """One optimiser step with the state that earlier steps have left: memory, FLOPs forward and of all, items that leave."""
    step, training = run.prepare(batch), run.training
    flops, memory = FlopCounter(), Allocations()
    if step.head is not None:
        step.head.flops, step.head.memory = flops, memory
    head_bytes = step.head.num_bytes if step.head is not None else 0
    trained_bytes = [*(t.nbytes for t in step.trained), *([head_bytes] if head_bytes else [])]
    with flops, memory:
        memory.add([t for state in step.states.values() for t in state.values()])
        memory.add([step.x, step.y])
        for num_bytes in [head_bytes, *(each for each in trained_bytes for _ in range(_slots(training.optimiser)))]:
            memory.reserve(num_bytes)
        if run.ahead == 1:
            output = step.forward()
            forward_flops, items = flops.total, _items(output)
            step.backward(output)
            training_flops = flops.total
            del output
            if training.accumulation > 1:
                # From the second micro-batch on, gradients are there while activations pile up.
                step.backward(step.forward())
        else:
            if training.accumulation > 1:
                memory.reserve(sum(trained_bytes))  # the gradients of earlier micro-batches
            forward_flops, training_flops, items = _run_ahead(step, run, flops)
        if training.optimiser.proximal and trained_bytes:
            memory.release(memory.reserve(max(trained_bytes)))  # the step's one temporary: w - w_base
    return memory, forward_flops, training_flops, items


def _items(output: object) -> int:
    """Elements of all tensors that leave the part."""
    return sum(t.numel() for t in tree_leaves(output) if isinstance(t, Tensor))


def _run_ahead(step: TrialStep, run: DryRun, flops: FlopCounter) -> tuple[int, int, int]:
    """As many forward passes as may be out, then their backward passes. The weights change with every batch.

    FLOPs forward and of all of one micro-batch, and items that leave.
    """
    out = []
    for number in range(run.ahead):
        if number % run.training.accumulation == 0:
            stashed = step.copied()
        out.append((stashed, stashed.forward()))
    forward_flops, items = flops.total // run.ahead, _items(out[0][1])
    while out:
        stashed, output = out.pop(0)
        stashed.backward(output)
        stashed.forget_gradients()
    return forward_flops, flops.total // run.ahead, items


def _slots(optimiser: Optimiser) -> int:
    """Copies of the trained tensors that the optimiser keeps, with FedProx's starting point."""
    slots = int(optimiser.momentum > 0) if optimiser.name == "sgd" else 2
    return slots + int(optimiser.proximal > 0)
