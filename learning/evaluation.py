"""Evaluation of a model on a set of samples: mean loss and metrics, in evaluation mode, without gradients."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from .data.types import Samples
from .losses import Loss, Metric, mean_metric
from .training import Transform


def evaluate(
    model: nn.Module,
    samples: Samples,
    *,
    loss: Loss,
    metrics: Mapping[str, Metric],
    transform: Transform,
    batch_size: int = 256,
    channels_last: bool = False,
) -> dict[str, float]:
    """``{"loss": ..., metric: ...}``, each a mean over all samples. Raises ``ValueError`` when there are none."""
    count = len(samples)
    if count == 0:
        raise ValueError("evaluation needs at least one sample")
    model.eval()
    totals = dict.fromkeys(["loss", *metrics], 0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            batch = samples.take(np.arange(start, min(start + batch_size, count)))
            inputs = transform(batch.x, generator)
            if channels_last and inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            output = model(inputs)
            size = len(batch)
            totals["loss"] += float(loss(output, batch.y)) * size
            for name, metric in metrics.items():
                totals[name] += mean_metric(metric(output, batch.y), samples=size, name=name)
    return {name: total / count for name, total in totals.items()}
