"""Policies: which devices do what. All names that are needed to write, compose and test a policy.

Nothing is imported until it is used: each name loads its module on first access, so that importing this package costs neither
torch nor msgspec.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    # The contract.
    "Policy": "policies.policy",
    "State": "policies.policy",
    "NEEDS_PLANS": "policies.policy",
    "Chain": "policies.policy",
    "Identity": "policies.policy",
    "chain": "policies.policy",
    "View": "policies.view",
    "DeviceProfile": "clusters.profile",
    "Decision": "policies.decision",
    "Distil": "policies.tasks",
    "Report": "policies.report",
    "Outcome": "policies.report",
    "Measured": "policies.report",
    "Estimate": "policies.estimate",
    # A plan, and the values of its fields.
    "Plan": "policies.plan",
    "Split": "policies.plan",
    "Sparsity": "learning.spec",
    "Objective": "policies.plan",
    "Upload": "policies.plan",
    "Part": "learning.parts.part",
    "Training": "learning.spec",
    "CodecSpec": "comms.codec",
    "Residual": "comms.links.predict",
    # Helpers: fields of a policy, and selections.
    "Cohort": "policies.checks.fields",
    "check_cohort": "policies.checks.fields",
    "check_fields": "policies.checks.fields",
    "cohort_size": "policies.checks.fields",
    "Count": "learning.spec",
    "Fraction": "learning.spec",
    "NonNegative": "learning.spec",
    "Positive": "learning.spec",
    "Candidates": "policies.selection.candidates",
    "memory_misfit": "policies.selection.candidates",
    "uniform_order": "policies.selection.candidates",
    "weighted_order": "policies.selection.candidates",
    # The built-in policies.
    "All": "policies.selection.plain",
    "RandomCohort": "policies.selection.plain",
    "Fastest": "policies.selection.plain",
    "ByDeadline": "policies.selection.deadline",
    "PowerOfChoice": "policies.selection.power_of_choice",
    "Oort": "policies.selection.oort",
    "Asynchronous": "policies.scheduling.asynchronous",
    "Closing": "policies.scheduling.closing",
    "Residuals": "policies.compression.residuals",
    "SplitFed": "policies.partitioning.splitfed",
    "LocalLoss": "policies.partitioning.local_loss",
    "EcoFed": "policies.partitioning.ecofed",
    "Width": "policies.pruning.width",
    "Distillation": "policies.aggregation.distillation",
    "ProFL": "policies.progressive.profl",
    "AllSmall": "policies.pruning.common_width",
    "ZeroFL": "policies.sparsity.zerofl",
    "make_policy": "policies.resolve_policy",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Load an exported name when it is first used (PEP 562)."""
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__.rpartition('.')[0]}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion."""
    return list(__all__)
