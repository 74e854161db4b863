"""What training a part costs: FLOPs, parameters, boundary size and peak memory, from a dry run on fake tensors.

FLOPs are counted on the operations that really run, so they are exact for what the counter knows: convolutions, matrix
products, attention and recurrent layers. Element-wise work is left out. A multiply-accumulate is two. What the memory figure
means, and what it leaves out, is told in ``learning.memory``.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves

from .blocks import Blocks
from .data.batches import largest_micro_batch
from .dry_run import DryRun, Loss, Step
from .flops import flop_counter
from .frozen import frozen_modules
from .memory import LiveTensors
from .part import Part
from .randomness import undisturbed
from .spec import Optimiser, PartCost, Training
from .structure import ModelSpec

_BEYOND_FAKES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
FLOP_BATCH = 2  # batch normalisation refuses to train on one sample


def part_cost(
    model: nn.Module,
    blocks: Blocks,
    part: Part,
    *,
    example: tuple[Tensor, Tensor],
    training: Training,
    loss: Loss,
    entering_gradient: bool = True,
    head: nn.Module | None = None,
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

    Nothing is allocated, with two exceptions. Where the model or the loss decides by the values of tensors, or does what
    fake ones cannot, the run is repeated on real ones. Where types other than float32, and int64 targets, take part, one
    step of two samples is: fake tensors do not mind when operands of different types meet. Raises ``ValueError`` for a part
    that is not a stretch of neighbouring blocks at full width, and when the model or the loss fails on the example.
    """
    assert blocks.model is model
    _check(blocks, part, head)
    spec = ModelSpec(tuple(block for block in blocks.spec.blocks if block.name in part.blocks))
    run = DryRun(blocks, part, example, training, loss, entering_gradient, head, ahead)
    with undisturbed(), _modes(blocks, part):
        try:
            with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
                figures = _figures(replace(run, convert=fake.from_tensor))
        except Exception as error:  # of a user's code: anything
            if not _beyond_fakes(error):
                _try_for_real(run)  # raises in torch's own words, when it is the model's fault
                text = f"the model fails on fake tensors only, and is run on real ones: {type(error).__name__}: {error}"
                warnings.warn(text, stacklevel=2)
            with _clearly(run):
                figures = _figures(run)
        else:
            if _unusual_types(run):
                _try_for_real(run)
    beside = sum(parameter.numel() for parameter in head.parameters()) if head is not None else 0
    return PartCost(parameters=spec.parameters + beside, **figures)


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
            for module in frozen_modules(block):
                module.eval()
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


def _beyond_fakes(error: Exception) -> bool:
    """Whether it is what torch raises where fake tensors cannot go on: no values, no known shape, no rule for an operation.

    Four types of its own (tried on 2.13); a plain ``RuntimeError`` or ``TypeError`` from ``.numpy()`` and ``format``.
    """
    named = type(error) in (RuntimeError, TypeError) and any(
        words in str(error) for words in ("tensor subclasses", "FakeTensor")
    )
    return isinstance(error, _BEYOND_FAKES) or named


def _unusual_types(run: DryRun) -> bool:
    """Whether types meet that may not go together."""
    x, y = run.example
    state = run.blocks.model.state_dict().values()
    floats = {tensor.dtype for tensor in state if tensor.is_floating_point()}
    return floats | {x.dtype} != {torch.float32} or y.dtype not in (torch.float32, torch.int64)


def _try_for_real(run: DryRun) -> None:
    """One training step on real samples, so few that the largest model has room for them."""
    with _clearly(run):
        step = run.prepare(FLOP_BATCH)
        step.backward(step.forward())


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


def _peak_memory(run: DryRun) -> int:
    """Peak of live bytes over one optimiser step, with the state that earlier steps have left."""
    training = run.training
    step = run.prepare(max(FLOP_BATCH, largest_micro_batch(training.batch_size, training.accumulation)))
    with LiveTensors() as memory:
        memory.add([t for state in step.states.values() for t in state.values()])
        memory.add([step.x, step.y])
        kept = [torch.empty_like(t) for t in step.trained for _ in range(_slots(training.optimiser))]
        # From the second micro-batch on, gradients are there already while activations pile up.
        for _ in range(min(training.accumulation, 2) if run.ahead == 1 else 0):
            step.backward(step.forward())
        if run.ahead > 1:
            if training.accumulation > 1:
                kept += [torch.empty_like(t) for t in step.trained]  # the gradients of earlier micro-batches
            _run_ahead(step, run)
        if training.optimiser.proximal and step.trained:
            memory.add([torch.empty_like(max(step.trained, key=Tensor.numel))])  # the step's one temporary: w - w_base
        del kept
    return int(memory.peak_bytes)


def _run_ahead(step: Step, run: DryRun) -> None:
    """As many forward passes as may be out, then their backward passes. The weights change with every batch."""
    out = []
    for number in range(run.ahead):
        if number % run.training.accumulation == 0:
            stashed = step.copied()
        out.append((stashed, stashed.forward()))
    while out:
        stashed, output = out.pop(0)
        stashed.backward(output)
        stashed.forget_gradients()


def _slots(optimiser: Optimiser) -> int:
    """Copies of the trained tensors that the optimiser keeps, with FedProx's starting point."""
    slots = int(optimiser.momentum > 0) if optimiser.name == "sgd" else 2
    return slots + int(optimiser.proximal > 0)
