"""Which modules of the user's own a run needs, so that they can travel to the workers."""

from typing import Any

from ..policies.policy import Policy
from .config import Config


def named_modules(config: Config, policy: Policy) -> list[str]:
    """Modules of the user's own that the configuration or the policy names; workers must be able to import them."""
    sections = {key: value for key, value in config.to_dict().items() if key not in ("name", "fleet")}  # free names
    named = {text.partition(":")[0] for text in _strings(sections) if _is_path(text)}
    named.add(type(policy).__module__)
    return sorted(name for name in named if name.partition(".")[0] not in ("fedbonsai", "__main__"))


def _strings(value: Any) -> list[str]:
    """All ``name`` entries in nested plain data."""
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
