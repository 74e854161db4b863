"""Checks before round 0 that model, data, loss and metrics work together.

Any of them may be a user's own code. A metric that raises would otherwise fail at the first evaluation, perhaps after hours,
and a label out of range on some device in some round.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...learning.data.batches import largest_micro_batch
from ...learning.data.targets import check_targets
from ...learning.data.transforms import apply_checked
from ...learning.data.types import FederatedData, Samples, Transform
from ...learning.parts.module_state import ModuleState
from ...learning.randomness import seeded
from ...learning.resolve import error_line
from ...learning.spec import Layout, Precision, Training
from ...learning.training.evaluation import FigureError, figures, predict
from ...learning.training.losses import Metric, make_loss
from ...learning.workload import Workload
from .config import Config

_FEW = 2  # samples: batch statistics need two


def check_learning(config: Config, workload: Workload) -> None:
    """Evaluate a few samples with loss and metrics, and check all targets. Raises ``ValueError`` for the first problem."""
    evaluated = config.evaluation.where != "none"
    metrics = workload.metrics if evaluated else {}
    if config.stop.accuracy is not None and "accuracy" not in metrics:
        raise ValueError(
            f"stop.accuracy is {config.stop.accuracy!r}, but accuracy is not a metric where targets are not class labels; "
            "name it in evaluation.metrics, or use stop.loss"
        )
    samples, transform, field = _first_samples(config, workload)
    output = try_model(workload.blocks.model, apply_checked(transform, samples.x, field=field), config.training)
    for family in workload.families[1:]:
        inputs = apply_checked(transform, samples.x, field=field)
        given = try_model(workload.family(family).blocks.model, inputs, config.training)
        if _shape(given) != _shape(output):
            raise ValueError(
                f"models.{family} gives {_shape(given)} where model gives {_shape(output)}; they must be alike"
            )
    check_targets(workload.data, loss=config.training.loss, output=output)
    _try_figures(config, output, samples.y, metrics)
    _check_alone(config, workload)


def _shape(output: Any) -> Any:
    """The shape of an output, or its type."""
    return tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__


def few_samples_notice(workload: Workload) -> list[str]:
    """A notice about devices with too few samples to take part, if there are any."""
    if workload.min_samples == 1:
        return []
    counts = [workload.data.num_samples(device) for device in range(workload.settings.num_devices)]
    alone = [str(device) for device, count in enumerate(counts) if count == 1]
    shown = ", ".join(alone[:10]) + (", ..." if len(alone) > 10 else "")
    return [
        f"{len(alone)} of {len(counts)} devices have one training sample, on which the model cannot be trained "
        f"({workload.alone_fault}), and are left out: {shown}"
    ]


def _first_samples(config: Config, workload: Workload) -> tuple[Samples, Transform, str]:
    """The first samples to evaluate, or, without evaluation, to train on; their transform, and its setting's name.

    Raises ``ValueError`` if there are no such samples.
    """
    where, data = config.evaluation.where, workload.data
    few = min(_FEW, config.evaluation.batch_size)
    server = data.server_test() if where in ("server", "both") else None
    if where in ("server", "both") and (server is None or not len(server)):
        raise ValueError(
            f"evaluation.where is {where!r}, but the server has no test set in these data; 'devices' (with data.test_share) "
            "and 'none' do without"
        )
    share = _share(data, few) if where in ("devices", "both") else None
    if where in ("devices", "both") and share is None:
        raise ValueError(f"evaluation.where is {where!r}, but no device has a test set; set data.test_share above 0")
    test = server or share
    if test is not None:
        return test.take(np.arange(min(few, len(test)))), data.test_transform, "data.test_transforms"
    counts = [data.num_samples(device) for device in range(data.num_devices)]
    if not any(counts):
        raise ValueError("data: no device has a single sample")
    samples = data.train(int(np.argmax(counts)))
    return samples.take(np.arange(min(few, len(samples)))), data.train_transform, "data.train_transforms"


def _share(data: FederatedData, few: int) -> Samples | None:
    """The first test share with at least ``few`` samples, or the largest one; None if no device has any."""
    largest: Samples | None = None
    for share in (data.test(device) for device in range(data.num_devices)):
        if share is not None and len(share) > (len(largest) if largest is not None else 0):
            largest = share
            if len(share) >= few:
                break
    return largest


def try_model(model: nn.Module, inputs: Tensor, training: Training) -> Any:
    """A model's output for a batch in evaluation mode. Raises ``ValueError`` if the model fails."""
    try:
        return _run(model, inputs, training.precision, training.layout)
    except Exception as error:  # a user's code may raise anything
        if training.precision == "bf16" and _runs_in_float32(model, inputs, training.layout):
            raise ValueError(
                "training.precision is 'bf16', in which this processor cannot run the model; allowed: 'float32' "
                f"({error_line(error)})"
            ) from error
        hint = "; most models take float32 samples" if inputs.dtype != torch.float32 else ""
        if inputs.dtype == torch.uint8:  # images that were not normalised
            hint += ", and the transform normalize scales bytes to 0..1"
        raise ValueError(
            f"the model fails on samples of shape {tuple(inputs.shape)} ({inputs.dtype}): {error_line(error)}{hint}"
        ) from error


def _runs_in_float32(model: nn.Module, inputs: Tensor, layout: Layout) -> bool:
    """Whether the model works in float32, so that only the precision is the problem."""
    try:
        _run(model, inputs, "float32", layout)
    except Exception:  # the first fault is reported
        return False
    return True


def _run(model: nn.Module, inputs: Tensor, precision: Precision, layout: Layout) -> Any:
    """A forward pass in evaluation mode that does not change the model."""
    state = ModuleState(model, values=True)
    model.eval()
    try:
        with torch.inference_mode(), seeded(0):
            return predict(model, inputs, layout=layout, precision=precision)
    finally:
        state.restore()


def _try_figures(config: Config, output: Any, targets: Tensor, metrics: Mapping[str, Metric]) -> None:
    """Compute loss and metrics once. Raises ``ValueError``."""
    try:
        with torch.no_grad(), seeded(0):
            figures(output, targets, loss=make_loss(config.training.loss), metrics=metrics)
    except (FigureError, ValueError) as error:
        given = f"shape {tuple(output.shape)} ({output.dtype})" if isinstance(output, Tensor) else type(output).__name__
        shapes = f"the model gives {given}, targets have shape {tuple(targets.shape)} ({targets.dtype})"
        default = config.evaluation.metrics is None and "metric" in str(error)
        hint = (
            "; it is the default of integer targets: name others in evaluation.metrics, or [] for none"
            if default
            else ""
        )
        raise ValueError(f"{error} ({shapes}){hint}") from error


def _check_alone(config: Config, workload: Workload) -> None:
    """Refuse settings or data under which a model must train on single samples but cannot. Raises ``ValueError``."""
    training = config.training
    if largest_micro_batch(training.batch_size, training.accumulation) == 1 and (fault := workload.alone_fault):
        settings = f"training.batch_size is {training.batch_size} and training.accumulation {training.accumulation}"
        raise ValueError(
            f"{settings}, which trains on one sample at a time; the model cannot ({fault}); allowed: a batch_size of twice the "
            "accumulation or more"
        )
    counts = [workload.data.num_samples(device) for device in range(workload.settings.num_devices)]
    if max(counts) < workload.min_samples:
        fault = workload.alone_fault
        raise ValueError(
            f"data: no device has more than one training sample, and the model cannot be trained on one: {fault}"
        )
