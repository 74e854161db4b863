"""Model, data, loss and metrics held against each other before round 0: what could not work is refused, with its name.

Each is a user's own code, perhaps. A metric that raises would otherwise be found at the first evaluation, which may be hours
away, and a label out of range on some device in some round.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...learning.data.batches import largest_micro_batch
from ...learning.data.targets import check_targets
from ...learning.data.transforms import tried
from ...learning.data.types import FederatedData, Samples, Transform
from ...learning.parts.module_state import ModuleState
from ...learning.randomness import seeded
from ...learning.resolve import told
from ...learning.spec import Precision, Training
from ...learning.training.evaluation import FigureError, figures, predict
from ...learning.training.losses import Metric, make_loss
from ...learning.workload import Workload
from .config import Config

_FEW = 2  # samples: batch statistics need two


def check_learning(config: Config, workload: Workload) -> None:
    """Evaluate a few samples, with loss and metrics, and look at the targets of the others.

    Raises ``ValueError`` in one sentence for the first thing that does not work or does not go together.
    """
    evaluated = config.evaluation.where != "none"
    metrics = workload.metrics if evaluated else {}
    if config.stop.accuracy is not None and "accuracy" not in metrics:
        raise ValueError(
            f"stop.accuracy is {config.stop.accuracy!r}, but accuracy is no metric where targets are not class labels; "
            "name it in evaluation.metrics, or use stop.loss"
        )
    samples, transform, field = _first_samples(config, workload)
    output = try_model(workload.blocks.model, tried(transform, samples.x, field=field), config.training)
    check_targets(workload.data, loss=config.training.loss, output=output)
    _try_figures(config, output, samples.y, metrics)
    _check_alone(config, workload)


def left_out(workload: Workload) -> list[str]:
    """A notice of the devices that have too few samples to take part, if there are any."""
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
    """The first samples that will be evaluated, or trained on where none are; their transform, and its setting.

    Raises ``ValueError`` when there is nothing to evaluate.
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
    """The first test share of a device that has so many samples, or the largest; None where no device has any."""
    largest: Samples | None = None
    for share in (data.test(device) for device in range(data.num_devices)):
        if share is not None and len(share) > (len(largest) if largest is not None else 0):
            largest = share
            if len(share) >= few:
                break
    return largest


def try_model(model: nn.Module, inputs: Tensor, training: Training) -> Any:
    """What a model makes of a batch in evaluation, one tensor of most models. Raises ``ValueError`` where it fails."""
    precision, channels_last = training.precision, training.channels_last
    try:
        return _run(model, inputs, precision, channels_last)
    except Exception as error:  # of a user's code: anything
        if precision == "bf16" and _runs_in_float32(model, inputs, channels_last):
            raise ValueError(
                "training.precision is 'bf16', in which this processor cannot run the model; allowed: 'float32' "
                f"({told(error)})"
            ) from error
        hint = "; most models take float32 samples" if inputs.dtype != torch.float32 else ""
        if inputs.dtype == torch.uint8:  # images have been scaled
            hint += ", and the transform normalize scales bytes to 0..1"
        raise ValueError(
            f"the model fails on samples of shape {tuple(inputs.shape)} ({inputs.dtype}): {told(error)}{hint}"
        ) from error


def _runs_in_float32(model: nn.Module, inputs: Tensor, channels_last: bool) -> bool:
    """Whether it is only the precision that the model fails for."""
    try:
        _run(model, inputs, "float32", channels_last)
    except Exception:  # the first fault is told
        return False
    return True


def _run(model: nn.Module, inputs: Tensor, precision: Precision, channels_last: bool) -> Any:
    """A forward pass in evaluation mode, which leaves nothing behind."""
    state = ModuleState(model, values=True)
    model.eval()
    try:
        with torch.inference_mode(), seeded(0):
            return predict(model, inputs, channels_last=channels_last, precision=precision)
    finally:
        state.restore()


def _try_figures(config: Config, output: Any, targets: Tensor, metrics: Mapping[str, Metric]) -> None:
    """Loss and metrics, once."""
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
    """A model that cannot be trained on one sample at a time must not have to."""
    training = config.training
    if largest_micro_batch(training.batch_size, training.accumulation) == 1 and (fault := workload.alone_fault):
        settings = f"training.batch_size is {training.batch_size} and training.accumulation {training.accumulation}"
        raise ValueError(
            f"{settings}, which trains on one sample at a time; the model cannot ({fault}); allowed: a batch_size of twice the "
            "accumulation or more"
        )
    counts = [workload.data.num_samples(device) for device in range(workload.settings.num_devices)]
    if max(counts) < workload.min_samples:
        raise ValueError(
            f"data: no device has more than one training sample, and the model cannot be trained on one: {workload.alone_fault}"
        )
