"""The configuration: every setting of a run, typed, with its default. YAML in, one frozen value out.

Layers, later ones win: defaults, the preset named in the YAML, the YAML, the preset named on the command line, ``--set``.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from ..clusters.fleet import Fleet, load_fleet
from ..comms.codecs import CodecSpec
from ..learning.data.config import DataConfig
from ..learning.optimisers import ServerOptimiser
from ..learning.schedule import Schedule
from ..learning.spec import Call, Count, CountOrZero, Positive, Training
from ..policies.presets import find_preset
from .convert import convert
from .errors import ConfigError


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server's step, and the rule for running statistics of normalisation.

    ``statistics``: "average" them like weights; or "batch": normalise by the batch at hand everywhere, none travel.
    """

    optimiser: ServerOptimiser = ServerOptimiser()
    statistics: Literal["average", "batch"] = "average"


class Codecs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Codec chains of the two directions; empty means dense float32."""

    down: tuple[CodecSpec, ...] = ()
    up: tuple[CodecSpec, ...] = ()


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where, how often and by what the global model is evaluated. ``devices``: how many of them at most (None: all)."""

    where: Literal["server", "devices", "both", "none"] = "server"
    every: Count = 1
    batch_size: Count = 256
    devices: Count | None = None
    metrics: tuple[Call, ...] = (Call("accuracy"),)


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the run ends: whichever comes first. ``patience``: evaluations without a better one."""

    rounds: CountOrZero = 20
    accuracy: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    loss: Positive | None = None
    virtual_s: Positive | None = None
    bytes: Count | None = None
    patience: Count | None = None


class RayOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the actors run. ``address``: a cluster to join; None starts a local Ray that is stopped afterwards.

    ``cpus``, ``gpus``, ``memory_bytes``: of each worker's bundle (cpus None: the local cores divided among the workers).
    ``placement_timeout_s``: how long an autoscaler may take to make room. ``object_store_bytes``: None chooses;
    ``preallocate`` touches all of it at the start, for faster first rounds.
    """

    address: str | None = None
    cpus: Positive | None = None
    gpus: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    memory_bytes: Count | None = None
    server_cpus: Positive = 0.1
    placement_timeout_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    object_store_bytes: Count | None = None
    preallocate: bool = False
    dashboard: bool = False


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. ``policy``: the chain, each entry a mapping with ``name`` and the policy's own fields."""

    name: str = "run"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    preset: str = "fedavg"
    model: Call = Call("digits_cnn")
    data: DataConfig = DataConfig()
    fleet: str | dict[str, Any] = "laptop"
    policy: tuple[dict[str, Any], ...] = ()
    training: Training = Training()
    schedule: Schedule = Schedule()
    server: ServerSettings = ServerSettings()
    codecs: Codecs = Codecs()
    evaluation: Evaluation = Evaluation()
    stop: Stop = Stop()
    clock: Literal["virtual", "wall"] = "virtual"
    backend: Literal["ray", "inline"] = "ray"
    workers: Count | None = None
    ray: RayOptions = RayOptions()
    out: str | None = None

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
    raw = _read(source)
    name = preset or raw.get("preset") or Config.__struct_defaults__[Config.__struct_fields__.index("preset")]
    layers = [_preset(name), raw] if preset is None else [raw, _preset(preset)]
    merged: dict[str, Any] = {}
    for layer in [*layers, *map(_setting, settings), dict(overrides or {}), {"preset": name}]:
        merged = _merge(merged, layer)
    return convert(_spell_out(merged), Config)


def _read(source: str | Path | Mapping[str, Any] | Config | None) -> dict[str, Any]:
    """The user's own layer."""
    if source is None:
        return {}
    if isinstance(source, Config):
        return source.to_dict()
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"configuration {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"configuration {str(path)!r} must be a mapping of settings, not a {type(raw).__name__}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # a user's own policy or model beside the YAML
        sys.path.append(folder)
    fleet = raw.get("fleet")
    if isinstance(fleet, str) and fleet.endswith((".yaml", ".yml")) and not Path(fleet).exists():
        raw["fleet"] = str(path.parent / fleet)
    return raw


def _preset(name: Any) -> dict[str, Any]:
    """The layer of a preset."""
    try:
        return find_preset(str(name)).overrides
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _setting(text: str) -> dict[str, Any]:
    """``a.b=value`` as a layer; the value is read as YAML."""
    path, sign, value = text.partition("=")
    if not sign or not path:
        raise ConfigError(f"--set {text!r} must have the form section.field=value")
    try:
        layer: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    for key in reversed(path.split(".")):
        layer = {key: layer}
    assert isinstance(layer, dict)
    return layer


def _merge(below: Any, above: Any, path: str = "") -> Any:
    """Mappings are merged key by key; a list entry is set by its number (``policy.0.cohort``); anything else is replaced.

    Another model or partition replaces the old one whole: its keyword arguments are not the old one's.
    """
    if isinstance(below, dict) and isinstance(above, dict):
        if path in ("model", "data.partition", "fleet") and above.get("name", below.get("name")) != below.get("name"):
            return above
        inner = {
            k: _merge(below[k], v, f"{path}.{k}" if path else str(k)) if k in below else v for k, v in above.items()
        }
        return below | inner
    if (
        isinstance(below, list | tuple)
        and isinstance(above, dict)
        and above
        and all(str(key).isdigit() for key in above)
    ):
        merged = list(below)
        for key, value in above.items():
            if int(key) >= len(merged):
                raise ConfigError(f"--set names entry {key} of a list of {len(merged)}; the first is 0")
            merged[int(key)] = _merge(merged[int(key)], value, f"{path}.{key}")
        return merged
    return above


def _spell_out(raw: dict[str, Any]) -> dict[str, Any]:
    """Shorthands: a bare name where a name with keyword arguments is meant; codecs with their options beside the name."""
    raw = dict(raw)
    if isinstance(raw.get("model"), str):
        raw["model"] = {"name": raw["model"]}
    if isinstance(raw.get("policy"), dict | str):
        raw["policy"] = [raw["policy"]]
    if isinstance(raw.get("policy"), list | tuple):
        raw["policy"] = [{"name": link} if isinstance(link, str) else link for link in raw["policy"]]
    for section, field in (("training", "loss"), ("data", "partition")):
        if isinstance(raw.get(section), dict) and isinstance(raw[section].get(field), str):
            raw[section] = raw[section] | {field: {"name": raw[section][field]}}
    for section, fields in (("evaluation", ("metrics",)), ("data", ("train_transforms", "test_transforms"))):
        for field in fields:
            if isinstance(raw.get(section), dict) and isinstance(raw[section].get(field), list | tuple):
                calls = [{"name": c} if isinstance(c, str) else c for c in raw[section][field]]
                raw[section] = raw[section] | {field: calls}
    if isinstance(raw.get("codecs"), dict):
        raw["codecs"] = {k: _codecs(v) if isinstance(v, list | tuple) else v for k, v in raw["codecs"].items()}
    return raw


def _codecs(entries: Sequence[Any]) -> list[Any]:
    """``lz4`` or ``{name: lz4, level: 3}`` as a name with options."""
    spelled: list[Any] = []
    for entry in entries:
        if isinstance(entry, str):
            spelled.append({"name": entry})
        elif isinstance(entry, dict) and "options" not in entry:
            options = {key: value for key, value in entry.items() if key != "name"}
            spelled.append({"name": entry.get("name"), "options": options})
        else:
            spelled.append(entry)
    return spelled
