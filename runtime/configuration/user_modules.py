"""The user's own modules that a run needs: imported from beside the YAML that names them, and shipped to the workers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...clusters.user_modules import find_beside
from ...policies.policy import Policy
from .config import Config


def find_named_modules(source: str | Path | Mapping[str, Any] | Config | None, *named: Any) -> None:
    """Make the modules that settings name importable from beside ``source``, if that is a YAML file.

    ``named``: the settings. Call it only for a configuration that is executed, not for one that is only read. No other file of
    the folder becomes a module.
    """
    if isinstance(source, str | Path):
        find_beside(
            Path(source).resolve().parent, {name for settings in named for name in configured_modules(settings)}
        )


def named_modules(config: Config, policy: Policy) -> list[str]:
    """The user's own modules that the configuration or the policy names; workers must be able to import them."""
    named = configured_modules(config) | {type(policy).__module__}
    return sorted(name for name in named if name.partition(".")[0] not in ("fedbonsai", "__main__"))


def configured_modules(settings: Any) -> set[str]:
    """Modules that a configuration, or a section of one, names as ``module:attribute``."""
    sections = {key: value for key, value in msgspec.to_builtins(settings).items() if key != "fleet"}
    if isinstance(settings, Config):
        del sections["name"]  # free text
    return {text.partition(":")[0] for text in _strings(sections) if _is_path(text)}


def _strings(value: Any) -> list[str]:
    """All values of ``name`` keys in nested plain data."""
    if isinstance(value, dict):
        found = [value["name"]] if isinstance(value.get("name"), str) else []
        return found + [text for inner in value.values() for text in _strings(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _strings(inner)]
    return []


def _is_path(text: str) -> bool:
    """Whether a name is ``module:attribute``."""
    module, colon, attribute = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])
