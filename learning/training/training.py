"""Local training: what one device does with its part and its samples.

    for every batch of the plan's order:
        gradient of loss(part(x), y) [+ mu/2 ||w - w_base||^2], [clipped]; one optimiser step

The bracketed term is FedProx's (Li et al., MLSys 2020, arXiv 1812.06127, eq. 2). Its gradient mu (w - w_base) is added by
hand, which spares autograd a copy of the model; the losses that are reported leave it out, to compare with other methods.

Nothing is kept between calls: optimiser state, batch order and dropout all start from the plan's settings and seed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.batches import batches, micro_batches, until
from ..data.types import Samples, Transform
from ..parts.frozen import frozen_names
from ..randomness import seeded
from ..spec import Optimiser, Training
from .losses import Loss, scalar_loss
from .optimisers import LocalOptimiser

Gradient = Callable[[Tensor, Tensor, float], float]


@dataclass(frozen=True)
class TrainingResult:
    """What training saw; both losses are None when it made no step.

    ``steps``: optimiser steps. ``processed``: samples, repeats counted. ``loss``: mean per sample. ``loss_square``: mean over
    the samples of their batch's squared loss.
    """

    steps: int = 0
    processed: int = 0
    loss: float | None = None
    loss_square: float | None = None


def train(
    model: nn.Module,
    samples: Samples,
    *,
    training: Training,
    loss: Loss,
    transform: Transform,
    seed: int,
    trainable: Sequence[str] | None = None,
    gradient: Gradient | None = None,
    auxiliaries: Sequence[nn.Module] = (),
    over: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Train ``model`` in place on ``samples``; without samples, or without anything to train, it is left as it is.

    (With ``gradient`` and nothing to train the steps are walked through all the same: a host waits for what they send.)

    ``trainable``: names of the parameters and buffers that are trained (None: all that the model's author has not frozen, see
    ``frozen``). The other parameters get ``requires_grad`` off, and modules that hold tensors, but none of those named, stay in
    evaluation mode, so that frozen normalisation does not drift; a module without tensors (dropout) goes with the module that
    contains it. A model that is trained again and again is to be given names: this changes its flags. ``gradient``: adds
    a micro-batch's gradient in another way than by the model and its loss: from inputs, targets and share to the loss (split
    training). ``auxiliaries``: trained as well, by what ``gradient`` makes of them. ``over``: asked after each step whether to
    stop early. The process's random state is left as it was found, and no gradient is kept. Raises ``ValueError`` for a loss
    that is no scalar.
    """
    stepper = Stepper(model, training=training, trainable=trainable, auxiliaries=auxiliaries)
    if not len(samples) or not (stepper.parameters or gradient):
        return TrainingResult()
    gradient = gradient or WholeModel(model, training=training, loss=loss)
    order = batches(
        len(samples), batch_size=training.batch_size, epochs=training.epochs, steps=training.steps, seed=seed
    )
    with stepper:
        return steps(stepper, gradient, samples, until(order, over), training=training, transform=transform, seed=seed)


def steps(
    stepper: "Stepper",
    gradient: Gradient,
    samples: Samples,
    order: Iterable[NDArray[np.intp]],
    *,
    training: Training,
    transform: Transform,
    seed: int,
) -> TrainingResult:
    """One optimiser step for each batch of ``order``; ``seed`` is for transforms and dropout."""
    done = processed = 0
    total = total_square = 0.0
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):  # for dropout, which takes no generator
        for indices in order:
            value = 0.0
            for part, share in micro_batches(
                indices, batch_size=training.batch_size, accumulation=training.accumulation
            ):
                batch = samples.take(part)
                value += share * gradient(transform(batch.x, generator), batch.y, share)
            stepper.step()
            done += 1
            processed += len(indices)
            total += value * len(indices)
            total_square += value**2 * len(indices)
    if not done:
        return TrainingResult()
    return TrainingResult(done, processed, total / processed, total_square / processed)


class WholeModel:
    """Gradients of a model that is here as a whole."""

    def __init__(self, model: nn.Module, *, training: Training, loss: Loss) -> None:
        """``training`` says memory format and precision."""
        self._model, self._training, self._loss = model, training, loss

    def __call__(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """Add ``share`` of a micro-batch's gradient to what has accumulated; its loss."""
        with autocast(self._training):
            value = scalar_loss(self._loss(self._model(laid_out(inputs, self._training)), targets))
        if value.requires_grad:  # of this micro-batch, perhaps, no parameter was used
            (value * share if share != 1 else value).backward()  # type: ignore[no-untyped-call]
        return float(value.detach())


class Stepper:
    """The optimiser over what is trained of a model: what happens between the gradients of two batches.

    A context: gradients are dropped on the way in and out, also when a loss raises or memory runs out, since who trains
    next may train other parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        training: Training,
        trainable: Sequence[str] | None,
        auxiliaries: Sequence[nn.Module] = (),
    ) -> None:
        """Switch gradients and modes as ``trainable`` says, see ``train``; optimiser state starts empty."""
        self._chosen = [
            (model, _choose(model, trainable)),
            *((module, _choose(module, None)) for module in auxiliaries),
        ]
        self.parameters = [p for module, _ in self._chosen for p in module.parameters() if p.requires_grad]
        self.set_modes()
        self._settings = training.optimiser
        self._optimiser = LocalOptimiser(training.optimiser, self.parameters)
        self._base = [p.detach().clone() for p in self.parameters] if training.optimiser.proximal else []

    def __enter__(self) -> "Stepper":
        """Without gradients of before."""
        self._clear()
        return self

    def __exit__(self, *problem: object) -> None:
        """Nor for after."""
        self._clear()

    def step(self) -> None:
        """One optimiser step along the gradients that have accumulated."""
        densify(self.parameters)
        _adjust_gradients(self.parameters, self._base, settings=self._settings)
        self._optimiser.step()
        self._clear()

    def set_modes(self) -> None:
        """Put what is trained into training mode, and the rest into evaluation mode."""
        for model, chosen in self._chosen:
            model.train()
            for module in model.modules():  # containers first, so that what is inside decides for itself
                own = [*module.parameters(), *module.buffers()]
                if own and not any(id(tensor) in chosen for tensor in own):
                    module.eval()

    def set_learning_rate(self, rate: float) -> None:
        """Of all steps from now on; what the optimiser has gathered stays."""
        self._optimiser.learning_rate = rate

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def autocast(training: Training) -> torch.autocast:
    """The precision of a training setting."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.precision == "bf16")


def laid_out(inputs: Tensor, training: Training) -> Tensor:
    """Inputs in the memory format of a training setting."""
    if training.channels_last and inputs.dim() == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def densify(parameters: Iterable[Tensor]) -> None:
    """Make dense what gradients are sparse (of embeddings): momentum, decay and FedProx's term reach every row anyway."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


def _adjust_gradients(parameters: list[nn.Parameter], base: list[Tensor], *, settings: Optimiser) -> None:
    """FedProx's term, where ``base`` is given; then clipping of the whole."""
    for parameter, start in zip(parameters, base, strict=bool(base)):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start, alpha=settings.proximal)
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)


def _choose(model: nn.Module, trainable: Sequence[str] | None) -> set[int]:
    """Switch gradients as ``trainable`` says; the ids of the tensors to train."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    wanted = tensors.keys() - frozen_names(model) if trainable is None else set(trainable)
    assert wanted <= tensors.keys(), f"not in the model: {sorted(wanted - tensors.keys())}"
    chosen = {id(tensor) for name, tensor in tensors.items() if name in wanted}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return chosen
