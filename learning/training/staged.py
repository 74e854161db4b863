"""Training of a part whose forward pass is a path of stages: frozen blocks, trained ones, and proxies in place of others.

Frozen stages before the first trained one run without gradients and in evaluation mode, so that none of their activations is
kept (ProFL, arXiv 2404.13349). Three objectives::

    train      loss(path(x), y)
    imitate    |proxy(h) - blocks(h)|^2 / |blocks(h)|^2, mean over the samples; h: what enters the blocks
    collect    no gradient: running statistics of the blocks, as means over the device's samples

``imitate`` is feature distillation. Each sample's error is taken relative to the length of what the blocks give, so that large
activations do not dominate; the proxy learns their scale too, which the layers behind it rely on. ``collect`` gives
normalisation layers of blocks that are still untrained the statistics that they need in evaluation mode: those of a standard
normal distribution, with which they begin, are not theirs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..data.types import Samples, Transform
from ..parts.submodel import Stage
from ..randomness import seeded
from ..spec import Precision, Training
from .losses import Loss, scalar_loss
from .precision import autocast, in_layout
from .recompute import recomputed
from .training import TrainingResult

_SHORTEST = 1e-12  # squared length of a target, below which errors are not relative to it
Call = Callable[[str, Tensor], Tensor]  # the output of a stage, by its name


def run_stages(
    stages: Sequence[Stage], call: Call, x: Tensor, *, learning: bool = False, frozen: Precision = "float32"
) -> Tensor:
    """The output of the last stage. Stages before the first trained one run without gradients.

    ``frozen``: precision of these; float32 leaves it at that of the others. ``learning``: gradients are needed from the first
    stage on, because the input requires them.
    """
    for stage in stages:
        learning = learning or stage.trained
        if learning:
            x = call(stage.name, _raised(x, frozen))
            frozen = "float32"
            continue
        with torch.no_grad(), autocast("bf16") if frozen == "bf16" else nullcontext():
            x = call(stage.name, x)
    return _raised(x, frozen)


def _raised(x: Tensor, frozen: Precision) -> Tensor:
    """What leaves frozen stages in float32. (A block may give a tuple to the next one; that is left as it is.)"""
    return x.float() if frozen == "bf16" and isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x


def frozen_before(stages: Sequence[Stage]) -> tuple[str, ...]:
    """The stages before the first trained one."""
    first = next((number for number, stage in enumerate(stages) if stage.trained), len(stages))
    return tuple(stage.name for stage in stages[:first])


def entering(stages: Sequence[Stage], blocks: Sequence[str]) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """The stages before the first of ``blocks``, and these blocks' own."""
    first = next(number for number, stage in enumerate(stages) if stage.name in blocks)
    return tuple(stages[:first]), tuple(stages[first:])


def imitation_loss(output: Tensor, target: Tensor) -> Tensor:
    """The squared distance by the squared length of the target, mean over the samples."""
    student, teacher = output.flatten(1).float(), target.flatten(1).float()
    length = teacher.square().sum(dim=1).clamp_min(_SHORTEST)
    return ((student - teacher).square().sum(dim=1) / length).mean()


class StagedModel:
    """Gradients of a path of stages; the ``gradient`` argument of ``train``."""

    def __init__(
        self, stages: Sequence[Stage], modules: Mapping[str, nn.Module], *, training: Training, loss: Loss
    ) -> None:
        """``modules``: by the stages' names."""
        self._stages, self._modules, self._training, self._loss = stages, modules, training, loss
        self._frozen = {stage.name for stage in stages if not stage.trained}

    def __call__(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """Accumulate ``share`` times the gradient of a micro-batch; returns its loss."""
        inputs = in_layout(inputs, self._training.layout)
        with autocast(self._training.precision):
            value = scalar_loss(self._loss(self._run(inputs), targets))
        if value.requires_grad:
            (value * share if share != 1 else value).backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    def _run(self, inputs: Tensor) -> Tensor:
        return run_stages(self._stages, self._call, inputs, frozen=self._training.frozen_precision)

    def _call(self, name: str, x: Tensor) -> Tensor:
        module = self._modules[name]
        if name in self._frozen:
            return _frozen(module, x)
        if self._training.checkpointing:
            buffers, precision = list(module.buffers()), self._training.precision
            return recomputed(module, x, buffers=buffers, precision=precision)  # type: ignore[no-any-return]
        output: Tensor = module(x)
        return output


class Imitation:
    """Gradients of a proxy that learns to do what blocks do; the ``gradient`` argument of ``train``."""

    def __init__(
        self,
        stages: Sequence[Stage],
        modules: Mapping[str, nn.Module],
        *,
        blocks: Sequence[str],
        proxy: nn.Module,
        training: Training,
    ) -> None:
        """``stages``: frozen ones up to the last of ``blocks``, which ``proxy`` imitates."""
        self._before, self._blocks = entering(stages, blocks)
        self._modules, self._proxy, self._training = modules, proxy, training

    def __call__(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """Accumulate ``share`` times the gradient of a micro-batch; returns its loss."""
        inputs = in_layout(inputs, self._training.layout)
        with autocast(self._training.precision):
            with torch.no_grad():
                frozen = self._training.frozen_precision
                inputs = run_stages(self._before, self._call, inputs, frozen=frozen)
                wanted = run_stages(self._blocks, self._call, inputs, frozen=frozen)
            value = imitation_loss(self._proxy(inputs), wanted)
        (value * share if share != 1 else value).backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    def _call(self, name: str, x: Tensor) -> Tensor:
        return _frozen(self._modules[name], x)


def _frozen(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a frozen stage. (``train`` leaves layers without tensors, such as dropout, in the model's mode.)"""
    output: Tensor = module.eval()(x)
    return output


def collect_statistics(
    stages: Sequence[Stage],
    modules: Mapping[str, nn.Module],
    samples: Samples,
    *,
    training: Training,
    transform: Transform,
    seed: int,
) -> TrainingResult:
    """Set the running statistics of the stages' normalisation layers to their means over ``samples``, one pass.

    Batches are those of training, in the order of the samples; the layers normalise by each batch. Dropout is off. ``steps`` of
    the result: batches; it has no loss.
    """
    count = len(samples)
    generator = torch.Generator().manual_seed(seed)
    norms = [module for stage in stages for module in modules[stage.name].modules() if isinstance(module, _NormBase)]
    batches = np.array_split(np.arange(count), -(-count // training.batch_size)) if count else []
    with torch.no_grad(), seeded(seed), _collecting([modules[stage.name] for stage in stages], norms):
        for indices in batches:
            inputs = in_layout(transform(samples.take(indices).x, generator), training.layout)
            with autocast(training.precision):
                run_stages(stages, lambda name, x: modules[name](x), inputs, frozen=training.frozen_precision)
    return TrainingResult(steps=len(batches), processed=count)


@contextmanager
def _collecting(modules: Sequence[nn.Module], norms: Sequence[_NormBase]) -> Iterator[None]:
    """Everything in evaluation mode but normalisation layers, which replace their statistics by a mean over batches."""
    momenta = [norm.momentum for norm in norms]
    for module in modules:
        module.eval()
    for norm in norms:
        if norm.running_mean is not None:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
