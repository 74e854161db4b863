"""Local training of one device's part on its samples.

    for every batch in the plan's order:
        gradient of loss(part(x), y) [+ mu/2 ||w - w_base||^2], [clipped]; one optimiser step

The bracketed term is FedProx's (Li et al., MLSys 2020, arXiv 1812.06127, eq. 2). Its gradient mu (w - w_base) is added
explicitly, which saves autograd a copy of the model. Reported losses leave the term out, to be comparable with other methods.

No state is kept between calls: optimiser state, batch order and dropout all start from the plan's settings and seed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.batches import batches, micro_batches, until
from ..data.types import Samples, Transform
from ..parts.blocks import Blocks, cut
from ..parts.structure import frozen_names
from ..randomness import seeded
from ..sparse.layers import set_state
from ..sparse.state import SparseTraining
from ..spec import Optimiser, Training
from .losses import Loss, scalar_loss
from .optimisers import LocalOptimiser
from .precision import autocast, in_layout
from .recompute import run_blocks

Gradient = Callable[[Tensor, Tensor, float], float]


@dataclass(frozen=True)
class TrainingResult:
    """Result of local training; both losses are None if no step was made.

    ``steps``: optimiser steps. ``processed``: samples, repetitions counted. ``loss``: mean per sample. ``loss_square``: mean
    over the samples of their batch's squared loss.
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
    blocks: Blocks | None = None,
) -> TrainingResult:
    """Train ``model`` in place on ``samples``.

    Without samples, or without trainable parameters, the model is left unchanged. (With ``gradient`` the steps are made even if
    nothing is trainable: a host waits for the activations.) The process's random state is restored, and gradients are dropped.

    Args:
        model: the whole model.
        samples: the device's training samples.
        training: optimiser, number of passes or steps, batch size, precision and memory format.
        loss: ``loss(output, target)``, the mean over the batch.
        transform: applied to the inputs of each micro-batch.
        seed: of batch order, transforms and dropout.
        trainable: names of the parameters and buffers to train (None: all that the model's author has not frozen, see
            ``structure.frozen_names``). ``requires_grad`` is switched off on all other parameters, so a model that is trained
            repeatedly needs explicit names. A module with tensors of which none is named stays in evaluation mode, so that
            frozen normalisation keeps its statistics; a module without tensors (dropout) has the mode of its parent module.
        gradient: replaces the model and its loss (split training): takes inputs, targets and the micro-batch's share of its
            batch, adds the gradient, and returns the loss.
        auxiliaries: modules that are trained too, by the gradients that ``gradient`` adds.
        over: called after each step; training stops early once it returns true.
        blocks: ``model`` in blocks, of which checkpointing recomputes those that are trained (None: it is cut for it).

    Raises:
        ValueError: if the loss is not a scalar.
    """
    if not training.checkpointing or gradient is not None:
        blocks = None
    elif blocks is None:
        blocks = cut(model)  # which sets all modes, so that it must come first
    stepper = Stepper(model, training=training, trainable=trainable, auxiliaries=auxiliaries)
    if not len(samples) or not (stepper.parameters or gradient):
        return TrainingResult()
    gradient = gradient or WholeModel(model, training=training, loss=loss, blocks=blocks)
    order = batches(
        len(samples), batch_size=training.batch_size, epochs=training.epochs, steps=training.steps, seed=seed
    )
    with stepper:
        return run_steps(
            stepper, gradient, samples, until(order, over), training=training, transform=transform, seed=seed
        )


def run_steps(
    stepper: "Stepper",
    gradient: Gradient,
    samples: Samples,
    order: Iterable[NDArray[np.intp]],
    *,
    training: Training,
    transform: Transform,
    seed: int,
) -> TrainingResult:
    """Make one optimiser step for each batch of ``order``; ``seed`` is for transforms and dropout."""
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
    """Gradients of a model that the process holds as a whole."""

    def __init__(self, model: nn.Module, *, training: Training, loss: Loss, blocks: Blocks | None = None) -> None:
        """``training``: for memory format and precision. ``blocks``: the model in blocks, if those trained are recomputed."""
        self._model, self._training, self._loss, self._blocks = model, training, loss, blocks

    def __call__(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """Accumulate ``share`` times the gradient of a micro-batch; returns its loss."""
        inputs = in_layout(inputs, self._training.layout)
        with autocast(self._training.precision):
            value = scalar_loss(self._loss(self._run(inputs), targets))
        if value.requires_grad:  # false if the model used no parameter for this micro-batch
            (value * share if share != 1 else value).backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    def _run(self, inputs: Tensor) -> Any:
        """The model's output."""
        if self._blocks is None:
            return self._model(inputs)
        return run_blocks(self._blocks, tuple(self._blocks.modules), inputs, precision=self._training.precision)


class Stepper:
    """Optimiser steps on the trainable parameters of a model.

    A context manager: gradients are dropped on entry and exit, also if a loss raises or memory runs out, since the next plan
    may train other parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        training: Training,
        trainable: Sequence[str] | None,
        auxiliaries: Sequence[nn.Module] = (),
        stashes: bool = False,
    ) -> None:
        """Set ``requires_grad`` and modes according to ``trainable``, see ``train``; optimiser state starts empty.

        So does the state of the model's sparse layers. ``stashes``: whether gradients are taken at copies of the weights, so
        that all of them must be made.
        """
        only_adds = _only_adds(training.optimiser) and not stashes
        self._model, self._sparse = model, SparseTraining(training.sparsity, only_adds=only_adds)
        set_state(model, self._sparse)
        self._trained = [
            (model, _select(model, trainable)),
            *((module, _select(module, None)) for module in auxiliaries),
        ]
        self.parameters = [p for module, _ in self._trained for p in module.parameters() if p.requires_grad]
        self.set_modes()
        self._settings = training.optimiser
        self._optimiser = LocalOptimiser(training.optimiser, self.parameters)
        self._base = [p.detach().clone() for p in self.parameters] if training.optimiser.proximal else []

    def __enter__(self) -> "Stepper":
        """Drop earlier gradients, and use this state of sparse layers."""
        self._clear()
        set_state(self._model, self._sparse)
        return self

    def __exit__(self, *problem: object) -> None:
        """Drop all gradients, and the state of sparse layers."""
        self._clear()
        set_state(self._model, None)

    def step(self) -> None:
        """Make one optimiser step with the accumulated gradients, and drop them."""
        densify(self.parameters)
        _adjust_gradients(self.parameters, self._base, settings=self._settings)
        self._optimiser.step()
        self._sparse.update(self._optimiser.learning_rate)
        self._sparse.step()
        self._clear()

    def set_modes(self) -> None:
        """Put trained modules into training mode, and all others into evaluation mode."""
        for model, trained in self._trained:
            model.train()
            for module in model.modules():  # parents come first, so that a child's mode overrides its parent's
                own = [*module.parameters(), *module.buffers()]
                if own and not any(id(tensor) in trained for tensor in own):
                    module.eval()

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of all further steps; the optimiser's state is kept."""
        self._optimiser.learning_rate = rate

    def _clear(self) -> None:
        self._sparse.drop()
        for parameter in self.parameters:
            parameter.grad = None


def _only_adds(settings: Optimiser) -> bool:
    """Whether a step adds the gradient, times a factor, to the weight, and does nothing else."""
    others = settings.momentum, settings.weight_decay, settings.clip_norm, settings.proximal
    return settings.name == "sgd" and not any(others)


def densify(parameters: Iterable[Tensor]) -> None:
    """Make sparse gradients (of embeddings) dense: momentum, decay and FedProx's term affect every row anyway."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


def _adjust_gradients(parameters: list[nn.Parameter], base: list[Tensor], *, settings: Optimiser) -> None:
    """Add FedProx's term if ``base`` is not empty, then clip."""
    for parameter, start in zip(parameters, base, strict=bool(base)):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start, alpha=settings.proximal)
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)


def _select(model: nn.Module, trainable: Sequence[str] | None) -> set[int]:
    """Set ``requires_grad`` according to ``trainable``; returns the ids of the tensors to train."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    selected = tensors.keys() - frozen_names(model) if trainable is None else set(trainable)
    assert selected <= tensors.keys(), f"not in the model: {sorted(selected - tensors.keys())}"
    ids = {id(tensor) for name, tensor in tensors.items() if name in selected}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    return ids
