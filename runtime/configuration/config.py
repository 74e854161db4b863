"""The configuration: every setting of a run, typed, with its default. YAML in, one frozen value out.

Layers, later ones win: defaults, the preset that the YAML names, the YAML, the preset named on the command line, ``--set``,
what a caller sets in Python or by a flag of its own (``runtime.layers`` merges them).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

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
from .layers import expand_shorthands, merge, path_problem, plain, setting


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server's step, and the rule for running statistics of normalisation.

    ``staleness``: what an update is worth whose version has closed before it came (None: nothing, it is only counted).
    ``statistics``: "average" them like weights; or "batch": normalise by the batch at hand everywhere, none travel.
    ``link_memory_bytes``, ``link_disk_bytes``: what links with memory (ResFed) may keep of all devices together, in memory and
    beyond that on disk; the oldest are dropped then, and their devices resynchronised when they come again.
    """

    optimiser: ServerOptimiser = ServerOptimiser()
    statistics: Literal["average", "batch"] = "average"
    staleness: Staleness | None = None
    link_memory_bytes: CountOrZero = 2_000_000_000
    link_disk_bytes: CountOrZero = 20_000_000_000


class Codecs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Codec chains of the two directions; empty means dense float32."""

    down: tuple[CodecSpec, ...] = ()
    up: tuple[CodecSpec, ...] = ()


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where, how often and by what the global model is evaluated; the last version of a run always is.

    ``devices``: how many of them at most (None: all), drawn once from the seed. ``metrics``: beside the loss; None: what
    follows from loss and targets (``losses.default_metrics``).
    """

    where: Literal["server", "devices", "both", "none"] = "server"
    every: Count = 1
    batch_size: Count = 256
    devices: Count | None = None
    metrics: tuple[Call, ...] | None = None


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the run ends: whichever comes first, looked at whenever a version closes.

    ``patience``: evaluations in a row without a better one. ``virtual_s``: real seconds under the wall clock. ``bytes``:
    up and down together, without those of evaluation.
    """

    rounds: CountOrZero = 20
    accuracy: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    loss: Positive | None = None
    virtual_s: Positive | None = None
    bytes: Count | None = None
    patience: Count | None = None


class RayOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the actors run. ``address``: a cluster to join; None starts a local Ray that is stopped afterwards.

    ``cpus``, ``memory_bytes``: of each worker's bundle (cpus None: the local cores divided among the workers).
    ``server_cpus``, ``host_cpus``: of the server's bundle and of each partition host's; a share that is reserved, not a limit.
    ``placement_timeout_s``: how long an autoscaler may take to make room. ``min_real_devices``: so many of the fleet's real
    devices must have joined before round 1 (None: all). ``stuck_after_s``: real seconds after which a worker
    that is still at one plan, or a host that is silent, is ended and replaced (None: never). ``object_store_bytes``: None
    chooses; ``preallocate`` touches all of it at the start, for faster first rounds.
    """

    address: str | None = None
    cpus: Positive | None = None
    memory_bytes: Count | None = None
    server_cpus: Positive = 0.1
    host_cpus: Positive = 0.01
    placement_timeout_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    min_real_devices: CountOrZero | None = None
    stuck_after_s: Positive | None = None
    object_store_bytes: Count | None = None
    preallocate: bool = False
    dashboard: bool = False


class CheckpointSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the whole state is written, so that the run can be resumed.

    ``every``, ``seconds``: so many versions, or seconds, after the last time, whichever comes first; both None is never.
    ``share``: of this machine's time that writing may take; after one that took long the next waits (None: it never does).
    ``keep``: the newest so many stay. ``to``: a folder or URL (anything that fsspec knows); None is the run folder's own, and
    nothing is written where there is no run folder. ``grace_s``: how long a run that is told to end (SIGTERM) goes on until
    its version closes, where not every version is written anyway.
    """

    every: Count | None = 1
    seconds: Positive | None = None
    share: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = 0.05
    keep: Count = 3
    to: str | None = None
    grace_s: Positive = 20.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. ``policy``: the chain, each entry a mapping with ``name`` and the policy's own fields.
    ``max_failures``: plans that fail, are rejected or lost with their workers, more than which end the run (None: any number).

    Raises ``ValueError`` for a target of ``stop`` that no evaluation could ever reach.
    """

    name: str = "run"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    preset: str = "fedavg"
    model: Call = Call("digits_cnn")
    init: Initialisation = Initialisation()
    data: DataConfig = DataConfig()
    fleet: str | dict[str, Any] = "laptop"
    policy: tuple[dict[str, Any], ...] = ()
    training: Training = Training()
    schedule: LearningRateSchedule = LearningRateSchedule()
    server: ServerSettings = ServerSettings()
    codecs: Codecs = Codecs()
    replay: ReplaySettings = ReplaySettings()
    evaluation: Evaluation = Evaluation()
    stop: Stop = Stop()
    checkpoint: CheckpointSettings = CheckpointSettings()
    max_failures: CountOrZero | None = None
    clock: Literal["virtual", "wall"] = "virtual"
    backend: Literal["ray", "inline"] = "ray"
    workers: Count | None = None
    ray: RayOptions = RayOptions()
    out: str | None = None

    def __post_init__(self) -> None:
        """Check what no single field can tell."""
        paths = {"out": self.out, "checkpoint.to": self.checkpoint.to, "data.root": self.data.root}
        for name, path in (paths | {"init.weights": self.init.weights, "fleet": self.fleet}).items():
            if isinstance(path, str) and (problem := path_problem(path)):
                raise ValueError(f"{name} is {shown(path)}, {problem}")
        for name in ("accuracy", "loss", "patience"):
            value = getattr(self.stop, name)
            if value is not None and self.evaluation.where == "none":
                raise ValueError(f"stop.{name} is {value!r}, which needs an evaluation; evaluation.where is 'none'")
        metrics = self.evaluation.metrics
        names = None if metrics is None else [call.name.rpartition(":")[2] for call in metrics]
        if self.stop.accuracy is not None and names is not None and "accuracy" not in names:
            listed = ", ".join(names) or "nothing"
            raise ValueError(
                f"stop.accuracy is {self.stop.accuracy!r}, but evaluation.metrics holds {listed}, not accuracy"
            )

    def load_fleet(self) -> Fleet:
        """The fleet that ``fleet`` names or describes."""
        try:
            return load_fleet(self.fleet)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the run folder; it loads again to an equal configuration."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def load_config(
    source: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    preset: str | None = None,
    settings: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration from a YAML file, a mapping or defaults; ``preset`` and ``settings`` (``a.b=value``) win over it.

    ``overrides`` win over everything: what a caller sets in Python or by a flag of its own. Raises ``ConfigError``.
    """
    raw = expand_shorthands(_read(source))
    given = [expand_shorthands(setting(text)) for text in settings]
    preset = preset or next((layer["preset"] for layer in reversed(given) if "preset" in layer), None)
    name = preset or raw.get("preset") or _DEFAULT_PRESET
    layers = [_preset(name), raw] if preset is None else [raw, _preset(preset)]
    merged = Config().to_dict()
    for layer in [*layers, *given, expand_shorthands(plain(overrides or {})), {"preset": name}]:
        merged = merge(merged, layer)
    config = convert(merged, Config)
    if config.init.file is None:
        return config
    # The engine and the workers may have other current folders than the caller.
    init = msgspec.structs.replace(config.init, weights=str(config.init.file.absolute()))
    return msgspec.structs.replace(config, init=init)


_DEFAULT_PRESET: str = Config().preset


def _read(source: str | Path | Mapping[str, Any] | Config | None) -> dict[str, Any]:
    """The user's own layer."""
    if source is None:
        return {}
    if isinstance(source, Config):
        return source.to_dict()
    if isinstance(source, Mapping):
        return dict(plain(source))
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
