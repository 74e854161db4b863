"""Local training: what one device does with its part and its samples.

    for every batch of the plan's order:
        loss = loss(part(x), y) [+ mu/2 ||w - w_base||^2]      FedProx
        gradients [clipped], one optimiser step

Nothing is kept between calls: optimiser state, batch order and dropout all start from the plan's settings and seed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .data.batches import batches
from .data.types import Samples
from .losses import Loss
from .optimisers import make_optimiser
from .spec import Training

Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class TrainingResult:
    """What training saw: optimiser steps, samples processed (repeats counted), mean loss per sample, mean squared loss."""

    steps: int
    processed: int
    loss: float | None
    loss_square: float | None


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
    """Train ``model`` in place on ``samples``.

    ``trainable``: names of the parameters to train (None: all); the others keep ``requires_grad`` off, and modules that
    hold none of the trained ones stay in evaluation mode, so that frozen normalisation does not drift. The process's
    random state is left as it was found.
    """
    named = dict(model.named_parameters())
    chosen = list(named) if trainable is None else [name for name in named if name in set(trainable)]
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    parameters = [named[name] for name in chosen]
    _set_modes(model)
    if not parameters:
        return TrainingResult(steps=0, processed=0, loss=None, loss_square=None)
    optimiser = make_optimiser(training.optimiser, parameters)
    mu, clip = training.optimiser.proximal, training.optimiser.clip_norm
    base = [p.detach().clone() for p in parameters] if mu else []
    steps = processed = 0
    total = total_square = 0.0
    layout = torch.channels_last if training.channels_last else torch.preserve_format
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout has no generator argument
        generator = torch.Generator().manual_seed(seed)
        for chosen_indices in _order(len(samples), training=training, seed=seed):
            optimiser.zero_grad(set_to_none=True)
            batch_loss = 0.0
            for part, share in _micro_batches(chosen_indices, training.accumulation):
                batch = samples.take(part)
                inputs = transform(batch.x, generator)
                if training.channels_last and inputs.dim() == 4:
                    inputs = inputs.contiguous(memory_format=layout)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.precision == "bf16"):
                    value = loss(model(inputs), batch.y)
                (value * share if share != 1 else value).backward()  # type: ignore[no-untyped-call]
                batch_loss += float(value.detach()) * share
            if mu:
                for parameter, start in zip(parameters, base, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter.detach() - start, alpha=mu)
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimiser.step()
            steps += 1
            processed += len(chosen_indices)
            total += batch_loss * len(chosen_indices)
            total_square += batch_loss**2 * len(chosen_indices)
    if not processed:
        return TrainingResult(steps=0, processed=0, loss=None, loss_square=None)
    return TrainingResult(
        steps=steps, processed=processed, loss=total / processed, loss_square=total_square / processed
    )


def _order(num_samples: int, *, training: Training, seed: int) -> Iterator[np.ndarray]:
    """Indices of each batch."""
    if num_samples == 0:
        return iter(())
    return batches(num_samples, batch_size=training.batch_size, epochs=training.epochs, steps=training.steps, seed=seed)


def _micro_batches(indices: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, float]]:
    """Split a batch into at most ``count`` parts of about equal size, each with its share of the batch."""
    for part in np.array_split(indices, min(count, len(indices))):
        yield part, len(part) / len(indices)


def _set_modes(model: nn.Module) -> None:
    """Training mode where something is trained, evaluation mode where all is frozen."""
    model.train()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()
