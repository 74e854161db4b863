"""Central training on public samples, before any federated round, by the recipe of EcoFed's code.

Wu et al., IEEE TPDS 35(3), 2024, arXiv 2304.05495: SGD with Nesterov momentum 0.9 and weight decay 5e-4, batches of 128,
learning rate 0.01, a tenth of it from half of the epochs on and a hundredth from four fifths on; the weights with the best
accuracy on the training samples are kept. Here that accuracy is measured after each epoch, in evaluation mode and without the
random transforms of training. Ties are resolved by the lower loss; without class labels only the loss is compared.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from torch import Tensor, nn

from ..data.batches import batches
from ..data.types import FederatedData
from ..parts.blocks import cut
from ..seeds import derive
from ..spec import Count, Fraction, NonNegative, Optimiser, Positive, Training
from .evaluation import evaluate
from .losses import Loss, default_metrics, make_metric
from .training import Stepper, WholeModel, run_steps


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to pretrain: stochastic gradient descent in ``epochs`` passes."""

    epochs: Count = 100
    learning_rate: Positive = 0.01
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 5e-4
    batch_size: Count = 128

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch; epochs are counted from 0."""
        decays = (2 * epoch >= self.epochs) + (5 * epoch >= 4 * self.epochs)
        return self.learning_rate * 0.1**decays

    def training(self, base: Training) -> Training:
        """Training settings for one epoch of this recipe, with loss, precision and memory format of ``base``."""
        optimiser = Optimiser(
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )
        return msgspec.structs.replace(base, optimiser=optimiser, batch_size=self.batch_size, epochs=1, steps=None)


@dataclass(frozen=True)
class Epoch:
    """Result of an epoch (counted from 1). ``figures``: loss and accuracy on the training samples after it."""

    number: int
    learning_rate: float
    figures: dict[str, float]
    best: bool

    def __str__(self) -> str:
        """One line for the command line."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.figures.items())
        return f"epoch {self.number}: {figures}, learning rate {self.learning_rate:g}{' (best so far)' if self.best else ''}"


def pretrain(
    model: nn.Module, data: FederatedData, *, recipe: Recipe, training: Training, loss: Loss, seed: int
) -> Iterator[Epoch]:
    """Train ``model`` in place on the samples of device 0 of ``data``, and yield the result of each epoch.

    At the end the model has the weights of its best epoch. An epoch whose loss is not finite is never the best; if there is no
    other, the model has its initial weights. ``training``: for loss, precision, memory format and
    checkpointing.
    """
    samples, training = data.train(0), recipe.training(training)
    metrics = {call.name: make_metric(call) for call in default_metrics(training.loss, samples.y[0])}
    blocks = cut(model) if training.checkpointing else None
    stepper = Stepper(model, training=training, trainable=None)
    gradient = WholeModel(model, training=training, loss=loss, blocks=blocks)
    best, best_state = (-math.inf, -math.inf), _copy(model)
    for number in range(recipe.epochs):
        epoch_seed = derive(seed, "epoch", number)
        order = batches(len(samples), batch_size=training.batch_size, seed=epoch_seed)
        stepper.set_learning_rate(recipe.rate(number))
        stepper.set_modes()
        with stepper:
            run_steps(
                stepper, gradient, samples, order, training=training, transform=data.train_transform, seed=epoch_seed
            )
        figures = evaluate(
            model,
            samples,
            loss=loss,
            metrics=metrics,
            transform=data.test_transform,
            layout=training.layout,
            precision=training.precision,
        )
        reached = figures.get("accuracy", 0.0), -figures["loss"]
        better = math.isfinite(figures["loss"]) and reached > best
        if better:
            best, best_state = reached, _copy(model)
        yield Epoch(number + 1, recipe.rate(number), figures, better)
    model.load_state_dict(best_state)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's tensors."""
    return copy.deepcopy(model.state_dict())
