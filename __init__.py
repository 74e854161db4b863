"""fedbonsai: federated learning that fits each device, every round.

Nothing is imported until it is used: ``fedbonsai.run`` and its neighbours load on first access, so that importing a
contract (a plan, a profile) costs neither torch nor Ray.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Run": "runtime.api",
    "run": "runtime.api",
    "load_config": "runtime.configuration.config",
    "Config": "runtime.configuration.config",
    "ConfigError": "runtime.errors",
    "FedbonsaiError": "runtime.errors",
    "Policy": "policies.policy",
    "chain": "policies.policy",
    "Decision": "policies.decision",
    "View": "policies.view",
    "Plan": "policies.plan",
    "Part": "learning.parts.part",
    "Report": "policies.report",
    "Outcome": "policies.report",
    "DeviceProfile": "clusters.profile",
    "Fleet": "clusters.fleet",
    "load_fleet": "clusters.fleet",
}
__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    """Load an exported name when it is first used (PEP 562)."""
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion."""
    return list(__all__)
