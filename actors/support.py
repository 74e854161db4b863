"""Which plans this version can carry out. A plan that asks for more is refused before dispatch, never half obeyed."""

from ..clusters.profile import DeviceProfile
from ..learning.structure import ModelSpec
from ..policies.plan import Objective, Plan


class PlanRefused(ValueError):
    """A policy made a plan that cannot be carried out as it stands; one sentence says which field and why."""


def check_plan(plan: Plan, *, spec: ModelSpec, profile: DeviceProfile) -> None:
    """Raise ``PlanRefused`` when the trainer, the model or the device cannot do what ``plan`` says."""
    for problem in _problems(plan, spec, profile):
        raise PlanRefused(f"plan for device {plan.device} in round {plan.version}: {problem}")


def _problems(plan: Plan, spec: ModelSpec, profile: DeviceProfile) -> list[str]:
    """What stands against the plan, first things first."""
    part, found = plan.part, []
    names = spec.block_names
    if unknown := [name for name in (*part.blocks, *part.trained) if name not in names]:
        found.append(f"part names block {unknown[0]!r}; the model's blocks are: {', '.join(names)}")
    if extra := [name for name in part.trained if name not in part.blocks]:
        found.append(f"part.trained names {extra[0]!r}, which is not among part.blocks")
    if part.blocks != names:
        found.append(
            f"part.blocks holds {len(part.blocks)} of {len(names)} blocks; only whole models can be trained yet"
        )
    if part.width != 1 or part.index_map:
        found.append(f"part.width is {part.width:g}; only width 1 can be trained yet")
    if part.head or part.auxiliaries or part.cached:
        found.append("part.head, part.auxiliaries and part.cached must be empty; they cannot be carried out yet")
    if plan.split is not None:
        found.append("split is set; split training cannot be carried out yet")
    if plan.sparsity is not None:
        found.append("sparsity is set; sparse training cannot be carried out yet")
    if plan.objective not in (Objective(), Objective(kind="evaluate")):
        found.append(
            "objective must be plain training or evaluation; imitation and distillation cannot be carried out yet"
        )
    if plan.upload.select != "all" or plan.upload.density != 1:
        found.append(f"upload.select is {plan.upload.select!r}; only 'all' can be sent yet")
    if plan.training.checkpointing:
        found.append("training.checkpointing is true; activation checkpointing cannot be carried out yet")
    if plan.objective.kind == "train" and "weights" not in profile.may_send:
        found.append(
            f"it sends weights, and fleet class {profile.name!r} may send only: {', '.join(sorted(profile.may_send)) or 'nothing'}"
        )
    if profile.codecs is not None:
        for codec in (*plan.codec_down, *plan.codec_up):
            if codec.name not in profile.codecs:
                found.append(
                    f"codec {codec.name!r} does not run on fleet class {profile.name!r}; it runs: {', '.join(sorted(profile.codecs))}"
                )
    return found
