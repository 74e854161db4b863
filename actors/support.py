"""Checks of which plans this version can carry out. Any other plan is refused before dispatch, never carried out in part."""

from collections.abc import Iterator

from ..clusters.profile import DeviceProfile
from ..comms.codec import ArraySpec, Codec, CodecSpec, needs_reference
from ..comms.codecs.make_codec import make_codec
from ..comms.links.predict import Residual, residual_specs
from ..learning.parts.part import Part, blocks_of, linear_head, path
from ..learning.parts.structure import TensorSpec
from ..learning.parts.submodel import SubModel
from ..learning.spec import Sparsity
from ..learning.workload import Workload
from ..policies.plan import Plan, Split
from .messages.messages import array_specs, update_tensors


class PlanRefused(ValueError):
    """A plan of a policy cannot be carried out. One sentence says which field and why."""


def check_plan(plan: Plan, workload: Workload, *, profile: DeviceProfile) -> None:
    """Raise ``PlanRefused`` if the trainer, the model or the device does not support a field of ``plan``."""
    for problem in _problems(plan, workload, profile):
        raise PlanRefused(f"plan for device {plan.device} in round {plan.version}: {problem}")


def _problems(plan: Plan, workload: Workload, profile: DeviceProfile) -> Iterator[str]:
    """All problems of a plan; those of the part first, since the others need it compiled."""
    if plan.part.model not in workload.families:
        yield f"part.model is {plan.part.model!r}; the families of models are: {', '.join(map(repr, workload.families))}"
    yield from _part(plan, workload)
    yield from _work(plan)
    yield from _sparsity(plan.training.sparsity, workload.settings.sparsity)
    submodel = workload.submodel(plan.part)
    yield from _codecs(plan, profile, submodel)
    yield from _links(plan)
    yield from _privacy(plan, submodel, profile)


def _part(plan: Plan, workload: Workload) -> Iterator[str]:
    """Problems with the part of the model."""
    part, split = plan.part, plan.split
    spec = workload.family(part.model).spec
    names = spec.block_names
    if unknown := [name for name in (*part.blocks, *part.trained) if name not in names]:
        yield f"part names block {unknown[0]!r}; the model's blocks are: {', '.join(names)}"
    if extra := [name for name in part.trained if name not in part.blocks]:
        yield f"part.trained names {extra[0]!r}, which is not among part.blocks"
    if extra := [name for name in part.untrained if name not in part.auxiliaries]:
        yield f"part.untrained names {extra[0]!r}, which is not among part.auxiliaries"
    if split is not None:
        yield from _cut(part, split, names)
        yield from _tensors_of_cut(part, split)
        yield from _heads(part, split)
    else:
        yield from _path(plan, workload)
    if part.cached or part.frozen or part.index_map:
        yield "part.cached, part.frozen or part.index_map is set; the runtime fills them in"
    if part.width != 1:
        yield from _width(part, workload)


def _path(plan: Plan, workload: Workload) -> Iterator[str]:
    """Problems with the stages of a plan that is not split."""
    part, kind = plan.part, plan.objective.kind
    spec = workload.family(part.model).spec
    names = spec.block_names
    if part.head:
        yield f"part.head is {part.head!r}; without a local loss behind a cut the head is the model's own"
    held = tuple(name for name in names if name in part.blocks)
    if part.blocks != held:
        yield f"part.blocks is {', '.join(part.blocks)}; their order is: {', '.join(held)}"
    try:
        proxies = {name: blocks_of(name, names) for name in part.auxiliaries}
        stages = path(part, names)
        spec.auxiliary_tensors(part.auxiliaries)
    except ValueError as error:
        yield str(error)
        return
    if (part.trained != part.blocks or part.auxiliaries) and (part.width != 1 or part.model):
        field = f"part.width is {part.width:g}" if part.width != 1 else f"part.model is {part.model!r}"
        yield f"{field}; a part with frozen blocks or proxies is of the global model, at the whole width"
    covered = {*held, *(block for blocks in proxies.values() for block in blocks)}
    if kind in ("train", "evaluate"):
        if missing := [name for name in names if name not in covered]:
            yield f"part.blocks is {', '.join(part.blocks) or 'empty'}; neither {missing[0]!r} nor a proxy for it is held"
        if unused := [name for name in part.auxiliaries if name not in stages]:
            yield f"part.auxiliaries names {unused[0]!r}, and the part holds blocks that it stands for"
        return
    if covered != set(names[: len(covered)]) or not held or part.trained:
        yield f"part.blocks is {', '.join(part.blocks) or 'empty'}; to {kind}, a part holds the first blocks, and trains none"
    taught = [name for name in part.auxiliaries if name not in part.untrained]
    if kind == "collect" and part.auxiliaries:
        yield f"part.auxiliaries names {part.auxiliaries[0]!r}; statistics are collected of blocks alone"
    if kind == "imitate" and (
        len(taught) != 1 or part.auxiliaries != tuple(taught) or held[-1:] != proxies[taught[0]][-1:]
    ):
        yield (
            f"part.auxiliaries is {', '.join(part.auxiliaries) or 'empty'}; the one proxy that learns to imitate blocks stands "
            f"for the last ones of part.blocks"
        )


def _tensors_of_cut(part: Part, split: Split) -> Iterator[str]:
    """A trunk is of the global model; trunks, auxiliaries and shared heads are of the whole width."""
    if part.model and not split.method.trains_front:
        yield f"part.model is {part.model!r} under {split.mode!r}; the frozen trunk is that of the global model"
    own_blocks = split.method.trains_front and not split.method.local_head and not split.shares_head
    if part.width != 1 and not own_blocks:
        yield (
            f"part.width is {part.width:g} under {split.mode!r} with head {split.head!r}; a cut model can be narrow only where "
            "each device has its own copy of all blocks, and gradients come back"
        )


def _width(part: Part, workload: Workload) -> Iterator[str]:
    """Problems with a narrow part."""
    try:
        _ = workload.family(part.model).groups
    except ValueError as error:
        yield f"part.width is {part.width:g}; {error}"
    if workload.family(part.model).spec.frozen_parameters:
        yield f"part.width is {part.width:g}; a model with frozen parameters, which are not sent, is trained at width 1 only"


def _heads(part: Part, split: Split) -> Iterator[str]:
    """Problems with the auxiliaries of a split plan: a local loss needs its head, and no other plan may have one."""
    required = linear_head(split.cut) if split.method.local_head else ""
    if part.head != required or part.auxiliaries != ((required,) if required else ()) or part.untrained:
        values = f"part.head is {part.head!r} and part.auxiliaries {', '.join(part.auxiliaries) or 'empty'}"
        if required:
            yield f"{values}; a local loss behind {split.cut!r} has the head {required!r}, its one auxiliary"
        else:
            yield f"{values}; a split plan without a local loss has neither"


def _cut(part: Part, split: Split, names: tuple[str, ...]) -> Iterator[str]:
    """Problems with the position of a cut."""
    if split.cut not in names[:-1]:
        yield f"split.cut is {split.cut!r}; this model can be cut behind: {', '.join(names[:-1]) or 'no block'}"
        return
    front = names[: names.index(split.cut) + 1]
    if part.blocks != front:
        yield f"part.blocks is {', '.join(part.blocks)}; a plan cut behind {split.cut!r} holds {', '.join(front)}"
    if not split.method.trains_front:
        if split.depth not in names[names.index(split.cut) : -1]:
            allowed = ", ".join(names[names.index(split.cut) : -1])
            yield f"split.depth is {split.depth!r}; the trunk ends at the cut or behind it, before the last block: {allowed}"
        if part.trained:
            yield f"part.trained is {', '.join(part.trained)}; a device trains nothing under {split.mode!r}"
    elif part.trained != part.blocks:
        yield "part.trained differs from part.blocks; a split plan trains all that it holds"


def _split(plan: Plan, split: Split) -> Iterator[str]:
    """Problems with the other fields of a split."""
    if not split.method.trains_front and split.shares_head:
        yield f"split.head is {split.head!r}; under {split.mode!r} every device has a copy of the host's blocks: 'slots'"
    if split.replays and split.method.trains_front:
        yield f"split.view is {split.view!r}; {split.mode!r} buffers no views"
    if plan.part.model and not split.method.trains_front:
        yield f"part.model is {plan.part.model!r}; under {split.mode!r} the frozen trunk is that of the global model"
    if plan.link_down is not None or plan.link_up is not None:
        yield "link_down or link_up is set; the links of a split plan cannot have a memory yet"
    if plan.training.optimiser.clip_norm is not None:
        yield "training.optimiser.clip_norm is set; neither leg of a split plan sees the whole gradient"
    for field, codecs in (("split.codec_up", split.codec_up), ("split.codec_down", split.codec_down)):
        try:
            _without_reference(make_codec(codecs))
        except ValueError as error:
            yield f"{field}: {error}"


def _work(plan: Plan) -> Iterator[str]:
    """Problems with objective, training and upload."""
    if plan.split is not None:
        yield from _split(plan, plan.split)
    if plan.split is not None and plan.objective.kind in ("imitate", "collect"):
        yield f"objective.kind is {plan.objective.kind!r}; a split plan trains or evaluates"
    if plan.training.precision == "auto":
        yield "training.precision is 'auto'; of a plan it must be float32 or bf16"
    if plan.training.layout == "auto":
        yield "training.layout is 'auto'; of a plan it must be contiguous or channels_last"
    if plan.whole_steps or plan.train_s is not None or plan.memory_bytes is not None:
        yield "whole_steps, train_s or memory_bytes is set; the runtime fills them in"
    if plan.deadline_s is not None:
        yield from _deadline(plan, plan.deadline_s)


def _sparsity(own: Sparsity | None, model: Sparsity | None) -> Iterator[str]:
    """Problems with a plan's sparsity in a run whose models have that of ``model``."""
    if (own is None) != (model is None):
        given, built = ("null", "set") if own is None else ("set", "null")
        yield f"training.sparsity is {given}, and {built} in the configuration, from which the model's layers are built"
    elif own is not None and model is not None and own.layers != model.layers:
        yield "training.sparsity.layers differs from the configuration's, which holds for all plans"


def _deadline(plan: Plan, deadline_s: float) -> Iterator[str]:
    """Problems with a deadline for training."""
    if not deadline_s > 0:
        yield f"deadline_s is {deadline_s:g}; it must be above 0"
    if plan.objective.kind == "evaluate":
        yield f"deadline_s is {deadline_s:g}; an evaluation cannot stop early"
    if plan.split is not None and not plan.trains_on_device:
        yield f"deadline_s is {deadline_s:g}; under {plan.split.mode!r} a device uploads whole views, and cannot stop early"


def _codecs(plan: Plan, profile: DeviceProfile, submodel: SubModel) -> Iterator[str]:
    """Problems with the codecs of either direction."""
    up = update_tensors(plan, submodel)
    directions = (
        ("codec_down", plan.codec_down, plan.link_down, submodel.down),
        ("codec_up", plan.codec_up, plan.link_up, up),
    )
    for field, codecs, link, tensors in directions:
        for codec in codecs:
            if profile.codecs is not None and codec.name not in profile.codecs:
                runs = ", ".join(sorted(profile.codecs)) or "none"
                yield f"{field} names {codec.name!r}, which does not run on fleet class {profile.name!r}; it runs: {runs}"
        try:
            chain_layout(codecs, tensors, link, of_update=field == "codec_up")
        except ValueError as error:
            yield f"{field}: {error}"


def chain_layout(
    codecs: tuple[CodecSpec, ...], tensors: tuple[TensorSpec, ...], link: Residual | None = None, *, of_update: bool
) -> tuple[ArraySpec, ...]:
    """The layout of these tensors after a codec chain; raises ``ValueError`` for an unknown or unsuitable chain.

    ``of_update``: whether the message is an update, which alone has a reference to select by.
    """
    specs, codec = array_specs(tensors), make_codec(codecs)
    if not of_update:
        _without_reference(codec)
    return codec.layout(residual_specs(specs, link) if link else specs)


def _without_reference(codec: Codec) -> None:
    """Raises ``ValueError`` for a chain that selects by a reference, for messages that have none."""
    if needs_reference(codec):
        raise ValueError("by is 'reference', which selects by the trained weights; only an update can: use 'sent' here")


def _links(plan: Plan) -> Iterator[str]:
    """Problems with links with memory."""
    try:
        if plan.link_down is not None:
            plan.link_down.check_down()
    except ValueError as error:
        yield f"link_down: {error}"
    if plan.link_up is None:
        return
    try:
        plan.link_up.check_up()
    except ValueError as error:
        yield f"link_up: {error}"
    if plan.upload.payload != "difference":
        yield f"upload.payload is {plan.upload.payload!r}; an uplink with memory (link_up) sends residuals: 'difference'"


def _privacy(plan: Plan, submodel: SubModel, profile: DeviceProfile) -> Iterator[str]:
    """Kinds of data that would leave the device although its profile does not allow it."""
    if plan.objective.kind == "evaluate":
        return
    allowed = f"fleet class {profile.name!r} may send only: {', '.join(sorted(profile.may_send)) or 'nothing'}"
    if plan.part.learns and "weights" not in profile.may_send:
        yield f"it sends weights, and {allowed}"
    for kind in ("activations", "labels") if plan.split is not None else ():
        if kind not in profile.may_send:
            yield f"it is split and sends {kind}, and {allowed}"
    if plan.upload.label_counts and "labels" not in profile.may_send:
        yield f"it sends label counts (upload.label_counts is true), and {allowed}"
    if (
        any(tensor.role == "statistic" for tensor in update_tensors(plan, submodel))
        and "statistics" not in profile.may_send
    ):
        yield f"it sends running statistics (upload.statistics is true, or it collects them), and {allowed}"
