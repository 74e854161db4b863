"""What a configuration resolves to: measured settings, workload, default plans, and the policy list that names a policy.

Some settings are left open until the run starts (``training.layout: auto``, ``memory.probed``). What they depend on is
measured once, before the first round, and becomes part of the run: it is in the first event (``RunStarted.measured``) and in
the run folder (``measured.json``), from which a resumed run takes it, so that it continues to the same bits.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from ...clusters.profile import DeviceProfile
from ...learning.parts.part import Part, whole
from ...learning.seeds import derive
from ...learning.spec import CountOrZero, KernelTable, MeasuredForm, Training
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan, Upload
from ...policies.policy import Chain, Identity, Policy
from ...policies.resolve_policy import BUILT_IN
from .config import Config

if TYPE_CHECKING:
    from ...learning.workload import Workload  # which imports torch

PLAIN = MeasuredForm(precision="float32", layout="contiguous")


class MachineMeasurements(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``training``: precision and layout (``engine.step_measurement``; None: the configuration sets both).

    ``memory``: bytes that plans need, by part and training setting (``engine.memory_probe``). ``kernels``: of sparse products
    (``engine.kernel_measurement``).
    """

    training: MeasuredForm | None = None
    memory: dict[str, CountOrZero] = {}
    kernels: KernelTable = {}


def is_open(training: Training) -> bool:
    """Whether a measurement chooses precision or layout."""
    return "auto" in (training.precision, training.layout)


def in_form(config: Config, form: MeasuredForm = PLAIN) -> Config:
    """``config`` with a precision and a layout where it leaves them open."""
    training = config.training
    if training.precision == "auto":
        training = replace(training, precision=form.precision)
    if training.layout == "auto":
        training = replace(training, layout=form.layout)
    return replace(config, training=training)


def apply_measurements(config: Config, measured: MachineMeasurements) -> Config:
    """``config`` with the settings that it left open set by the measurements."""
    if measured.memory:
        config = replace(config, memory=replace(config.memory, probed=measured.memory))
    if measured.kernels:
        config = replace(config, kernels=replace(config.kernels, table=measured.kernels))
    return config if measured.training is None else in_form(config, measured.training)


def workload_settings(config: Config, *, num_devices: int) -> WorkloadSettings:
    """What server and devices build their workloads from. Raises ``ValueError`` for initial weights that cannot be read."""
    init = config.init
    if init.mode != "random":
        from ...learning.pretrained import with_weights_hash  # here, since it imports torch

        init = with_weights_hash(init, model=config.model.name)
    return WorkloadSettings(
        model=config.model,
        data=config.data,
        metrics=config.evaluation.metrics,
        loss=config.training.loss,
        num_devices=num_devices,
        seed=config.seed,
        batch_statistics=config.server.statistics == "batch",
        init=init,
        models=config.models,
        public=config.server.public,
        sparsity=config.training.sparsity,
        kernels=config.kernels.table if config.kernels.sparse == "auto" else {},
        threads=config.threads,
    )


class DefaultPlan:
    """Makes the plan that a policy starts from: whole model, configured codecs, training at the round's learning rate."""

    def __init__(self, config: Config, parts: Mapping[str, Part], families: Sequence[str]) -> None:
        """``parts``: the whole model of each family. ``families``: [device] the family that it trains."""
        self._config = config
        self._parts, self._families = parts, families
        self._version = -1
        self._training = config.training
        self._upload = Upload(statistics=config.server.statistics == "average")

    @classmethod
    def of(cls, config: Config, workload: "Workload", profiles: Sequence[DeviceProfile]) -> "DefaultPlan":
        """The plans of a fleet's devices, each of the family that its class names."""
        parts = {name: whole(workload.family(name).spec, model=name) for name in workload.families}
        return cls(config, parts, [profile.model for profile in profiles])

    def __call__(self, device: int, version: int, earlier: int) -> Plan:
        """``earlier``: plans that the device had before in this version; with equal seeds their updates would be equal."""
        config = self._config
        if version != self._version:
            factor = config.schedule.factor(version, rounds=config.stop.rounds)
            rate = config.training.optimiser.learning_rate * factor
            optimiser = replace(config.training.optimiser, learning_rate=rate)
            self._training = replace(config.training, optimiser=optimiser)
            self._version = version
        return Plan(
            id=0,
            device=device,
            version=version,
            part=self._parts[self._families[device]],
            training=self._training,
            seed=derive(config.seed, "plan", device, version, *([earlier] if earlier else [])),
            upload=self._upload,
            codec_down=config.codecs.down,
            codec_up=config.codecs.up,
        )


def describe_policy(policy: Policy) -> tuple[dict[str, Any], ...]:
    """The ``policy:`` list for a policy object: an entry for each policy of a chain, with the fields that are not defaults.

    ``resolve_policy`` reads it back to an equal policy, unless its class cannot be imported again (one defined in a notebook
    or in a function): the run folder then still names it.
    """
    if isinstance(policy, Chain):
        return tuple(entry for link in policy.links for entry in describe_policy(link))
    if type(policy) is Identity:
        return ()
    policy_class = type(policy)
    own = f"{policy_class.__module__}:{policy_class.__qualname__}"
    entry: dict[str, Any] = {"name": next((name for name, known in BUILT_IN.items() if known is policy_class), own)}
    declared: dict[str, dataclasses.Field[Any]] = getattr(policy_class, "__dataclass_fields__", {})
    for field in declared.values():
        value = getattr(policy, field.name)
        if field.init and value != field.default:
            entry[field.name] = msgspec.to_builtins(value, enc_hook=repr)
    return (entry,)
