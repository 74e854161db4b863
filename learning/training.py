"""Local training: what one device does with its part and its samples.

    for every batch of the plan's order:
        gradient of loss(part(x), y) [+ mu/2 ||w - w_base||^2], [clipped]; one optimiser step

The bracketed term is FedProx's (Li et al., MLSys 2020, arXiv 1812.06127, eq. 2). Its gradient mu (w - w_base) is added by
hand, which spares autograd a copy of the model; the losses that are reported leave it out, to compare with other methods.

Nothing is kept between calls: optimiser state, batch order and dropout all start from the plan's settings and seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .data.batches import batches
from .data.types import Samples, Transform
from .losses import Loss, scalar_loss
from .optimisers import make_optimiser
from .randomness import seeded
from .spec import Optimiser, Training


@dataclass(frozen=True)
class TrainingResult:
    """What training saw; both losses are None when it made no step.

    ``steps``: optimiser steps. ``processed``: samples, repeats counted. ``loss``: mean per sample. ``loss_square``: mean over
    the samples of their batch's squared loss.
    """

    steps: int = 0
    processed: int = 0
    loss: float | None = None
    loss_square: float | None = None


def train(
    model: nn.Module,
    samples: Samples,
    *,
    training: Training,
    loss: Loss,
    transform: Transform,
    seed: int,
    trainable: Sequence[str] | None = None,
) -> TrainingResult:
    """Train ``model`` in place on ``samples``; without samples, or without anything to train, it is left as it is.

    ``trainable``: names of the parameters and buffers that are trained (None: all). The other parameters get
    ``requires_grad`` off, and modules that hold tensors, but none of those named, stay in evaluation mode, so that frozen
    normalisation does not drift; a module without tensors (dropout) goes with the module that contains it. The process's
    random state is left as it was found, and no gradient is kept. Raises ``ValueError`` for a loss that is no scalar.
    """
    parameters = _choose(model, trainable)
    if not parameters or not len(samples):
        return TrainingResult()
    optimiser = make_optimiser(training.optimiser, parameters)
    base = [p.detach().clone() for p in parameters] if training.optimiser.proximal else []
    steps = processed = 0
    total = total_square = 0.0
    order = batches(
        len(samples), batch_size=training.batch_size, epochs=training.epochs, steps=training.steps, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):  # for dropout, which takes no generator
        try:
            for indices in order:
                optimiser.zero_grad(set_to_none=True)
                value = 0.0
                for part, share in _micro_batches(indices, training.accumulation):
                    batch = samples.take(part)
                    value += share * _backward(
                        model, transform(batch.x, generator), batch.y, training=training, loss=loss, share=share
                    )
                _adjust_gradients(parameters, base, settings=training.optimiser)
                optimiser.step()
                steps += 1
                processed += len(indices)
                total += value * len(indices)
                total_square += value**2 * len(indices)
        finally:  # also when the loss raises or memory runs out: who trains next may train other parameters
            optimiser.zero_grad(set_to_none=True)
    if not steps:
        return TrainingResult()
    return TrainingResult(steps, processed, total / processed, total_square / processed)


def _backward(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, training: Training, loss: Loss, share: float
) -> float:
    """Add ``share`` of a micro-batch's gradient to what has accumulated; its loss."""
    if training.channels_last and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.precision == "bf16"):
        value = scalar_loss(loss(model(inputs), targets))
    (value * share if share != 1 else value).backward()  # type: ignore[no-untyped-call]
    return float(value.detach())


def _adjust_gradients(parameters: list[nn.Parameter], base: list[Tensor], *, settings: Optimiser) -> None:
    """FedProx's term, where ``base`` is given; then clipping of the whole."""
    for parameter, start in zip(parameters, base, strict=bool(base)):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start, alpha=settings.proximal)
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)


def _choose(model: nn.Module, trainable: Sequence[str] | None) -> list[nn.Parameter]:
    """Switch gradients and modes as ``trainable`` says; the parameters to train."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    wanted = tensors.keys() if trainable is None else set(trainable)
    assert wanted <= tensors.keys(), f"not in the model: {sorted(wanted - tensors.keys())}"
    chosen = {id(tensor) for name, tensor in tensors.items() if name in wanted}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    model.train()
    for module in model.modules():  # containers first, so that what is inside decides for itself
        own = [*module.parameters(), *module.buffers()]
        if own and not any(id(tensor) in chosen for tensor in own):
            module.eval()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _micro_batches(indices: NDArray[np.intp], count: int) -> Iterator[tuple[NDArray[np.intp], float]]:
    """Split a batch into at most ``count`` parts of about equal size, each with its share of the batch."""
    for part in np.array_split(indices, min(count, len(indices))):
        yield part, len(part) / len(indices)
