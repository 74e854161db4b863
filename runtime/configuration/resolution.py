"""What a configuration resolves to: measured settings, workload, default plans, and the policy list that names a policy.

Some settings are left open until the run starts (``training.precision: auto``, ``memory.probed``). What they depend on is
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
from ...learning.spec import CountOrZero, KernelTable
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan, Upload
from ...policies.policy import Chain, Identity, Policy
from ...policies.resolve_policy import BUILT_IN
from .config import Config

if TYPE_CHECKING:
    from ...learning.workload import Workload  # which imports torch


class MachineMeasurements(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``bf16_gain``: how many times as fast bf16 autocast trains as float32 (``learning.training.precision``).

    None: not measured. ``memory``: bytes that plans need, by part and training setting (``engine.memory_probe``). ``kernels``:
    of sparse products (``engine.kernel_measurement``).
    """

    bf16_gain: float | None = None
    memory: dict[str, CountOrZero] = {}
    kernels: KernelTable = {}


def measure(config: Config) -> MachineMeasurements:
    """Measure what the settings of ``config`` depend on. A table of kernels that it has already stays as it is."""
    if config.training.precision == "float32":
        return MachineMeasurements(kernels=config.kernels.table)
    from ...learning.training.precision import bf16_gain  # here, since it imports torch

    return MachineMeasurements(bf16_gain=round(bf16_gain(), 3), kernels=config.kernels.table)


def apply_measurements(config: Config, measured: MachineMeasurements) -> Config:
    """``config`` with the settings that it left open set by the measurements."""
    if measured.memory:
        config = replace(config, memory=replace(config.memory, probed=measured.memory))
    if measured.kernels:
        config = replace(config, kernels=replace(config.kernels, table=measured.kernels))
    if config.training.precision != "auto" or measured.bf16_gain is None:
        return config
    from ...learning.training.precision import bf16_pays

    precision = "bf16" if bf16_pays(measured.bf16_gain) else "float32"
    return replace(config, training=replace(config.training, precision=precision))


def measurement_notices(config: Config, measured: MachineMeasurements) -> list[str]:
    """Notices about settings that are slow on this machine."""
    gain = measured.bf16_gain
    if config.training.precision != "bf16" or gain is None or gain >= 1:
        return []
    return [
        f"training.precision is 'bf16', which this processor emulates: a training step takes about {1 / gain:.0f} times as "
        "long as in float32; allowed: float32, or auto, which takes bf16 only where it is faster"
    ]


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
