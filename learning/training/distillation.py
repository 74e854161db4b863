"""Ensemble distillation: the averaged model learns from the mean logits of the devices' models on public samples.

Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020, arXiv 2006.07242 (FedDF):

    loss = T^2 KL(softmax(zbar / T) || softmax(z / T)),    zbar = sum_k w_k z_k / sum_k w_k

with the factor T^2 of Hinton et al., arXiv 1503.02531, sec. 2, which keeps the size of the gradient independent of T. Teachers
run once over the public set, and only the sum of their logits is kept; so the student sees the inputs without random
transforms, as the teachers did.

Teachers that lack classes: a model trained on two classes is confidently wrong on samples of all others, and drives the logits
of the others down without having seen them. ``adjust`` subtracts ``strength`` x log p_k(y) (logit adjustment, Menon et al.,
ICLR 2021, arXiv 2007.07314), with p_k the teacher's shares of the classes, and removes its vote on absent classes. For teachers
with different absent classes the choice of what replaces the vote matters:

- the raw logit of an absent class is a vote against it, by a model that knows nothing about it;
- a constant in its place is a vote too: for the class if the other logits are below it, and else against it;
- with no entry in its place, the mean of a class is over the teachers that have seen it. This is what is done here. Logits are
  determined only up to a constant for each sample, though, which differs between teachers, and which cancels only where all of
  them enter the means of all classes. The adjusted logits are therefore centred: their mean over the teacher's own classes is
  0 for each sample.

A teacher that has seen all classes equally is changed by a constant for each sample, which no softmax sees. A class that no
teacher has seen is left out of both distributions of the loss, so that the student's logit of it gets no gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import batches
from ..data.public import PublicSet
from ..data.types import Samples, Transform
from ..parts.module_state import ModuleState
from ..randomness import seeded
from ..spec import CountOrZero, Distillation, Layout, Optimiser, Precision, Training
from .evaluation import predict
from .losses import Loss, accuracy
from .training import Stepper, WholeModel

_CLIP_NORM = 5.0
_ABSENT = -math.inf  # the logit of a class without a vote


def teacher_logits(
    model: nn.Module,
    samples: Samples,
    *,
    transform: Transform,
    batch_size: int = 256,
    layout: Layout = "contiguous",
    precision: Precision = "float32",
) -> Tensor:
    """Return the model's logits ``[sample, class]`` in float32, computed in evaluation mode and without gradients.

    The model is left in evaluation mode and otherwise unchanged, as by ``evaluation.evaluate``; batches and random numbers are
    the same as there.

    Raises:
        ValueError: if there are no samples, or if the output is not logits of two classes or more.
    """
    count = len(samples)
    if count == 0:
        raise ValueError("distillation needs at least one public sample")
    model.eval()
    generator = torch.Generator().manual_seed(0)
    state, parts = ModuleState(model, values=True), list[Tensor]()
    try:
        with torch.inference_mode(), seeded(0):
            for indices in np.array_split(np.arange(count), -(-count // batch_size)):
                inputs = transform(samples.take(indices).x, generator)
                output = predict(model, inputs, layout=layout, precision=precision)
                parts.append(_logits(output, len(indices)))
    finally:
        state.restore()
    return torch.cat(parts)  # outside of inference mode, whose tensors cannot be targets of a loss


def adjust(logits: Tensor, label_counts: Sequence[float], strength: float) -> Tensor:
    """Correct a teacher's logits for the classes that it has and lacks; see the module's description.

    Args:
        logits: ``[sample, class]``.
        label_counts: number of the teacher's training samples of each class.
        strength: factor on the log of the class shares; 0 means no correction at all, not even for absent classes.

    Returns:
        ``z - strength log p`` minus its mean over the teacher's classes; -inf for classes that it lacks.

    Raises:
        ValueError: if the counts do not fit the logits, are negative or not finite, or are all 0.
    """
    counts = torch.as_tensor(label_counts, dtype=torch.float64, device=logits.device)
    if counts.shape != logits.shape[1:] or not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise ValueError(
            f"label counts are {list(label_counts)} for logits of {logits.shape[1]} classes; there must be a number from 0 for "
            "each class"
        )
    if not bool(counts.any()):
        raise ValueError("label counts are all 0; a teacher has at least one sample")
    if strength == 0:
        return logits
    seen = counts > 0
    shares = (counts / counts.sum()).where(seen, 1.0)
    adjusted = logits - (strength * shares.log()).to(logits.dtype)
    level = adjusted.where(seen, 0.0).sum(dim=1, keepdim=True) / seen.sum()
    return (adjusted - level).where(seen, _ABSENT)


class TeacherMean:
    """Running weighted mean of teachers' logits ``[sample, class]``. The logits of no teacher are kept.

    Sums are float32. Weights are summed in float64 for each class, since teachers may lack classes (``adjust``).
    """

    # Attributes that a checkpoint saves, with their types.
    SAVED: ClassVar[dict[str, Any]] = {"num_teachers": CountOrZero, "_sums": Tensor | None, "_weights": Tensor | None}
    NOT_SAVED = ()

    def __init__(self) -> None:
        """Start empty."""
        self.num_teachers = 0
        self._sums: Tensor | None = None
        self._weights: Tensor | None = None

    def add(self, logits: Tensor, weight: float) -> None:
        """Add a teacher. A class whose logits are all -inf gets no vote from it.

        Raises:
            ValueError: if the weight is not finite and above 0, other logits are not finite, or their shape is not that of
                earlier teachers. The mean is unchanged then.
        """
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of a teacher is {weight}; it must be a finite number above 0")
        if self._sums is not None and logits.shape != self._sums.shape:
            raise ValueError(
                f"a teacher's logits have shape {tuple(logits.shape)}; those of others have {tuple(self._sums.shape)}"
            )
        seen = (logits != _ABSENT).any(dim=0)
        votes = logits.to(torch.float32).where(seen, 0.0)
        if not bool(torch.isfinite(votes).all()):
            raise ValueError("a teacher's logits are not finite")
        weights = seen.to(torch.float64) * weight
        if self._sums is None or self._weights is None:
            self._sums, self._weights = votes * weight, weights
        else:
            self._sums.add_(votes, alpha=weight)
            self._weights.add_(weights)
        self.num_teachers += 1

    def mean(self) -> Tensor:
        """The mean, float32; -inf for classes that no teacher has seen. Raises ``ValueError`` without teachers."""
        if self._sums is None or self._weights is None:
            raise ValueError("there is no teacher")
        return (self._sums / self._weights.to(torch.float32)).where(self._weights > 0, _ABSENT)


def distillation_loss(output: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """``T^2 KL(softmax(target / T) || softmax(output / T))``, the mean over the batch; both ``[sample, class]``.

    Classes whose target is -inf are left out of both distributions.
    """
    goal = target.to(output.device, torch.float32)
    absent = goal == _ABSENT
    wanted = torch.log_softmax(goal / temperature, dim=1)
    given = torch.log_softmax(output.float().masked_fill(absent, _ABSENT) / temperature, dim=1)
    # -inf minus -inf is replaced here, before it can meet a gradient.
    terms = wanted.exp() * (wanted - given).masked_fill(absent, 0.0)
    return temperature**2 * terms.sum(dim=1).mean()


@dataclass(frozen=True)
class Figures:
    """Figures on the held-out public samples: distillation loss, and accuracy if the public labels are those of the task."""

    loss: float
    accuracy: float | None = None

    def better_than(self, other: "Figures") -> bool:
        """Whether the accuracy is higher, or, where it is equal or unknown, the loss lower.

        A loss that is not finite is worse than all others.
        """
        return self._rank() > other._rank()

    def _rank(self) -> tuple[float, float]:
        if not math.isfinite(self.loss):
            return -math.inf, -math.inf
        return self.accuracy or 0.0, -self.loss


@dataclass(frozen=True)
class DistillationResult:
    """Result of a distillation.

    ``steps``: optimiser steps made. ``best_step``: number of steps after which the returned student was reached (0: the initial
    one). ``before``, ``after``: figures of the initial and of the returned student. ``processed``: samples trained on,
    repetitions counted. ``evaluated``: samples that only went forward.
    """

    steps: int
    best_step: int
    before: Figures
    after: Figures
    processed: int
    evaluated: int


def distil(
    student: nn.Module,
    public: PublicSet,
    targets: Tensor,
    *,
    settings: Distillation,
    trainable: Sequence[str] | None,
    seed: int,
    precision: Precision = "float32",
    layout: Layout = "contiguous",
) -> DistillationResult:
    """Train ``student`` in place towards ``targets`` on the public samples that are not held out.

    Adam, its learning rate decaying to 0 by a cosine over ``settings.steps``, gradients clipped to norm 5. Every
    ``settings.check_every`` steps, and after the last one, the student is evaluated on the held-out samples
    (``Figures.better_than``); the parameters and buffers of the best evaluation are kept, that before the first step included.
    So by these figures the student is never worse than before. The student is left in evaluation mode, without gradients; the
    process's random state is restored.

    Args:
        student: the model.
        public: the public set.
        targets: mean logits of the teachers for all samples of ``public``, ``[sample, class]``.
        settings: of the distillation. ``weighting`` and ``class_prior`` concern the targets, ``held_out`` the public set.
        trainable: as in ``training.train``. If nothing can be trained, no step is made.
        seed: of batch order, dropout, and random numbers of the transform.
        precision: of forward passes; losses are computed in float32.
        layout: memory format of image batches.

    Raises:
        ValueError: if the student's output is not logits ``[sample, class]``, or if the targets have another shape.
    """
    loss = partial(distillation_loss, temperature=settings.temperature)
    optimiser = Optimiser(name="adam", learning_rate=settings.learning_rate, clip_norm=_CLIP_NORM)
    training = Training(optimiser=optimiser, batch_size=settings.batch_size, precision=precision, layout=layout)
    held_out = _HeldOut(public, targets, loss=loss, training=training)
    before = held_out.figures(student)
    stepper = Stepper(student, training=training, trainable=trainable)
    gradient = WholeModel(student, training=training, loss=loss)
    best = _Best(student, before)
    samples, generator = Samples(public.samples.x, targets), torch.Generator().manual_seed(seed)
    steps, done, processed = settings.steps if stepper.parameters else 0, 0, 0
    order = batches(len(public.train), batch_size=settings.batch_size, steps=steps, seed=seed)
    with stepper, seeded(seed):  # for dropout, which takes no generator
        for positions in order:
            stepper.set_learning_rate(settings.learning_rate * (1 + math.cos(math.pi * done / steps)) / 2)
            batch = samples.take(public.train[positions])
            gradient(public.transform(batch.x, generator), batch.y, 1.0)
            stepper.step()
            done, processed = done + 1, processed + len(positions)
            if done % settings.check_every == 0 or done == steps:
                best.update(held_out.figures(student), step=done)
                stepper.set_modes()
                if done - best.step >= settings.patience:
                    break
    best.restore()
    return DistillationResult(done, best.step, before, best.figures, processed, held_out.evaluated)


class _HeldOut:
    """Evaluates a student on the held-out samples. ``evaluated``: samples so far, repetitions counted."""

    def __init__(self, public: PublicSet, targets: Tensor, *, loss: Loss, training: Training) -> None:
        """``training``: for precision and memory format. Raises ``ValueError`` unless each public sample has a target."""
        if len(targets) != len(public):
            raise ValueError(
                f"the teachers' mean logits have shape {tuple(targets.shape)} for {len(public)} public samples, one row each"
            )
        self.evaluated = 0
        self._samples = public.samples.take(public.held_out)
        self._targets = Samples(public.samples.x, targets).take(public.held_out).y
        self._transform, self._labelled = public.transform, public.labelled
        self._loss, self._training = loss, training

    def figures(self, student: nn.Module) -> Figures:
        """Evaluate. Raises ``ValueError`` if the student's classes are not those of the targets."""
        samples, training = self._samples, self._training
        logits = teacher_logits(
            student,
            samples,
            transform=self._transform,
            layout=training.layout,
            precision=training.precision,
        )
        if logits.shape != self._targets.shape:
            raise ValueError(
                f"the teachers' mean logits are of shape {list(self._targets.shape[1:])} for each sample; the student gives "
                f"{logits.shape[1]} classes"
            )
        self.evaluated += len(samples)
        hits = accuracy(logits, samples.y.to(logits.device)).double().mean().item() if self._labelled else None
        return Figures(float(self._loss(logits, self._targets)), hits)


class _Best:
    """The best student so far: its figures, its step, and a copy of its trainable parameters and of all buffers."""

    def __init__(self, student: nn.Module, figures: Figures) -> None:
        """Begin with the initial student."""
        self.figures, self.step = figures, 0
        self._student, self._kept = student, _copy(student)

    def update(self, figures: Figures, *, step: int) -> None:
        """Keep the student if its figures are better than the best so far."""
        if figures.better_than(self.figures):
            self.figures, self.step, self._kept = figures, step, _copy(self._student)

    def restore(self) -> None:
        """Copy the best values back, and leave the student in evaluation mode."""
        with torch.no_grad():
            for name, tensor in _changing(self._student).items():
                tensor.copy_(self._kept[name])
        self._student.eval()


def _logits(output: object, count: int) -> Tensor:
    """The output of a batch of ``count`` samples in float32. Raises ``ValueError`` if it is not logits."""
    if isinstance(output, Tensor) and output.is_floating_point() and _is_table(output.shape, count):
        return output.to(torch.float32)
    given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ValueError(
        f"distillation needs logits [sample, class] of two classes or more; the model gives {given} for {count} samples"
    )


def _is_table(shape: torch.Size, count: int) -> bool:
    """Whether a shape is ``[count, class]`` with two classes or more."""
    return len(shape) == 2 and shape[0] == count and shape[1] >= 2


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters and of all buffers."""
    return {name: tensor.detach().clone() for name, tensor in _changing(model).items()}


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and all buffers, by name."""
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return parameters | dict(model.named_buffers())
