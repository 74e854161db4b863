"""The configuration: every setting of a run, typed, with its default. Reads YAML into one frozen value.

Layers, later ones win: defaults, the preset that the YAML names, the YAML, the preset named on the command line, ``--set``,
and values from Python or from flags such as ``--seed`` (``layers`` merges them).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ...actors.enforcement.settings import MemorySettings
from ...actors.messages.host_messages import ReplaySettings
from ...clusters.fleet import Fleet, load_fleet
from ...clusters.units import shown
from ...clusters.yaml_text import read_yaml
from ...comms.codec import CodecSpec
from ...learning.data.config import DataConfig
from ...learning.spec import (
    Call,
    Count,
    CountOrZero,
    KernelSettings,
    LearningRateSchedule,
    Positive,
    ServerOptimiser,
    Staleness,
    Training,
)
from ...learning.workload_settings import Initialisation
from ...policies.presets import find_preset
from ..errors import ConfigError
from .convert import convert
from .layers import expand_shorthands, merge, parse_setting, path_problem, to_plain


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server's optimiser step, stale updates, running statistics, and budgets for links with memory.

    ``staleness``: the weight of an update that arrives after its version closed (None: it is counted, not folded).
    ``public``: another data set on which the server distils (None: the public share of ``data``; see ``learning.data.public``).
    ``statistics``: running statistics of normalisation: "average" them like weights, or "batch": keep none, and normalise by
    the current batch everywhere. ``link_memory_bytes``, ``link_disk_bytes``: budgets for the state of all links with memory
    (ResFed), in memory, and beyond that on disk; then the oldest states are dropped, and their devices resynchronised.
    """

    optimiser: ServerOptimiser = ServerOptimiser()
    statistics: Literal["average", "batch"] = "average"
    staleness: Staleness | None = None
    public: DataConfig | None = None
    link_memory_bytes: CountOrZero = 2_000_000_000
    link_disk_bytes: CountOrZero = 20_000_000_000


class Codecs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Codec chains of the two directions; empty: dense float32."""

    down: tuple[CodecSpec, ...] = ()
    up: tuple[CodecSpec, ...] = ()


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where, how often and by which metrics the global model is evaluated; the last version of a run always is.

    ``devices``: at most so many, drawn once from the seed (None: all). ``metrics``: in addition to the loss (None: those that
    follow from loss and targets, ``losses.default_metrics``).
    """

    where: Literal["server", "devices", "both", "none"] = "server"
    every: Count = 1
    batch_size: Count = 256
    devices: Count | None = None
    metrics: tuple[Call, ...] | None = None


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the run ends: the first limit that is reached, checked whenever a version closes.

    ``patience``: consecutive evaluations without improvement. ``virtual_s``: real seconds under the wall clock. ``bytes``:
    up and down together, without those of evaluation.
    """

    rounds: CountOrZero = 20
    accuracy: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    loss: Positive | None = None
    virtual_s: Positive | None = None
    bytes: Count | None = None
    patience: Count | None = None


class RayOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the actors run. ``address``: a cluster to join (None: start a local Ray, and stop it afterwards).

    ``cpus``, ``memory_bytes``: of each worker's bundle (cpus None: the local cores divided among the workers).
    ``server_cpus``, ``host_cpus``, ``distiller_cpus``: of the server's bundle, of each partition host's, and of the distiller's
    in runs that have one; reservations, not limits.
    ``placement_timeout_s``: how long an autoscaler may take to provide resources. ``min_real_devices``: number of the fleet's
    real devices that must have joined before round 1 (None: all). ``stuck_after_s``: real seconds after which a worker that
    is still executing one plan, a distiller one request, or a host that does not answer, is killed and replaced (None: never).
    ``object_store_bytes``: None: a default size. ``preallocate``: touch the whole store at the start, for faster first rounds.
    """

    address: str | None = None
    cpus: Positive | None = None
    memory_bytes: Count | None = None
    server_cpus: Positive = 0.1
    host_cpus: Positive = 0.01
    distiller_cpus: Positive = 0.1
    placement_timeout_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    min_real_devices: CountOrZero | None = None
    stuck_after_s: Positive | None = None
    object_store_bytes: Count | None = None
    preallocate: bool = False
    dashboard: bool = False


class CheckpointSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When checkpoints of the whole state are written, so that the run can be resumed.

    ``every``, ``seconds``: versions or seconds since the last checkpoint, whichever comes first; both None: never.
    ``share``: maximum share of this machine's time for writing; after a slow write the next is delayed (None: no limit).
    ``keep``: number of the newest checkpoints that are kept. ``to``: a folder or any URL that fsspec supports (None: in the
    run folder; without one no checkpoints are written). ``grace_s``: seconds that a run continues after SIGTERM until its
    version closes, unless every version is written anyway.
    """

    every: Count | None = 1
    seconds: Positive | None = None
    share: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = 0.05
    keep: Count = 3
    to: str | None = None
    grace_s: Positive = 20.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. ``policy``: the chain; each entry is a mapping with ``name`` and the policy's own fields.

    ``models``: families of models beside the global one, by name; a class of the fleet names its own (``model``).
    ``threads``: torch threads of each process that computes; sums may be rounded otherwise with another number.
    ``max_failures``: number of plans that may fail, be rejected, or be lost with their workers before the run ends (None: any).

    Raises ``ValueError`` for a target of ``stop`` that no evaluation could reach, for paths that no file can have, and for
    names of ``models`` that are none.
    """

    name: str = "run"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    preset: str = "fedavg"
    model: Call = Call("digits_cnn")
    models: dict[str, Call] = {}
    init: Initialisation = Initialisation()
    data: DataConfig = DataConfig()
    fleet: str | dict[str, Any] = "laptop"
    policy: tuple[dict[str, Any], ...] = ()
    training: Training = Training()
    schedule: LearningRateSchedule = LearningRateSchedule()
    server: ServerSettings = ServerSettings()
    codecs: Codecs = Codecs()
    replay: ReplaySettings = ReplaySettings()
    memory: MemorySettings = MemorySettings()
    kernels: KernelSettings = KernelSettings()
    evaluation: Evaluation = Evaluation()
    stop: Stop = Stop()
    checkpoint: CheckpointSettings = CheckpointSettings()
    max_failures: CountOrZero | None = None
    clock: Literal["virtual", "wall"] = "virtual"
    backend: Literal["ray", "inline"] = "ray"
    workers: Count | None = None
    threads: Count = 1
    ray: RayOptions = RayOptions()
    out: str | None = None

    def __post_init__(self) -> None:
        """Check paths, and fields against each other."""
        paths = {"out": self.out, "checkpoint.to": self.checkpoint.to, "data.root": self.data.root}
        if self.server.public is not None:
            paths["server.public.root"] = self.server.public.root
        for name, path in (paths | {"init.weights": self.init.weights, "fleet": self.fleet}).items():
            if isinstance(path, str) and (problem := path_problem(path)):
                raise ValueError(f"{name} is {shown(path)}, {problem}")
        for name in self.models:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"models names {shown(name)}; a name consists of letters, digits, '_' and '-'")
        for name in ("accuracy", "loss", "patience"):
            value = getattr(self.stop, name)
            if value is not None and self.evaluation.where == "none":
                raise ValueError(f"stop.{name} is {value!r}, which needs an evaluation; evaluation.where is 'none'")
        if self.kernels.sparse == "auto" and self.training.sparsity is None:
            raise ValueError(
                "kernels.sparse is 'auto', and training.sparsity is null: no layer is sparse; allowed: dense"
            )
        if self.kernels.sparse == "auto" and self.threads > 1:
            raise ValueError(
                f"threads is {self.threads}, and kernels.sparse is 'auto', which is measured on one thread; allowed: 1"
            )
        if self.memory.probes and self.threads > 1:
            raise ValueError(
                f"threads is {self.threads}, and what plans need is measured on one thread (memory.probe); allowed: 1, or "
                "memory.probe: false"
            )
        for name, value in (("precision", self.training.precision), ("layout", self.training.layout)):
            if self.kernels.sparse == "auto" and value == "auto":
                allowed = "float32, bf16" if name == "precision" else "contiguous, channels_last"
                raise ValueError(
                    f"training.{name} is 'auto', and kernels.sparse is 'auto', measured in one {name}; allowed: {allowed}"
                )
        metrics = self.evaluation.metrics
        names = None if metrics is None else [call.name.rpartition(":")[2] for call in metrics]
        if self.stop.accuracy is not None and names is not None and "accuracy" not in names:
            listed = ", ".join(names) or "nothing"
            raise ValueError(
                f"stop.accuracy is {self.stop.accuracy!r}, but evaluation.metrics holds {listed}, not accuracy"
            )

    def load_fleet(self) -> Fleet:
        """The fleet that ``fleet`` names or describes. Raises ``ConfigError``, also for a class with an unknown model."""
        try:
            fleet = load_fleet(self.fleet)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for each in fleet.classes:
            if each.model and each.model not in self.models:
                known = ", ".join(self.models) or "none"
                raise ConfigError(
                    f"fleet class {each.name!r} has model {each.model!r}; the families in models: {known}"
                )
        return fleet

    def to_dict(self) -> dict[str, Any]:
        """Plain data that loads again to an equal configuration."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def load_config(
    source: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    preset: str | None = None,
    settings: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Load a configuration from a YAML file, a mapping, a ``Config``, or the defaults (None).

    ``preset`` and ``settings`` (``a.b=value``) win over ``source``; ``overrides``, values by setting, win over both. Raises
    ``ConfigError``.
    """
    raw = expand_shorthands(_read(source))
    layers_set = [expand_shorthands(parse_setting(text)) for text in settings]
    preset = preset or next((layer["preset"] for layer in reversed(layers_set) if "preset" in layer), None)
    name = preset or raw.get("preset") or _DEFAULT_PRESET
    layers = [_preset(name), raw] if preset is None else [raw, _preset(preset)]
    merged = Config().to_dict()
    for layer in [*layers, *layers_set, expand_shorthands(to_plain(overrides or {})), {"preset": name}]:
        merged = merge(merged, layer)
    config = convert(merged, Config)
    if config.init.file is None:
        return config
    # The engine and the workers may run in other folders than the caller.
    init = msgspec.structs.replace(config.init, weights=str(config.init.file.absolute()))
    return msgspec.structs.replace(config, init=init)


_DEFAULT_PRESET: str = Config().preset


def _read(source: str | Path | Mapping[str, Any] | Config | None) -> dict[str, Any]:
    """The layer of ``source``. Paths in a YAML file are resolved against its folder where they exist there."""
    if source is None:
        return {}
    if isinstance(source, Config):
        return source.to_dict()
    if isinstance(source, Mapping):
        return dict(to_plain(source))
    if not isinstance(source, str | Path):
        raise ConfigError(f"config is {shown(source)}; it must be a YAML file, a mapping or a Config")
    if problem := path_problem(str(source)):
        raise ConfigError(f"config is {shown(str(source))}, {problem}")
    path = Path(source)
    try:
        raw = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"configuration {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration {str(path)!r} is not text in UTF-8: {error}") from error
    except ValueError as error:
        raise ConfigError(f"configuration {str(path)!r} is not YAML: {error}") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"configuration {str(path)!r} must be a mapping of settings, not a {type(raw).__name__}")
    fleet = raw.get("fleet")
    if isinstance(fleet, str) and fleet.endswith((".yaml", ".yml")) and not Path(fleet).exists():
        raw["fleet"] = str(path.parent / fleet)
    init = raw.get("init")
    weights = init.get("weights") if isinstance(init, dict) else None
    if isinstance(weights, str) and not Path(weights).exists() and (path.parent / weights).is_file():
        raw["init"] = {**raw["init"], "weights": str(path.parent / weights)}
    return raw


def _preset(name: Any) -> dict[str, Any]:
    """The layer of a preset."""
    try:
        return expand_shorthands(find_preset(str(name)).overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error
