"""Optimisers: the device's local one, and the server's step on the mean update d.

    mean       x = x + lr d                                                    FedAvg with lr 1
    momentum   m = b1 m + d;                x = x + lr m                       Hsu et al., arXiv 1909.06335 (FedAvgM)
    adam       m = b1 m + (1 - b1) d;       v = b2 v + (1 - b2) d^2;           Reddi et al., ICLR 2021, arXiv 2003.00295,
               x = x + lr m / (sqrt(v) + tau)                                  Algorithm 2
    yogi       as adam, but                 v = v - (1 - b2) d^2 sign(v - d^2)

Without bias correction, and with v starting at tau^2, as in that paper. Running statistics take the plain mean, whatever
the optimiser: they are measurements, not parameters. (The caller sees to that.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..spec import Optimiser, ServerOptimiser


class LocalOptimiser:
    """SGD, Adam or AdamW over parameters, by torch's fused kernels, which take one pass over each tensor. State starts empty.

    A step is, bit for bit, that of ``torch.optim`` with ``fused=True``. Those classes are not used, since the first one that is
    made imports torch's compiler, which takes longer than importing torch.

    ``learning_rate``: of the steps from now on; what the state has gathered stays.
    """

    def __init__(self, settings: Optimiser, parameters: Sequence[nn.Parameter]) -> None:
        """Parameters may be of several types."""
        self.learning_rate = settings.learning_rate
        self._settings, self._parameters = settings, list(parameters)
        self._first: dict[int, Tensor] = {}  # by place: momentum, or Adam's first moment
        self._second: dict[int, Tensor] = {}
        self._steps: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters that have a gradient; the others, and their state, stay as they are."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                kinds.setdefault((parameter.dtype, parameter.device), []).append(place)
        starts = not self._first
        for places in kinds.values():
            moved: list[Tensor] = [self._parameters[place] for place in places]
            gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
            if self._settings.name == "sgd":
                self._sgd(places, moved, gradients, starts=starts)
            else:
                self._adam(places, moved, gradients)

    def _sgd(self, places: list[int], moved: list[Tensor], gradients: list[Tensor], *, starts: bool) -> None:
        """``starts``: nothing has a momentum yet; the kernel then takes the gradient as the first one."""
        settings = self._settings
        for place, gradient in zip(places, gradients, strict=True) if settings.momentum else ():
            if place not in self._first:
                # One whose first gradient comes later than others' begins at 0, from which the same follows.
                self._first[place] = torch.empty_like(gradient) if starts else torch.zeros_like(gradient)
        torch._fused_sgd_(
            moved,
            gradients,
            [self._first[place] for place in places] if settings.momentum else [],
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            lr=self.learning_rate,
            dampening=0.0,
            nesterov=settings.nesterov,
            maximize=False,
            is_first_step=starts and settings.momentum > 0,
        )

    def _adam(self, places: list[int], moved: list[Tensor], gradients: list[Tensor]) -> None:
        settings = self._settings
        for place, parameter in zip(places, moved, strict=True):
            if place not in self._first:
                self._first[place] = torch.zeros_like(parameter)
                self._second[place] = torch.zeros_like(parameter)
                self._steps[place] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        steps = [self._steps[place] for place in places]
        torch._foreach_add_(steps, 1)
        kernel = torch._fused_adam_ if settings.name == "adam" else torch._fused_adamw_
        kernel(
            moved,
            gradients,
            [self._first[place] for place in places],
            [self._second[place] for place in places],
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
