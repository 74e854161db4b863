"""The objectives of a plan that is not split: what a device does with its part and its samples."""

from collections.abc import Callable

from torch import nn

from ...learning.data.types import Samples
from ...learning.parts.blocks import Blocks
from ...learning.parts.part import blocks_of
from ...learning.training.losses import make_loss
from ...learning.training.staged import Imitation, StagedModel, collect_statistics
from ...learning.training.training import Gradient, TrainingResult, train
from ...learning.workload import Workload
from ...policies.plan import Plan
from .module import Module

Over = Callable[[], bool] | None


def train_part(plan: Plan, module: Module, samples: Samples, workload: Workload, over: Over) -> TrainingResult:
    """Train the part on the loss: the model as a whole, or, where blocks are frozen or replaced, stage by stage."""
    submodel = workload.submodel(plan.part)
    loss, gradient = make_loss(plan.training.loss), None
    if plan.part.trained != submodel.spec.block_names:
        gradient = StagedModel(submodel.stages, _modules(plan, module, workload), training=plan.training, loss=loss)
    recomputed = gradient is None and plan.training.checkpointing
    return _train(plan, module, samples, workload, gradient, over, module.blocks if recomputed else None)


def imitate(plan: Plan, module: Module, samples: Samples, workload: Workload, over: Over) -> TrainingResult:
    """Train the part's proxy to do what the blocks do that it stands for."""
    submodel = workload.submodel(plan.part)
    (name,) = plan.part.auxiliaries
    gradient = Imitation(
        submodel.stages,
        _modules(plan, module, workload),
        blocks=blocks_of(name, submodel.spec.block_names),
        proxy=module.auxiliary(name),
        training=plan.training,
    )
    return _train(plan, module, samples, workload, gradient, over)


def collect(plan: Plan, module: Module, samples: Samples, workload: Workload, over: Over) -> TrainingResult:
    """Collect the running statistics of the part's blocks."""
    return collect_statistics(
        workload.submodel(plan.part).stages,
        _modules(plan, module, workload),
        samples,
        training=plan.training,
        transform=workload.data.train_transform,
        seed=plan.seed,
    )


def evaluated(plan: Plan, module: Module, workload: Workload) -> nn.Module:
    """What a plan that evaluates is about: the model, or, where proxies stand for blocks, the part's stages."""
    if plan.split is None and plan.part.auxiliaries:
        return nn.Sequential(*_modules(plan, module, workload).values())
    return module.model


OBJECTIVES = {"train": train_part, "imitate": imitate, "collect": collect}


def _train(
    plan: Plan,
    module: Module,
    samples: Samples,
    workload: Workload,
    gradient: Gradient | None,
    over: Over,
    blocks: Blocks | None = None,
) -> TrainingResult:
    """Local training with these gradients; None: those of the whole model, whose ``blocks`` checkpointing recomputes."""
    for name in plan.part.untrained:
        module.auxiliary(name).requires_grad_(False).eval()
    return train(
        module.model,
        samples,
        training=plan.training,
        loss=make_loss(plan.training.loss),
        transform=workload.data.train_transform,
        seed=plan.seed,
        trainable=workload.submodel(plan.part).trained,
        gradient=gradient,
        auxiliaries=[module.auxiliary(name).requires_grad_(True) for name in plan.part.trained_auxiliaries],
        over=over,
        blocks=blocks,
    )


def _modules(plan: Plan, module: Module, workload: Workload) -> dict[str, nn.Module]:
    """The modules of the part's stages, by name."""
    stages = workload.submodel(plan.part).stages
    return {
        stage.name: module.auxiliary(stage.name) if stage.auxiliary else module.blocks.modules[stage.name]
        for stage in stages
    }
