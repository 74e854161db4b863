"""The Device: carries out one plan, packet bytes in, packet bytes out. A plain class, in process and on Ray.

A device worker has no memory of its own: the state of a simulated device (link histories, error feedback) is sent with the plan
and comes back with the report. What the worker keeps between plans (the model's module, the data) is a cache: any worker runs
any device with the same bits, unless a user's model keeps state outside its tensors.
"""

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
from torch import Tensor, nn

from ...comms.codec import Array, Arrays, ArraySpec
from ...comms.codecs.make_codec import make_codec
from ...comms.errors import MismatchedPacket, OutOfSync, UnfitPacket
from ...comms.links.memory import DeviceEnd, LinkMemory, ModelName, PendingUpdate, history_lengths
from ...comms.links.opened import OpenedResiduals
from ...comms.links.predict import hash_arrays, is_broadcast, residual_specs, restore
from ...comms.links.receive import context_for, receive_models, sent_update, unsent_error, update_residual
from ...comms.links.state import LinkState, from_state, named_models, split_held, to_state
from ...comms.packet import seal
from ...learning.data.types import Samples
from ...learning.parts.submodel import SubModel
from ...learning.tensors import as_arrays, as_tensors, in_numpy_type
from ...learning.training.evaluation import evaluate
from ...learning.training.losses import make_loss
from ...learning.training.staged import frozen_before
from ...learning.training.step_times import step_times
from ...learning.training.training import TrainingResult
from ...learning.workload import Workload
from ...policies.plan import Plan
from ...policies.report import Measured, Outcome, Report
from ..messages.dense_packets import open_weights, seal_update
from ..messages.host_messages import HostLink
from ..messages.messages import array_specs, sealing_context, update_stamp, update_tensors, weights_stamp
from ..messages.places import Places
from ..messages.plan_message import read_plan
from .device_leg import train_front, upload
from .guard import Guard, NoGuard
from .held_blocks import HeldBlocks
from .held_maps import HeldMaps
from .module import Module, Modules
from .objectives import OBJECTIVES, evaluated
from .opened_weights import OpenedWeights
from .resource_usage import ResourceUsage

_OUT_OF_MEMORY_WORDS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "could not create a primitive",  # oneDNN's, also where its code does not get memory
    "could not create a memory object",
)


@dataclass(frozen=True)
class Trial:
    """Training steps of a plan that can be tried: ``held_bytes`` of its model are allocated already."""

    held_bytes: int
    run: Callable[[], object]


class Device:
    """Runs plans of any device of an experiment.

    ``run`` never raises for an error in one plan: the report holds the outcome, the stage (open, train, evaluate, seal) and
    the error.
    """

    def __init__(self, workload: Workload, guard: Guard | None = None, *, whole_states: bool = False) -> None:
        """Data and model are loaded at the first plan, unless ``workload`` has them.

        ``guard``: limits the memory of plans with a budget (None: nothing).
        ``whole_states``: states are returned with what the server has too, for a device that keeps its own.
        """
        self.workload = workload
        self._guard = guard or NoGuard()
        self._whole_states = whole_states
        self._modules = Modules()
        self._blocks = HeldBlocks(self.workload)
        self._maps = HeldMaps(self.workload)
        self._places = Places(self.workload)
        # Of the current plan: its stage, the version that the device holds, and its end of the link.
        self._stage = "open"
        self._held: int | None = None
        self._end = DeviceEnd()
        # What was opened is kept for other devices of this process. A device that keeps its own states is alone in it; under a
        # memory budget each opens all that it is sent, as it would alone.
        alone = self._guard.enforces or whole_states
        self._opened = None if alone else OpenedResiduals()
        self._open_weights = open_weights if alone else OpenedWeights().open
        self._initial: Arrays | None = None

    def run(
        self, plan_bytes: bytes, packets: Sequence[Array], state: LinkState | None = None, host: HostLink | None = None
    ) -> tuple[bytes, Array | None, LinkState | None]:
        """Carry out one plan: (encoded answer, update packet or None, the device's new state or None if unchanged).

        ``packets``: of the models that ``state`` names; then those with which the device reaches the plan's version, oldest
        first. ``host``: connection to the host's leg of a split plan.
        """
        plan = read_plan(plan_bytes)
        report, update = Report(plan=plan, outcome=Outcome.FAILED, stage="open"), None
        self._stage, self._held, self._end, readable = "open", None, DeviceEnd(), False
        named: tuple[ModelName, ...] = ()
        unsent: Arrays | None = None
        with ResourceUsage() as usage:
            try:
                held, packets = split_held(packets)
                self._end, named = from_state(state, held), named_models(state)
                readable, unsent = True, self._end.error if state is not None else None
                with self._guard.limited(plan, self._hold(plan)):
                    report, update = self._carry_out(plan, packets, host)
            except Exception as error:  # user code may raise anything: it becomes the plan's outcome
                report = _failure(report, self._stage, error)
        report = msgspec.structs.replace(
            report,
            held=self._held,
            enforced=self._guard.enforces if plan.memory_bytes is not None else None,
            measured=msgspec.structs.replace(
                report.measured, wall_s=usage.wall_s, peak_memory_bytes=usage.peak_memory_bytes
            ),
        )
        # A version that the report acknowledges is kept, whatever the outcome; a state that cannot be read is dropped. An
        # evaluation changes nothing.
        changed = plan.objective.kind != "evaluate" and (self._held is not None or not readable)
        return msgspec.msgpack.encode(report.answer()), update, self._state(plan, named, unsent) if changed else None

    def _state(self, plan: Plan, named: tuple[ModelName, ...], unsent: Arrays | None) -> LinkState:
        """This device's end without what the server has: models that came by name or are the same for all devices; its error.

        ``named``, ``unsent``: models and error of the state that came with the plan; None if there was none.
        """
        if self._whole_states:
            return to_state(self._end)
        models = self._end.memory.models
        if plan.link_down is not None and is_broadcast(plan.link_down) and models and self._held == models[-1].version:
            named = (*named, models[-1].name)
        return to_state(self._end, named=named, error=self._end.error is not unsent)

    def warm_up(self, *, model: bool = True) -> None:
        """Load data and model now, so that the measured time of the first plan does not include it.

        ``model``: false for a real device, which may have no room for more than a narrow part.
        """
        _ = self.workload.data
        if model:
            self._modules.get(self.workload.family(""), layout="contiguous")

    def trial(self, plan: Plan) -> Trial:
        """Two steps of a plan on whole batches, and its update, to find what memory it needs: packets are opened dense.

        (The optimiser's state is live beside the activations from the second step on.) A device with fewer samples than a batch
        repeats them. A plan that is split cannot be tried alone.
        """
        training = msgspec.structs.replace(plan.training, steps=2)
        plan = msgspec.structs.replace(
            plan, training=training, link_down=None, link_up=None, codec_down=(), memory_bytes=None
        )
        submodel = self.workload.submodel(plan.part)
        held_bytes = self._hold(plan)
        state = self._module(plan).state(plan.part.auxiliaries)
        values = as_arrays({t.name: in_numpy_type(state[t.name]) for t in submodel.down})
        specs = array_specs(submodel.down)
        stamp = weights_stamp(plan.version)
        packet, _ = seal(values, codec=make_codec(()), context=context_for(specs, seed=plan.version), stamp=stamp)
        return Trial(held_bytes, partial(self._carry_out, plan, [packet] if specs else [], None, self._batch(plan)))

    def time_steps(self, messages: Sequence[bytes]) -> list[float | None]:
        """Seconds of a training step of each of these plans, in turns (``learning.training.step_times``).

        The plans are of a whole model. The steps are on a whole batch of the device's samples, with a learning rate of 0, in
        modules that are dropped afterwards: the plans of the run find no trace of them.
        """
        plans, modules = [read_plan(message) for message in messages], Modules()

        def steps(plan: Plan, count: int) -> None:
            optimiser = msgspec.structs.replace(plan.training.optimiser, learning_rate=0.0)
            training = msgspec.structs.replace(plan.training, steps=count, optimiser=optimiser)
            module = modules.get(self.workload.architecture(plan.part), layout=training.layout, part=plan.part)
            self._train(msgspec.structs.replace(plan, training=training), module, self._batch(plan), None)

        return step_times([partial(steps, plan) for plan in plans])

    def _batch(self, plan: Plan) -> Samples:
        """A whole batch of the device's samples, which are repeated where they are fewer."""
        own = self.workload.data.train(plan.device)
        return own.take(np.resize(np.arange(len(own)), plan.training.batch_size))

    def _hold(self, plan: Plan) -> int:
        """Build a plan's module, outside of its limit; returns the bytes of its tensors, which count against the budget."""
        if not self._guard.enforces:
            return 0
        state, spec = self._module(plan).state(plan.part.auxiliaries), self.workload.submodel(plan.part).spec
        held = (*spec.tensors_of(plan.part.blocks), *spec.auxiliary_tensors(plan.part.auxiliaries))
        return sum(state[tensor.name].untyped_storage().nbytes() for tensor in held)

    def _module(self, plan: Plan) -> Module:
        """The module with the blocks that the plan's part holds; frozen ones before the first trained one maybe in bf16."""
        in_low = plan.training.frozen_precision == "bf16" and plan.split is None
        return self._modules.get(
            self.workload.architecture(plan.part),
            layout=plan.training.layout,
            part=plan.part,
            lowered=frozen_before(self.workload.submodel(plan.part).stages) if in_low else (),
        )

    def _enter(self, stage: str) -> None:
        self._stage = stage
        self._guard.entered(stage)

    def close(self) -> None:
        """Nothing is to be ended."""

    def _carry_out(
        self, plan: Plan, packets: Sequence[Array], host: HostLink | None, samples: Samples | None = None
    ) -> tuple[Report, Array | None]:
        """Open, then train and seal, or evaluate, or upload a view. ``samples``: instead of the device's own."""
        module, base = self._open(plan, packets)
        if plan.objective.kind == "evaluate":
            self._enter("evaluate")
            return self._evaluate(evaluated(plan, module, self.workload), plan), None
        self._enter("train")
        started = time.perf_counter()
        samples = self.workload.data.train(plan.device) if samples is None else samples
        if not plan.trains_on_device:
            upload(plan, module, samples, host, self.workload)
            train_s = time.perf_counter() - started
            return Report(plan=plan, samples=len(samples), measured=Measured(train_s=train_s)), None
        result = self._train(plan, module, samples, host)
        train_s = time.perf_counter() - started
        self._enter("seal")
        update = self._seal(module.state(plan.part.auxiliaries), base, plan)
        report = Report(
            plan=plan,
            samples=len(samples),
            steps=result.steps,
            loss=result.loss,
            loss_square=result.loss_square,
            label_counts=self._label_counts(samples) if plan.upload.label_counts else (),
            measured=Measured(train_s=train_s),
        )
        return report, update

    def _label_counts(self, samples: Samples) -> tuple[int, ...]:
        """[class] number of a device's samples; empty if its targets are not class labels."""
        targets, classes = samples.targets(), self.workload.data.num_classes
        if classes is None or targets.ndim != 1 or targets.dtype.kind not in "iu":
            return ()
        return tuple(np.bincount(targets, minlength=classes)[:classes].tolist())

    def _train(self, plan: Plan, module: Module, samples: Samples, host: HostLink | None) -> TrainingResult:
        """Train the plan's part; the blocks of a split plan by way of its host."""
        if plan.split is not None:
            return train_front(plan, module, samples, host, self.workload, over=_time_limit(plan))
        return OBJECTIVES[plan.objective.kind](plan, module, samples, self.workload, _time_limit(plan))

    def _open(self, plan: Plan, packets: Sequence[Array]) -> tuple[Module, dict[str, Tensor]]:
        """The module with the received tensors, and these tensors, to which the update is the difference."""
        submodel = self.workload.submodel(plan.part)
        packets = self._blocks.take(plan.part, self._maps.take(plan.part, packets))
        base = as_tensors(self._receive(plan, submodel, packets)) | self._blocks.tensors(plan.part)
        module = self._module(plan)
        module.check_frozen(submodel, plan.part.frozen)
        module.load(base, plan.part.auxiliaries)
        return module, base

    def _receive(self, plan: Plan, submodel: SubModel, packets: Sequence[Array]) -> Arrays:
        """The received tensors: of one dense packet, or of residuals and this device's end of the link."""
        expected = array_specs(submodel.down)
        codec, end = make_codec(plan.codec_down), self._end
        end.acknowledge(plan.acknowledged)
        end.memory.trim(plan.link_down, plan.link_up)
        place = self._places.of(plan.part) if plan.link_down is not None or plan.link_up is not None else end.place
        move = self._places.move(end.place, place) if place != end.place else None
        if plan.link_down is None:
            if len(packets) != (1 if expected else 0):
                raise MismatchedPacket(
                    f"{len(packets)} packets with the model were received; {1 if expected else 0} expected"
                )
            if not expected:
                return {}
            arrays = self._open_weights(packets[0], plan, submodel)
            if place != end.place:  # without a patch, the models of another downlink are of no use
                end.move(place, move, LinkMemory(sent=end.memory.sent).moved(move))
            self._held = plan.version if plan.link_up is not None else None
            return arrays
        model = receive_models(
            end,
            packets,
            version=plan.version,
            residual=plan.link_down,
            codec=codec,
            expected=expected,
            agreed=self._initial_model,
            place=place,
            move=move,
            opened=self._opened,
        )
        self._held = model.version
        return model.arrays

    def _initial_model(self) -> Arrays:
        """The model that both ends of a link build from the seed; built once, unless plans have budgets."""
        if self._initial is not None:
            return self._initial
        arrays = as_arrays(self.workload.new_model().state_dict())
        if not self._guard.enforces:
            for array in arrays.values():
                array.flags.writeable = False
            self._initial = arrays
        return arrays

    def _seal(self, trained: dict[str, Tensor], base: dict[str, Tensor], plan: Plan) -> Array:
        """The update packet: differences to what was received, weights, or residuals."""
        if plan.link_up is None:
            return seal_update(trained, base, plan, submodel=self.workload.submodel(plan.part))
        specs = array_specs(update_tensors(plan, self.workload.submodel(plan.part)))
        values = as_arrays({spec.name: trained[spec.name] for spec in specs})
        return self._seal_residual(values, as_arrays(base), specs, plan)

    def _seal_residual(self, values: Arrays, base: Arrays, specs: tuple[ArraySpec, ...], plan: Plan) -> Array:
        """The update as residuals to the prediction of both ends; the new history stays pending until it is acknowledged."""
        rule, end, names = plan.link_up, self._end, list(values)
        assert rule is not None
        prediction = end.memory.predict_up(rule, base, names)
        residuals = update_residual(values, prediction, end.error, rule)
        for name, array in residuals.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise UnfitPacket(f"{name!r} holds NaN or infinity")
        codec = make_codec(plan.codec_up)
        packet, sent = seal(
            residuals,
            codec=codec,
            context=sealing_context(residual_specs(specs, rule), plan, codec, trained=values),
            stamp=update_stamp(plan, state_hash=hash_arrays(prediction)),
        )
        has_history = history_lengths(plan.link_down, rule)[1] > 0
        end.pending = PendingUpdate(
            plan=plan.id,
            sent=sent_update(base, restore(sent, prediction, rule), names) if has_history else None,
            error=unsent_error(residuals, sent, end.error, rule),
        )
        return packet

    def _evaluate(self, model: nn.Module, plan: Plan) -> Report:
        """Metrics of the received model on this device's own test share."""
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
            layout=plan.training.layout,
            precision=plan.training.precision,
        )
        return Report(plan=plan, samples=len(samples), metrics=metrics)


def _time_limit(plan: Plan) -> Callable[[], bool] | None:
    """A function that says whether ``plan.train_s`` seconds have passed from now on; None for a plan without that limit."""
    if plan.train_s is None:
        return None
    end_s = time.monotonic() + plan.train_s
    return lambda: time.monotonic() >= end_s


def _failure(report: Report, stage: str, error: Exception) -> Report:
    """The report of a plan that raised ``error``."""
    text = f"{type(error).__name__}: {error}"
    outcome = Outcome.OUT_OF_MEMORY if is_out_of_memory(error) else Outcome.FAILED
    if isinstance(error, UnfitPacket) and stage == "seal":  # as the server does with an update that is not finite
        outcome = Outcome.REJECTED
    out_of_sync = isinstance(error, OutOfSync)
    return msgspec.structs.replace(report, outcome=outcome, stage=stage, error=text[:2000], out_of_sync=out_of_sync)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory, or a thread's stack, could not be allocated."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY_WORDS)
    )
