"""Evaluation of a model on a set of samples: mean loss and metrics, in evaluation mode, without gradients."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..data.types import Samples, Transform
from ..parts.module_state import ModuleState
from ..randomness import seeded
from ..resolve import told
from ..spec import Precision
from .losses import Loss, Metric, WrongShape, scalar_loss, summed_metric


class FigureError(RuntimeError):
    """The loss or a metric raised something; the message names both."""


def evaluate(
    model: nn.Module,
    samples: Samples,
    *,
    loss: Loss,
    metrics: Mapping[str, Metric],
    transform: Transform,
    batch_size: int = 256,
    channels_last: bool = False,
    precision: Precision = "float32",
) -> dict[str, float]:
    """``{"loss": ..., metric: ...}``, each a mean over all samples; the model is left in evaluation mode, else as it was.

    Batches are as equal as can be, of ``batch_size`` at most: a last batch of one sample has no statistics, for models that
    normalise by the batch at hand. ``precision``: of the forward pass; losses and metrics are float32. Random transforms, and
    models that draw in evaluation, see the same random numbers each time. Raises ``ValueError`` when there are no samples, and
    for a loss or a metric of the wrong shape (``WrongShape``); ``FigureError`` for one that fails.
    """
    count = len(samples)
    if count == 0:
        raise ValueError("evaluation needs at least one sample")
    model.eval()
    totals = dict.fromkeys(["loss", *metrics], 0.0)
    assert len(totals) == 1 + len(metrics), "a metric may not be called loss"
    generator = torch.Generator().manual_seed(0)
    state = ModuleState(model, values=True)  # a model may count its calls, or average what it sees
    try:
        with torch.inference_mode(), seeded(0):
            for indices in np.array_split(np.arange(count), -(-count // batch_size)):
                batch = samples.take(indices)
                inputs = transform(batch.x, generator)
                output = predict(model, inputs, channels_last=channels_last, precision=precision)
                for name, value in figures(output, batch.y, loss=loss, metrics=metrics).items():
                    totals[name] += value
    finally:
        state.restore()
    return {name: total / count for name, total in totals.items()}


def predict(model: nn.Module, inputs: Tensor, *, channels_last: bool, precision: Precision) -> Tensor:
    """What the model makes of a batch, in float32 where it computes in bf16."""
    if channels_last and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        output: Tensor = model(inputs)
    return output.float() if precision == "bf16" else output


def figures(output: Tensor, targets: Tensor, *, loss: Loss, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Sums over the samples of a batch, of the loss and of each metric. Raises ``FigureError``, ``WrongShape``."""
    size, found, name = len(targets), dict[str, float](), "training.loss"
    try:
        found["loss"] = float(scalar_loss(loss(output, targets))) * size
        for metric, function in metrics.items():
            name = f"metric {metric!r}"
            found[metric] = summed_metric(function(output, targets), samples=size, name=metric)
    except (MemoryError, WrongShape):
        raise
    except Exception as error:  # of a user's code: anything
        raise FigureError(f"{name} fails: {told(error)}") from error
    return found
