"""The Device: one plan in, one report out; packet bytes to packet bytes. A plain class, the same in process and on Ray.

A device worker has no memory of its own: what a simulated device must remember (link histories, error feedback) travels
as ``state`` with the plan and comes back with the report. What is kept between plans (the model's module, the data) is a
cache: any worker runs any device and gets the same bits. Only what a user's model hides outside its tensors could tell.
"""

import time

import msgspec
import torch
from torch import Tensor, nn

from ..comms.codecs import Array, ArraySpec, Context
from ..comms.make_codec import make_codec
from ..comms.packet import PacketKind, Stamp, seal, unseal
from ..learning.evaluation import evaluate
from ..learning.losses import make_loss
from ..learning.part import down_tensors, up_tensors
from ..learning.structure import TensorSpec
from ..learning.tensors import as_arrays, as_tensors
from ..learning.training import train
from ..learning.workload import Workload, WorkloadSettings
from ..policies.plan import Plan
from ..policies.report import Measured, Outcome, Report
from .meter import Meter

_ALLOCATOR_WORDS = ("DefaultCPUAllocator", "can't allocate memory", "out of memory")


class Device:
    """Runs plans for any device of an experiment.

    ``run`` never raises for what goes wrong with one plan: the report says the outcome, the stage (open, train, evaluate,
    seal) and the error.
    """

    def __init__(self, settings: WorkloadSettings) -> None:
        """Prepare for the workload; data and model are loaded at the first plan."""
        self.workload = Workload(settings)
        self._models: dict[bool, tuple[nn.Module, dict[str, Tensor]]] = {}
        self._stage = "open"  # of the plan that is being carried out

    def run(
        self, plan_bytes: bytes, packet: Array, state: bytes | None = None
    ) -> tuple[bytes, Array | None, bytes | None]:
        """Carry out one plan: (report, update packet or None, new device state), ready to be sent."""
        plan = msgspec.msgpack.decode(plan_bytes, type=Plan)
        report, update = Report(plan=plan, outcome=Outcome.FAILED, stage="open"), None
        with Meter() as meter:
            try:
                report, update = self._carry_out(plan, packet)
            except Exception as error:  # whatever user code raises: it becomes this plan's outcome, and is reported
                report = _failure(report, self._stage, error)
        measured = msgspec.structs.replace(
            report.measured, wall_s=meter.wall_s, peak_memory_bytes=meter.peak_memory_bytes
        )
        return msgspec.msgpack.encode(msgspec.structs.replace(report, measured=measured)), update, state

    def warm_up(self) -> None:
        """Load data and model now, so that the first plan is not charged for it."""
        self._model(channels_last=False)

    def _carry_out(self, plan: Plan, packet: Array) -> tuple[Report, Array | None]:
        """The stages of a plan."""
        self._stage = "open"
        model, base = self._open(plan, packet)
        if plan.objective.kind == "evaluate":
            self._stage = "evaluate"
            return self._evaluate(model, plan), None
        self._stage = "train"
        started = time.perf_counter()
        samples = self.workload.data.train(plan.device)
        result = train(
            model,
            samples,
            training=plan.training,
            loss=make_loss(plan.training.loss),
            transform=self.workload.data.train_transform,
            seed=plan.seed,
            trainable=self._trainable(plan),
        )
        train_s = time.perf_counter() - started
        self._stage = "seal"
        update = self._seal(model, base, plan)
        report = Report(
            plan=plan,
            samples=len(samples),
            steps=result.steps,
            loss=result.loss,
            loss_square=result.loss_square,
            measured=Measured(train_s=train_s),
        )
        return report, update

    def _model(self, *, channels_last: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        """This worker's module, and what its buffers held when it was new."""
        if channels_last not in self._models:
            model = self.workload.new_model()
            if channels_last:
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._models[channels_last] = model, {name: buffer.clone() for name, buffer in model.named_buffers()}
        return self._models[channels_last]

    def _open(self, plan: Plan, packet: Array) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model that the packet brought, and the tensors in the packet, which the update is taken against."""
        model, fresh = self._model(channels_last=plan.training.channels_last)
        specs = down_tensors(self.workload.spec, plan.part)
        arrays = unseal(
            packet,
            codec=make_codec(plan.codec_down),
            expected=array_specs(specs),
            context=context_of(specs, seed=plan.version),
            stamp=weights_stamp(plan.version),
        )
        base = as_tensors(arrays)
        held = model.state_dict()
        with torch.no_grad():
            for name, start in fresh.items():  # counters and buffers outside the state do not travel: they start anew
                if name not in base:
                    model.get_buffer(name).copy_(start)
            for name, tensor in base.items():
                held[name].copy_(tensor)
        return model, base

    def _trainable(self, plan: Plan) -> list[str] | None:
        """Names of the tensors to train; None for all."""
        if plan.part.trained == self.workload.spec.block_names:
            return None
        return [tensor.name for tensor in self.workload.spec.tensors_of(plan.part.trained)]

    def _seal(self, model: nn.Module, base: dict[str, Tensor], plan: Plan) -> Array:
        """The update packet: differences to what came down, or the weights themselves."""
        specs = up_tensors(self.workload.spec, plan.part, statistics=plan.upload.statistics)
        held = model.state_dict()
        values = {spec.name: held[spec.name] for spec in specs}
        packet, _ = seal(
            as_arrays(values),
            codec=make_codec(plan.codec_up),
            context=context_of(specs, seed=plan.seed),
            stamp=update_stamp(plan),
            minus=as_arrays({name: base[name] for name in values}) if plan.upload.payload == "difference" else None,
        )
        return packet

    def _evaluate(self, model: nn.Module, plan: Plan) -> Report:
        """The model that came down, on this device's own test share."""
        samples = self.workload.data.test(plan.device)
        if samples is None or not len(samples):
            return Report(plan=plan)
        metrics = evaluate(
            model,
            samples,
            loss=make_loss(plan.training.loss),
            metrics=self.workload.metrics,
            transform=self.workload.data.test_transform,
            batch_size=plan.training.batch_size,
            channels_last=plan.training.channels_last,
            precision=plan.training.precision,
        )
        return Report(plan=plan, samples=len(samples), metrics=metrics)


def array_specs(tensors: tuple[TensorSpec, ...]) -> tuple[ArraySpec, ...]:
    """What a packet of these tensors holds before its codec."""
    return tuple(ArraySpec(t.name, t.shape, t.dtype, role=t.role) for t in tensors)


def context_of(tensors: tuple[TensorSpec, ...], *, seed: int) -> Context:
    """The codec context that both ends derive for these tensors."""
    return Context(seed=seed, roles={t.name: t.role for t in tensors})


def weights_stamp(version: int) -> Stamp:
    """What a downlink packet says of itself: the same for every device, so that it is sealed once."""
    return Stamp(kind=PacketKind.WEIGHTS, version=version)


def update_stamp(plan: Plan) -> Stamp:
    """What an update says of itself: which attempt of which plan it answers."""
    return Stamp(kind=PacketKind.UPDATE, version=plan.version, plan=plan.id, attempt=plan.attempt)


def _failure(report: Report, stage: str, error: Exception) -> Report:
    """The report of a plan that did not end well."""
    text = f"{type(error).__name__}: {error}"
    memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_WORDS)
    )
    outcome = Outcome.OUT_OF_MEMORY if memory else Outcome.FAILED
    return msgspec.structs.replace(report, outcome=outcome, stage=stage, error=text[:2000])
