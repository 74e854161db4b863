"""Optimisers: the device's local one, and the server's step on the mean update d.

    mean       x = x + lr d                                                    FedAvg with lr 1
    momentum   m = b1 m + d;                x = x + lr m                       Hsu et al., arXiv 1909.06335 (FedAvgM)
    adam       m = b1 m + (1 - b1) d;       v = b2 v + (1 - b2) d^2;           Reddi et al., ICLR 2021, arXiv 2003.00295,
               x = x + lr m / (sqrt(v) + tau)                                  Algorithm 2
    yogi       as adam, but                 v = v - (1 - b2) d^2 sign(v - d^2)

Without bias correction, and with v starting at tau^2, as in that paper. Running statistics take the plain mean, whatever
the optimiser: they are measurements, not parameters. (The caller sees to that.)
"""

from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor, nn

from .spec import Fraction, Optimiser, Positive


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


def start_momentum(optimiser: torch.optim.Optimizer) -> None:
    """Give parameters whose first gradient comes now, later than others', a momentum of 0, to be called before each step.

    A branch of the model may take part in some steps only. Fused SGD wants a momentum of all parameters or of none; from 0 it
    makes what torch's other kernels begin with, the gradient itself.
    """
    for group in optimiser.param_groups:
        now = [parameter for parameter in group["params"] if parameter.grad is not None]
        new = [parameter for parameter in now if "momentum_buffer" not in optimiser.state[parameter]]
        if group.get("momentum") and len(new) < len(now):
            for parameter in new:
                optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class ServerOptimiser(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the mean update enters the model: ``mean`` with learning rate 1 is FedAvg. ``momentum`` is b1, ``beta2`` b2."""

    name: Literal["mean", "momentum", "adam", "yogi"] = "mean"
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=3e38)] = 1.0  # float32 holds no more
    momentum: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1e-3

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
) -> Tensor:
    """``value`` moved by the mean update, in the memory of ``mean``; ``value`` itself stays as it is.

    ``mean``: mean difference of the folded updates, same shape as ``value``, float32 at least: the type of the result, too.
    ``state`` holds this optimiser's slots as ``m/name`` and ``v/name``, in the type of ``mean``, and is changed in place.
    """
    if settings.name == "mean":
        return torch.add(value, mean, alpha=settings.learning_rate, out=mean)
    beta1 = settings.momentum
    if f"m/{name}" not in state:
        state[f"m/{name}"] = torch.zeros_like(mean)
    m = state[f"m/{name}"]
    if settings.name == "momentum":
        m.mul_(beta1).add_(mean)
        return torch.add(value, m, alpha=settings.learning_rate, out=mean)
    m.mul_(beta1).add_(mean, alpha=1 - beta1)
    if f"v/{name}" not in state:
        state[f"v/{name}"] = torch.full_like(mean, settings.tau**2)
    v = state[f"v/{name}"]
    square = mean.square_()
    if settings.name == "adam":
        v.mul_(settings.beta2).add_(square, alpha=1 - settings.beta2)
    else:
        v.addcmul_(square, torch.sign(v - square), value=-(1 - settings.beta2))
    return torch.add(value, m / (v.sqrt() + settings.tau), alpha=settings.learning_rate, out=mean)
