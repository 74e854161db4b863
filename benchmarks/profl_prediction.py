"""How well the memory of training is predicted: the rows that profl.py has measured, beside what is predicted for them now.

    python benchmarks/profl_prediction.py --save

Nothing is measured again: a prediction may change with the program, what a step needs hardly does. The networks are not those
to which the fit was made (fit_memory.py). ``error``: of the prediction, relative to what was measured.

``--quick``: the first network of the saved result alone. The last line is JSON.
"""

import argparse
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from common import Results, add_options, saved
from fedbonsai.policies.progressive.stages import Groups, train_part
from profl import MODELS
from step_memory import Trainer


def groups_of(names: Sequence[str], ends: Sequence[str]) -> Groups:
    """The groups of blocks that end with these."""
    starts = [0, *(names.index(end) + 1 for end in ends)]
    return tuple(tuple(names[start:end]) for start, end in pairwise(starts))


def predicted(name: str, batch: int, measured: dict[str, Any]) -> dict[str, Any]:
    """The rows of one network at one batch size, with what is predicted for them."""
    trainer = Trainer(MODELS[name])
    names = trainer.workload.spec.block_names

    def row(kind: str) -> dict[str, Any]:
        changes: dict[str, Any] = {"checkpointing": True} if kind == "whole, checkpointing" else {}
        if kind.startswith("stage "):
            low = kind.endswith(" bf16")
            groups = groups_of(names, measured["groups bf16" if low else "groups"])
            changes = {"part": train_part(groups, names[-1], int(kind.split()[1]) - 1)}
            changes |= {"frozen_precision": "bf16"} if low else {}
        plan = trainer.plan(batch=batch, **changes)
        megabytes = trainer.costs.row(plan.part, plan.training).process_memory_bytes / 1e6
        actual = measured["rows"][kind]["measured_mb"]
        return {
            "predicted_mb": round(megabytes, 1),
            "measured_mb": actual,
            "error": round(megabytes / actual - 1, 4),
        }

    try:
        return {kind: row(kind) for kind in measured["rows"]}
    finally:
        trainer.device.close()


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    add_options(parser)
    options = parser.parse_args()
    results, memory = Results("profl_prediction", options), saved("profl")["memory"]
    keys = [next(iter(memory))] if options.quick else list(memory)
    rows = {key: results.row(key, predicted, *_parsed(key), memory[key]) for key in keys}
    found = [abs(row["error"]) for each in rows.values() for row in each.values()]
    errors = {"median_error": round(statistics.median(found), 4), "worst_error": max(found), "compared": len(found)}
    results.finish({"rows": rows, "errors": errors})


def _parsed(key: str) -> tuple[str, int]:
    """Network and batch size of a row of the saved result."""
    name, _, batch = key.partition(", ")
    return name, int(batch)


if __name__ == "__main__":
    main()
