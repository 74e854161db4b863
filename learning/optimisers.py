"""Optimisers: the device's local one, and the server's step on the mean update (Reddi et al., ICLR 2021, arXiv 2003.00295).

The server step follows the paper's Algorithm 2 with bias correction left out, as there: m = b1 m + (1 - b1) d; Adam's
v = b2 v + (1 - b2) d^2; Yogi's v = v - (1 - b2) d^2 sign(v - d^2); x = x + lr m / (sqrt(v) + tau). Here v starts at tau^2,
the paper's choice. Running statistics take the plain mean: they are measurements, not parameters.
"""

from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor, nn

from .spec import Fraction, NonNegative, Optimiser, Positive


def make_optimiser(settings: Optimiser, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The device's optimiser over ``parameters``, with empty state.

    The fused kernels take one pass over each tensor; they are what the throughput figures are measured with.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=rate, momentum=settings.momentum, nesterov=settings.nesterov, weight_decay=decay, fused=True
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, betas=settings.betas, eps=settings.epsilon, weight_decay=decay, fused=True)


class ServerOptimiser(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the mean update enters the model: ``mean`` with learning rate 1 and no momentum is FedAvg."""

    name: Literal["mean", "momentum", "adam", "yogi"] = "mean"
    learning_rate: Positive = 1.0
    momentum: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Annotated[float, msgspec.Meta(gt=0)] = 1e-3

    def __post_init__(self) -> None:
        """Refuse a momentum of 1, which would never move."""
        if self.name != "mean" and self.momentum >= 1:
            raise ValueError(f"server.optimiser.momentum is {self.momentum}; it must be below 1")

    @property
    def slots(self) -> int:
        """Tensors of state per parameter."""
        return {"mean": 0, "momentum": 1, "adam": 2, "yogi": 2}[self.name]


def server_step(
    settings: ServerOptimiser, *, name: str, value: Tensor, mean: Tensor, state: dict[str, Tensor]
) -> None:
    """Move ``value`` by the mean update, in place; ``state`` holds this optimiser's slots as ``m/name`` and ``v/name``.

    ``mean``: mean difference of the folded updates, same shape as ``value``; it may be overwritten.
    """
    if settings.name == "mean":
        value.add_(mean, alpha=settings.learning_rate)
        return
    beta1 = settings.momentum
    m = state.setdefault(f"m/{name}", torch.zeros_like(value))
    if settings.name == "momentum":
        m.mul_(beta1).add_(mean)
        value.add_(m, alpha=settings.learning_rate)
        return
    m.mul_(beta1).add_(mean, alpha=1 - beta1)
    v = state.setdefault(f"v/{name}", torch.full_like(value, settings.tau**2))
    square = mean.square_()
    if settings.name == "adam":
        v.mul_(settings.beta2).add_(square, alpha=1 - settings.beta2)
    else:
        v.addcmul_(square, torch.sign(v - square), value=-(1 - settings.beta2))
    value.add_(m / (v.sqrt() + settings.tau), alpha=settings.learning_rate)
