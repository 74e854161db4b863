"""Evaluation of a model on a set of samples: mean loss and metrics, in evaluation mode, without gradients."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..data.types import Samples, Transform
from ..parts.module_state import ModuleState
from ..randomness import seeded
from ..resolve import error_line
from ..spec import Layout, Precision
from .losses import Loss, Metric, WrongShape, scalar_loss, summed_metric
from .precision import autocast, in_layout


class FigureError(RuntimeError):
    """The loss or a metric raised an exception; the message names the function and the exception."""


def evaluate(
    model: nn.Module,
    samples: Samples,
    *,
    loss: Loss,
    metrics: Mapping[str, Metric],
    transform: Transform,
    batch_size: int = 256,
    layout: Layout = "contiguous",
    precision: Precision = "float32",
) -> dict[str, float]:
    """Return ``{"loss": ..., metric: ...}``, each a mean over all samples.

    The model is left in evaluation mode and otherwise unchanged. Batches have nearly equal sizes of at most ``batch_size``,
    since a last batch of one sample would have no statistics for models that normalise by the current batch. ``precision`` is
    that of the forward pass; losses and metrics are computed in float32. Random transforms, and models that draw random numbers
    in evaluation, get the same random numbers at every call.

    Raises:
        ValueError: if there are no samples, or if a loss or a metric has the wrong shape (``WrongShape``).
        FigureError: if a loss or a metric raises.
    """
    count = len(samples)
    if count == 0:
        raise ValueError("evaluation needs at least one sample")
    model.eval()
    totals = dict.fromkeys(["loss", *metrics], 0.0)
    assert len(totals) == 1 + len(metrics), "a metric may not be called loss"
    generator = torch.Generator().manual_seed(0)
    state = ModuleState(
        model, values=True
    )  # evaluation may change attributes of the model, such as counters or averages
    try:
        with torch.inference_mode(), seeded(0):
            for indices in np.array_split(np.arange(count), -(-count // batch_size)):
                batch = samples.take(indices)
                inputs = transform(batch.x, generator)
                output = predict(model, inputs, layout=layout, precision=precision)
                for name, value in figures(output, batch.y, loss=loss, metrics=metrics).items():
                    totals[name] += value
    finally:
        state.restore()
    return {name: total / count for name, total in totals.items()}


def predict(model: nn.Module, inputs: Tensor, *, layout: Layout, precision: Precision) -> Tensor:
    """Run the model on a batch; the output of bf16 autocast is converted to float32."""
    inputs = in_layout(inputs, layout)
    with autocast(precision):
        output: Tensor = model(inputs)
    return output.float() if precision == "bf16" else output


def figures(output: Tensor, targets: Tensor, *, loss: Loss, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Sums of the loss and of each metric over the samples of a batch. Raises ``FigureError`` and ``WrongShape``."""
    size, sums, name = len(targets), dict[str, float](), "training.loss"
    try:
        sums["loss"] = float(scalar_loss(loss(output, targets))) * size
        for metric, function in metrics.items():
            name = f"metric {metric!r}"
            sums[metric] = summed_metric(function(output, targets), samples=size, name=metric)
    except (MemoryError, WrongShape):
        raise
    except Exception as error:  # a user's code may raise anything
        raise FigureError(f"{name} fails: {error_line(error)}") from error
    return sums
