"""What training a part costs: FLOPs, parameters, boundary size and peak memory, from a dry run on fake tensors.

FLOPs are counted on the operations that really run, so they are exact for what the counter knows: convolutions, matrix
products, attention and recurrent layers. Element-wise work is left out. A multiply-accumulate is two. What the memory figure
means, and what it leaves out, is told in ``learning.memory``.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from .blocks import Blocks
from .dry_run import DryRun, Loss
from .flops import flop_counter
from .memory import LiveTensors
from .part import Part
from .spec import Optimiser, PartCost, Training
from .structure import ModelSpec

FLOP_BATCH = 2  # batch normalisation refuses to train on one sample


def part_cost(
    model: nn.Module, blocks: Blocks, part: Part, *, example: tuple[Tensor, Tensor], training: Training, loss: Loss
) -> PartCost:
    """Cost of one part of ``model``, which ``blocks`` cuts.

    ``example``: one sample of the data, input and target, without batch dimension; any shape and type. A part that does not
    begin with the model's first block gets what the blocks before it make of the input, and makes a gradient for it.
    ``loss``: mean over the batch, as ``loss(output, target)``; a part without the model's last block has none, and its output
    is summed instead. Frozen blocks before the first trained one run without gradients.

    ``peak_memory_bytes`` is for one micro-batch of ``training`` (two samples at least), its optimiser and its precision;
    under ``checkpointing`` each trained block is recomputed in the backward pass, which costs FLOPs.

    Nothing is allocated, unless the model or the loss decides by the values of tensors: then the run is repeated on real
    ones. Raises ``ValueError`` for a part that is not a stretch of neighbouring blocks at full width, and when the model or
    the loss fails on the example.
    """
    assert blocks.model is model
    _check(blocks, part)
    spec = ModelSpec(tuple(block for block in blocks.spec.blocks if block.name in part.blocks))
    run = DryRun(blocks, part, example, training, loss)
    with _modes(blocks, part), torch.random.fork_rng(devices=[]):
        try:
            with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
                figures = _figures(replace(run, convert=fake.from_tensor))
        except Exception:  # fake tensors have no values to decide by; a genuine error comes again on real ones
            figures = _figures_for_real(run)
    return PartCost(parameters=spec.parameters, **figures)


def _check(blocks: Blocks, part: Part) -> None:
    names = blocks.spec.block_names
    blocks.spec.tensors_of(part.blocks)  # refuses unknown names
    start = names.index(part.blocks[0]) if part.blocks else 0
    if not part.blocks or part.blocks != names[start : start + len(part.blocks)]:
        raise ValueError(f"part.blocks is {part.blocks}; it must be neighbours, in order, of these: {', '.join(names)}")
    if extra := set(part.trained) - set(part.blocks):
        raise ValueError(f"part.trained names {min(extra)!r}, which is not in part.blocks: {', '.join(part.blocks)}")
    if part.width != 1 or part.head or part.auxiliaries:
        raise ValueError(
            f"part has width {part.width:g}, head {part.head!r} and {len(part.auxiliaries)} auxiliaries; "
            f"costs are known for width 1 with the model's own head only"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log of an operation that failed on fake tensors: what matters of it is raised again on real ones."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _modes(blocks: Blocks, part: Part) -> Iterator[None]:
    """Trained blocks in training mode, the others in evaluation mode; afterwards all as they were."""
    before = [(m, m.training) for block in (blocks.model, *blocks.modules.values()) for m in block.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel hides its products from the counter
    try:
        for name, block in blocks.modules.items():
            block.train(name in part.trained)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in before:
            module.training = mode


def _figures(run: DryRun) -> dict[str, int]:
    """The fields of ``PartCost`` that a dry run finds."""
    step = run.prepare(FLOP_BATCH)
    with flop_counter() as counter:
        output = step.forward()
        forward_flops = counter.get_total_flops()
        step.backward(output)
    boundary_items = sum(t.numel() for t in tree_leaves(output) if isinstance(t, Tensor))
    return {
        "forward_flops": forward_flops // FLOP_BATCH,
        "training_flops": counter.get_total_flops() // FLOP_BATCH,
        "boundary_items": boundary_items // FLOP_BATCH,
        "peak_memory_bytes": _peak_memory(run),
    }


def _figures_for_real(run: DryRun) -> dict[str, int]:
    try:
        return _figures(run)
    except Exception as error:
        (x, y) = run.example
        raise ValueError(
            f"the model and its loss fail on a sample of shape {tuple(x.shape)} ({x.dtype}) with target of shape "
            f"{tuple(y.shape)} ({y.dtype}): {type(error).__name__}: {error}"
        ) from error


def _peak_memory(run: DryRun) -> int:
    """Peak of live bytes over one optimiser step, with the state that earlier steps have left."""
    training = run.training
    step = run.prepare(max(FLOP_BATCH, -(-training.batch_size // training.accumulation)))
    with LiveTensors() as memory:
        memory.add([t for state in step.states.values() for t in state.values()])
        memory.add([step.x, step.y])
        kept = [torch.empty_like(t) for t in step.trained for _ in range(_slots(training.optimiser))]
        # From the second micro-batch on, gradients are there already while activations pile up.
        for _ in range(min(training.accumulation, 2)):
            step.backward(step.forward())
        if training.optimiser.proximal and step.trained:
            memory.add([torch.empty_like(max(step.trained, key=Tensor.numel))])  # the step's one temporary: w - w_base
        del kept
    return int(memory.peak_bytes)


def _slots(optimiser: Optimiser) -> int:
    """Copies of the trained tensors that the optimiser keeps, with FedProx's starting point."""
    slots = int(optimiser.momentum > 0) if optimiser.name == "sgd" else 2
    return slots + int(optimiser.proximal > 0)
