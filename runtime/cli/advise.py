"""``fedbonsai advise``: what a round of each method would cost the configured fleet, before anything is trained."""

from collections.abc import Sequence
from typing import Any

import msgspec

from ...learning.parts.part import whole
from ...learning.randomness import torch_threads
from ...learning.workload import Workload
from ...policies.advice.compare_methods import MethodCost, Note, no_note
from ...policies.advice.verdict import verdict
from ...policies.resolve_policy import make_policy
from ..advice.comparison import Comparison, check_replay
from ..configuration.config import Config
from ..configuration.learning_checks import check_learning
from ..configuration.policy_checks import check_models, check_policy
from ..configuration.resolution import in_form, workload_settings
from ..engine.engine import check_chains, check_names, check_trainable
from ..errors import ConfigError
from ..simulation.costs import Costs
from ..simulation.process_memory import ProcessMemory

COLUMNS = (
    "method",
    "cut behind, width or sparsity",
    "s a round",
    "waits for",
    "MB a device and round",
    "peak MB",
    "cannot take part",
)


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """A row for each method, and a verdict of one sentence."""

    methods: tuple[MethodCost, ...]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def advise(config: Config, *, note: Note = no_note) -> Advice:
    """Compare the methods for an experiment; nothing is trained or measured, and no worker starts. Raises ``ConfigError``.

    A precision or layout that is left to a measurement counts as float32 and contiguous: the larger memory, and the same FLOPs.
    ``note``: receives a line for each method and group of equal devices; with a large model each takes seconds.
    """
    with torch_threads(1):  # on a few samples more threads are slower
        return _advise(config, note)


def _advise(config: Config, note: Note) -> Advice:
    config = in_form(config)
    try:
        policy, fleet = make_policy(config.policy), config.load_fleet()
        check_policy(policy, config, fleet)
        check_names(config)
        workload = Workload(workload_settings(config, num_devices=fleet.num_devices))
        check_learning(config, workload)
        part, memory = whole(workload.spec), ProcessMemory.of(config.memory)
        costs = Costs(workload, fleet, memory=memory)
        check_trainable(workload.spec)
        check_chains(config, workload, part)
        check_models(policy, workload, fleet, config.training)
        costs.row(part, config.training)  # refuses a model that does not fit the data
        comparison = Comparison(config, workload, fleet, costs)
        check_replay(policy, config, comparison)
        rows = comparison.rows(policy, note=note)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Advice(methods=tuple(rows), verdict=verdict(rows))


def table(rows: Sequence[MethodCost]) -> list[tuple[str, ...]]:
    """The rows as text, in the order of ``COLUMNS``."""
    return [
        (
            row.method,
            _parts(row),
            "" if row.seconds is None else f"{row.seconds:.3g}",
            row.bound,
            f"{row.num_bytes / 1e6:.3g}",
            f"{row.peak_memory_bytes / 1e6:.3g}",
            "; ".join(f"{number} {reason}" for reason, number in row.unable),
        )
        for row in rows
    ]


def _parts(row: MethodCost) -> str:
    """What the devices hold, or how sparsely they train it: cuts, widths or sparsities, each with the number of devices."""
    if row.sparsities:
        return "sparsity " + ", ".join(f"{sparsity:.3g} on {number}" for sparsity, number in row.sparsities)
    if row.widths:
        return "width " + ", ".join(f"{width:.3g} on {number}" for width, number in row.widths)
    return ", ".join(f"{cut or 'nothing'} ({number})" for cut, number in row.cuts.items())
