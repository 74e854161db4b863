"""Local training: what one device does with its part and its samples.

    for every batch of the plan's order:
        loss = loss(part(x), y) [+ mu/2 ||w - w_base||^2]      FedProx
        gradients [clipped], one optimiser step

Nothing is kept between calls: optimiser state, batch order and dropout all start from the plan's settings and seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .data.batches import batches
from .data.types import Samples, Transform
from .losses import Loss
from .optimisers import make_optimiser
from .randomness import seeded
from .spec import Training

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
    base = [p.detach().clone() for p in parameters] if mu else []  # FedProx pulls towards these
    seen = _Seen()
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):  # dropout
        for indices in _order(len(samples), training=training, seed=seed):
            optimiser.zero_grad(set_to_none=True)
            value = 0.0
            for part, share in _micro_batches(indices, training.accumulation):
                value += _backward(model, samples.take(part), training, loss, transform, generator, share=share)
            for parameter, start in zip(parameters, base, strict=False):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - start, alpha=mu)
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimiser.step()
            seen.note(value, samples=len(indices))
    return seen.result()


def _backward(
    model: nn.Module,
    batch: Samples,
    training: Training,
    loss: Loss,
    transform: Transform,
    generator: torch.Generator,
    *,
    share: float,
) -> float:
    """Add the gradients of one micro-batch, which is ``share`` of its batch; its loss, times its share."""
    inputs = transform(batch.x, generator)
    if training.channels_last and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.precision == "bf16"):
        value = loss(model(inputs), batch.y)
    (value * share if share != 1 else value).backward()  # type: ignore[no-untyped-call]
    return float(value.detach()) * share


class _Seen:
    """Running totals of one training."""

    def __init__(self) -> None:
        self.steps = self.processed = 0
        self.total = self.total_square = 0.0

    def note(self, loss: float, *, samples: int) -> None:
        self.steps += 1
        self.processed += samples
        self.total += loss * samples
        self.total_square += loss**2 * samples

    def result(self) -> TrainingResult:
        if not self.processed:
            return TrainingResult(steps=0, processed=0, loss=None, loss_square=None)
        return TrainingResult(
            steps=self.steps,
            processed=self.processed,
            loss=self.total / self.processed,
            loss_square=self.total_square / self.processed,
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
