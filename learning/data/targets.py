"""Checks targets against the loss and the model's output, before the first round.

A label that the model has no score for, or numbers in place of probabilities, would otherwise fail on some device in some
round, or not at all: the cross-entropy of a single score is 0, whatever the target.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..spec import Call
from .devices import DeviceData, PoolShares
from .types import FederatedData

_MAX_SAMPLES = 10_000  # of data that are loaded device by device
_ROUNDING = 1e-3
_IGNORED = -100  # torch's default of ignore_index
_HINT = "for targets that are numbers use mse or smooth_l1, for yes and no bce_with_logits"

Targets = NDArray[Any]


def known_targets(data: FederatedData) -> Iterator[tuple[str, Targets]]:
    """Yield targets, with a phrase that says where their samples are.

    These are all targets of a pool, or else those of the first devices, up to about 10,000 samples.
    """
    if isinstance(data, DeviceData) and isinstance(data.shares, PoolShares):
        pool = data.shares.pool
        yield "training", pool.train.targets()
        if pool.test is not None:
            yield "test", pool.test.targets()
        return
    seen = 0
    for device in range(data.num_devices):
        if data.num_samples(device):
            targets = data.train(device).targets()
            yield f"device {device}'s", targets
            if (seen := seen + len(targets)) >= _MAX_SAMPLES:
                return


def check_targets(data: FederatedData, *, loss: Call, output: Any) -> None:
    """Raise ``ValueError`` for targets of ``data`` that do not fit the loss and the model's ``output`` for some samples.

    Nothing is checked for a model whose output is not a single tensor.
    """
    if isinstance(output, Tensor):
        for place, targets in known_targets(data):
            if problem := unfit_targets(targets, place=place, loss=loss, output=tuple(output.shape)):
                raise ValueError(problem)


def unfit_targets(targets: Targets, *, place: str, loss: Call, output: tuple[int, ...]) -> str:
    """Why ``targets`` [sample, ...] do not fit the loss and an output of shape [sample, ...], in one sentence; else "".

    Nothing is checked for a loss that is not built in. ``place``: phrase that says where the samples are.
    """
    if loss.name == "bce_with_logits":
        wrong = (targets < 0) | (targets > 1)
        return _first(wrong, targets, place, f"training.loss is {loss.name!r}, whose targets must be 0 to 1")
    if loss.name not in ("cross_entropy", "nll"):
        return ""
    if len(output) < 2 or output[1] < 2:
        return (
            f"training.loss is {loss.name!r}, which takes a score for each of two classes or more, [sample, class, ...]; the "
            f"model gives shape {list(output)} for {output[0]} samples; {_HINT}"
        )
    labels = np.issubdtype(targets.dtype, np.integer)
    expected = output[2:] if labels or loss.name == "nll" else output[1:]
    if targets.shape[1:] != expected:
        kind = "labels" if labels or loss.name == "nll" else "probabilities"
        takes = f"{kind} of shape {list(expected)}" if expected else "one label"
        return (
            f"data: targets of {place} samples have shape {list(targets.shape[1:])}; training.loss {loss.name!r} takes {takes} "
            f"for each, where the model gives shape {list(output[1:])}; {_HINT}"
        )
    if labels:
        wrong = (targets < 0) | (targets >= output[1])
        wrong &= targets != loss.kwargs.get("ignore_index", _IGNORED)
        return _first(
            wrong, targets, place, f"the model gives {output[1]} scores, so that labels must be 0 to {output[1] - 1}"
        )
    wrong = (np.abs(targets.sum(axis=1, keepdims=True) - 1) > _ROUNDING) | (targets < 0)
    must = f"training.loss is {loss.name!r}, whose targets must be labels, or probabilities that sum to 1; {_HINT}"
    return _first(wrong, targets, place, must)


def _first(wrong: NDArray[np.bool_], targets: Targets, place: str, must: str) -> str:
    """A sentence with the first wrong target and the requirement; "" if no target is wrong."""
    positions = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
    if not len(positions):
        return ""
    value = targets[positions[0]]
    shown = (
        value.item() if value.ndim == 0 else f"[{', '.join(f'{element:g}' for element in value.reshape(-1)[:4])}, ...]"
    )
    return f"data: the target of {place} sample {positions[0]} is {shown}; {must}"
