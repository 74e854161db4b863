"""Block by block training: memory of each stage beside that of the whole model.

    python benchmarks/profl.py --quick      one small network
    python benchmarks/profl.py --save       four networks at two batch sizes: more than an hour
        [--continue]                        the rows that are missing, also on another machine

``memory``: for each network and batch, the peak of training of the whole model, of each stage of ``profl`` with at most 6
groups, chosen by predicted peaks, of each stage where frozen blocks are in bf16, with groups of its own, and of the whole
model with checkpointing.
``predicted_mb``: from a dry run and the workspace fit, which was made on other networks. ``measured_mb``: the smallest limit of
the data segment above the idle trainer under which two steps run, to 0.5 %. ``rss_mb``: growth of resident memory.
``worst_stage_saving``: 1 - the largest measured peak of a stage by that of the whole model, without checkpointing on either
side (the paper's best: 57.4 %, arXiv 2404.13349). VGG's head is one linear layer.

The last line is JSON.
"""

import argparse
import statistics
import time
from typing import Any

from common import Results, add_options
from fedbonsai.learning.parts.part import Part
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.progressive.division import choose_groups
from fedbonsai.policies.progressive.stages import Groups, train_part
from step_memory import Trainer, measure, resident

MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18"},
    "resnet34": {"name": "torchvision/resnet34", "kwargs": {"stem": "cifar"}},
    "vgg11_bn": {"name": "networks:vgg11_linear"},
    "vgg16_bn": {"name": "networks:vgg16_linear"},
}
MOST_GROUPS = 6
RESOLUTION = 0.005


def groups_of(trainer: Trainer, batch: int, **training: Any) -> Groups:
    """The division whose worst stage is predicted to need the least memory."""
    names, settings = trainer.workload.spec.block_names, trainer.plan(batch=batch, **training).training

    def peak(part: Part) -> int:
        return trainer.costs.row(part, settings).process_memory_bytes

    return choose_groups(names, MOST_GROUPS, peak=lambda groups, stage: peak(train_part(groups, names[-1], stage)))


def memory_of(results: Results, name: str, model: dict[str, Any], batch: int, *, rss: bool) -> dict[str, Any]:
    """All rows of one network at one batch size."""
    trainer = Trainer(model)
    found: dict[str, Any] = {"rows": {}}

    def measured(plan: Plan) -> dict[str, Any]:
        return measure(trainer, plan, resolution=RESOLUTION) | ({"rss_mb": resident(trainer, plan)} if rss else {})

    def row(kind: str, *, of: str = "", **changes: Any) -> float:
        """The measured peak. ``of``: the groups, which are part of the key of the row."""
        figures = results.row(f"{name}, {batch}: {kind}{of}", measured, trainer.plan(batch=batch, **changes))
        found["rows"][kind] = figures
        return float(figures["measured_mb"])

    try:
        whole = row("whole")
        row("whole, checkpointing", checkpointing=True)
        head = trainer.workload.spec.block_names[-1]
        for suffix, training in (("", {}), (" bf16", {"frozen_precision": "bf16"})):
            started = time.perf_counter()
            groups = groups_of(trainer, batch, **training)
            found[f"groups{suffix}"] = [group[-1] for group in groups]
            found[f"choice_s{suffix}"] = round(time.perf_counter() - started, 1)
            parts = [train_part(groups, head, stage) for stage in range(len(groups))]
            ends = f" of {', '.join(found[f'groups{suffix}'])}"
            peaks = [row(f"stage {n}{suffix}", of=ends, part=part, **training) for n, part in enumerate(parts, 1)]
            found[f"worst_stage_saving{suffix}"] = round(1 - max(peaks) / whole, 4)
    finally:
        trainer.device.close()
    return found


def errors(memory: dict[str, Any]) -> dict[str, float]:
    """Median and worst error of the predictions, over all rows."""
    found = [abs(row["error"]) for each in memory.values() for row in each["rows"].values()]
    return {"median_error": round(statistics.median(found), 4), "worst_error": max(found)}


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 128])
    add_options(parser)
    options = parser.parse_args()
    results = Results("profl", options, settings={"resolution": RESOLUTION})
    models = (
        {"resfed_cnn": {"name": "resfed_cnn"}} if options.quick else {name: MODELS[name] for name in options.models}
    )
    memory = {}
    for name, model in models.items():
        for batch in [16] if options.quick else options.batches:
            memory[f"{name}, {batch}"] = memory_of(results, name, model, batch, rss=not options.quick)
    results.finish({"memory": memory, "prediction": errors(memory)})


if __name__ == "__main__":
    main()
