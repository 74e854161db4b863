"""Measures before the first round which kernels carry out sparse products, if ``kernels.sparse`` is "auto"."""

from collections import Counter

from msgspec.structs import replace

from ...learning.data.batches import largest_micro_batch
from ...learning.sparse.kernel_table import measure_kernels
from ...learning.spec import KernelTable, Sparsity
from ...learning.workload import Workload
from ...policies.checks.statements import statements_of
from ...policies.policy import Policy
from ..configuration.config import Config
from ..configuration.policy_checks import links
from ..configuration.resolution import workload_settings


def with_kernels(config: Config, policy: Policy) -> tuple[Config, list[str]]:
    """``config`` with a table of kernels, measured on this machine, and notices; as it is if it has one, or needs none.

    The global model is measured, at the sparsities that the run and its policies name. Other plans (of another sparsity, of a
    narrowed layer, of another family of models) have dense products.
    """
    sparsity = config.training.sparsity
    if config.kernels.sparse != "auto" or config.kernels.table or sparsity is None:
        return config, []
    if config.training.precision == "bf16":
        return config, ["sparse products are dense: training.precision is 'bf16', and sparse kernels are for float32"]
    workload = Workload(workload_settings(config, num_devices=config.load_fleet().num_devices))
    table, missing = measure_kernels(
        workload.new_model(),
        workload.example()[0],
        batch=largest_micro_batch(config.training.batch_size, config.training.accumulation),
        sparsities=sparsities(sparsity, policy),
        layout=config.training.layout,
    )
    return replace(config, kernels=replace(config.kernels, table=table)), [_notice(table, missing)]


def sparsities(configured: Sparsity, policy: Policy) -> list[Sparsity]:
    """The configured sparsity, and those at which policies may train devices."""
    levels = {level for link in links(policy) for level in statements_of(link).sparsities}
    others = [replace(configured, weights=level, activations=level) for level in sorted(levels)]
    return [configured, *(other for other in others if other != configured)]


def _notice(table: KernelTable, missing: str) -> str:
    """Which kernels are in use."""
    counts = Counter(name for row in table.values() for name in row.kernels)
    named = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    why = f"; {missing}" if missing else ""
    return f"sparse products by the kernels that were measured to be the fastest: {named}{why}"
