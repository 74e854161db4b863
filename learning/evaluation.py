"""Evaluation of a model on a set of samples: mean loss and metrics, in evaluation mode, without gradients."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from .data.types import Samples, Transform
from .losses import Loss, Metric, scalar_loss, summed_metric
from .spec import Precision


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
    """``{"loss": ..., metric: ...}``, each a mean over all samples; the model is left in evaluation mode.

    Batches are as equal as can be, of ``batch_size`` at most: a last batch of one sample has no statistics, for models that
    normalise by the batch at hand. ``precision``: of the forward pass; losses and metrics are float32. Random transforms see
    the same generator each time. Raises ``ValueError`` when there are no samples, and for a loss or a metric of the wrong
    shape.
    """
    count = len(samples)
    if count == 0:
        raise ValueError("evaluation needs at least one sample")
    model.eval()
    totals = dict.fromkeys(["loss", *metrics], 0.0)
    assert len(totals) == 1 + len(metrics), "a metric may not be called loss"
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for indices in np.array_split(np.arange(count), -(-count // batch_size)):
            batch = samples.take(indices)
            inputs = transform(batch.x, generator)
            if channels_last and inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                output = model(inputs)
            output = output.float() if precision == "bf16" else output
            size = len(batch)
            totals["loss"] += float(scalar_loss(loss(output, batch.y))) * size
            for name, metric in metrics.items():
                totals[name] += summed_metric(metric(output, batch.y), samples=size, name=name)
    return {name: total / count for name, total in totals.items()}
