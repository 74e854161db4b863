"""Optimisers: the device's local one, and the server's step on the mean update d.

    mean       x = x + lr d                                                    FedAvg with lr 1
    momentum   m = b1 m + d;                x = x + lr m                       Hsu et al., arXiv 1909.06335 (FedAvgM)
    adam       m = b1 m + (1 - b1) d;       v = b2 v + (1 - b2) d^2;           Reddi et al., ICLR 2021, arXiv 2003.00295,
               x = x + lr m / (sqrt(v) + tau)                                  Algorithm 2
    yogi       as adam, but                 v = v - (1 - b2) d^2 sign(v - d^2)

There is no bias correction, and v starts at tau^2, as in that paper. Running statistics take the plain mean with every
optimiser, since they are measurements and not parameters. (That is up to the caller.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..spec import Optimiser, ServerOptimiser


class LocalOptimiser:
    """SGD, Adam or AdamW by torch's fused kernels, which make one pass over each tensor. State starts empty.

    A step equals, bit for bit, that of ``torch.optim`` with ``fused=True``. Those classes are not used, since creating the
    first one imports torch's compiler, which takes longer than importing torch.

    ``learning_rate`` may be changed between steps; the state is kept.
    """

    def __init__(self, settings: Optimiser, parameters: Sequence[nn.Parameter]) -> None:
        """Parameters may have different types."""
        self.learning_rate = settings.learning_rate
        self._settings, self._parameters = settings, list(parameters)
        self._first: dict[int, Tensor] = {}  # by index of the parameter: momentum, or Adam's first moment
        self._second: dict[int, Tensor] = {}
        self._steps: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient; the others and their state are unchanged."""
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                groups.setdefault((parameter.dtype, parameter.device), []).append(index)
        is_first = not self._first
        for indices in groups.values():
            parameters: list[Tensor] = [self._parameters[index] for index in indices]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if self._settings.name == "sgd":
                self._sgd(indices, parameters, gradients, is_first=is_first)
            else:
                self._adam(indices, parameters, gradients)

    def _sgd(self, indices: list[int], parameters: list[Tensor], gradients: list[Tensor], *, is_first: bool) -> None:
        """``is_first``: no parameter has a momentum yet; the kernel then initialises it with the gradient."""
        settings = self._settings
        for index, gradient in zip(indices, gradients, strict=True) if settings.momentum else ():
            if index not in self._first:
                # A parameter that gets its first gradient in a later step starts from 0, with the same result.
                self._first[index] = torch.empty_like(gradient) if is_first else torch.zeros_like(gradient)
        torch._fused_sgd_(
            parameters,
            gradients,
            [self._first[index] for index in indices] if settings.momentum else [],
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            lr=self.learning_rate,
            dampening=0.0,
            nesterov=settings.nesterov,
            maximize=False,
            is_first_step=is_first and settings.momentum > 0,
        )

    def _adam(self, indices: list[int], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        settings = self._settings
        for index, parameter in zip(indices, parameters, strict=True):
            if index not in self._first:
                self._first[index] = torch.zeros_like(parameter)
                self._second[index] = torch.zeros_like(parameter)
                self._steps[index] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        steps = [self._steps[index] for index in indices]
        torch._foreach_add_(steps, 1)
        kernel = torch._fused_adam_ if settings.name == "adam" else torch._fused_adamw_
        kernel(
            parameters,
            gradients,
            [self._first[index] for index in indices],
            [self._second[index] for index in indices],
            [],
            steps,
            lr=self.learning_rate,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            weight_decay=settings.weight_decay,
            eps=settings.epsilon,
            amsgrad=False,
            maximize=False,
        )


def server_step(
    settings: ServerOptimiser, *, name: str, value: Tensor, mean: Tensor, state: dict[str, Tensor]
) -> Tensor:
    """Return ``value`` plus the step for the mean update. The result uses the memory of ``mean``; ``value`` is not changed.

    ``mean``: mean difference of the folded updates, in the shape of ``value``, float32 or wider; the result has its type.
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
