"""Losses and metrics by name, or the user's own as ``module:function``.

A loss is called ``loss(output, target, **kwargs)`` and returns the mean over the batch as a scalar. A metric is called the
same way and returns one number per sample (a vector), so that means over batches of different sizes, over devices and over
a whole test set agree. A metric where lower values are better has the attribute ``lower_is_better = True``.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..resolve import resolve
from ..spec import Call

Loss = Callable[..., Tensor]
Metric = Callable[..., Tensor]


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Whether the class with the largest score is the target, per sample (targets of any further shape are averaged).

    Scores ``[sample, class, ...]``, labels ``[sample, ...]``. Raises ``ValueError`` for other shapes.
    """
    if output.dim() < 2 or output.shape[1] < 2 or output.shape[:1] + output.shape[2:] != target.shape:
        raise ValueError(
            f"the model gives shape {tuple(output.shape)} for targets of shape {tuple(target.shape)}; accuracy takes scores "
            "[sample, class, ...] of two classes or more, and labels [sample, ...]"
        )
    hit = (output.argmax(dim=1) == target).float()
    return hit.reshape(hit.shape[0], -1).mean(dim=1)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample."""
    return (output - target.reshape(output.shape)).square().reshape(output.shape[0], -1).mean(dim=1)


def absolute_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error per sample."""
    return (output - target.reshape(output.shape)).abs().reshape(output.shape[0], -1).mean(dim=1)


squared_error.lower_is_better = absolute_error.lower_is_better = True  # type: ignore[attr-defined]


def lower_is_better(metric: Metric) -> bool:
    """Whether lower values of a metric are better, by its attribute ``lower_is_better``."""
    function = metric.func if isinstance(metric, partial) else metric
    return bool(getattr(function, "lower_is_better", False))


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error; targets take the shape of the output."""
    return F.mse_loss(output, target.reshape(output.shape))


def smooth_l1(output: Tensor, target: Tensor, *, beta: float = 1.0) -> Tensor:
    """Huber-like loss; targets take the shape of the output."""
    return F.smooth_l1_loss(output, target.reshape(output.shape), beta=beta)


LOSSES: dict[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "nll": F.nll_loss,
    "mse": mse,
    "smooth_l1": smooth_l1,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "squared_error": squared_error,
    "absolute_error": absolute_error,
}


_NUMERIC_LOSSES = ("mse", "smooth_l1", "bce_with_logits")


def default_metrics(loss: Call, target: Tensor) -> tuple[Call, ...]:
    """Default metrics, given the loss and one target: accuracy for class labels, none for everything else.

    Targets are class labels if they are integers and the loss is not one of ``mse``, ``smooth_l1`` and ``bce_with_logits``.
    """
    numeric = target.is_floating_point() or target.is_complex() or loss.name in _NUMERIC_LOSSES
    return () if numeric else (Call("accuracy"),)


def make_loss(call: Call) -> Loss:
    """The loss that a name or ``module:function`` refers to, with its keyword arguments bound."""
    return _make_function(call, LOSSES, what="training.loss")


def make_metric(call: Call) -> Metric:
    """The metric that a name or ``module:function`` refers to, with its keyword arguments bound."""
    return _make_function(call, METRICS, what="evaluation.metrics")


def _make_function(call: Call, known: dict[str, Callable[..., Tensor]], *, what: str) -> Callable[..., Tensor]:
    """Look up a built-in name, or import the user's function."""
    if call.name in known:
        function = known[call.name]
    elif ":" in call.name:
        function = resolve(call.name, what=what)
        if not callable(function):
            raise ValueError(f"{what}: {call.name!r} is not a function")
    else:
        raise ValueError(f"{what} is {call.name!r}; it must be one of {', '.join(known)}, or module:function")
    _check_keywords(function, call, what=what)
    return partial(function, **call.kwargs) if call.kwargs else function


def _check_keywords(function: Callable[..., Tensor], call: Call, *, what: str) -> None:
    """Raise ``ValueError`` for keyword arguments that would fail on every device."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return
    try:
        signature.bind(None, None, **call.kwargs)
    except TypeError as error:
        raise ValueError(
            f"{what}: {call.name!r} is called as fn(output, target, **kwargs) with kwargs {call.kwargs}, but: {error}"
        ) from error


class WrongShape(ValueError):
    """A loss or a metric returned a value of the wrong shape; the message names the function."""


def scalar_loss(value: Any) -> Tensor:
    """Return ``value`` if it is one number (the mean over the batch). Raises ``WrongShape`` for anything else."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise WrongShape(f"training.loss returned {_describe(value)}; it must return one number, the mean of the batch")
    return value


def summed_metric(values: Any, *, samples: int, name: str) -> float:
    """Sum of a metric's values over one batch. Raises ``WrongShape`` unless there is one value per sample."""
    if not isinstance(values, Tensor) or values.shape != torch.Size([samples]):
        raise WrongShape(
            f"metric {name!r} returned {_describe(values)}; it must return one number per sample, shape ({samples},)"
        )
    return float(values.double().sum())


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
