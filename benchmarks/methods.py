"""All methods on one task and one fleet: accuracy, bytes, simulated seconds, memory and participation.

    python benchmarks/methods.py --data ROOT --quick              four rows, one seed, two rounds, in under a minute
    python benchmarks/methods.py --data ROOT --save               all rows, three seeds: hours
    python benchmarks/methods.py --data ROOT --save --continue    the runs that are missing, also on another machine

CIFAR-10 on 100 devices, ten a round for 100 rounds: 4 % of the training images are public, the others are divided into equal
shares by a Dirichlet distribution with alpha 1. Four convolutions with batch normalisation (networks.py), one local epoch in
batches of 16, SGD with a learning rate of 0.02 and momentum 0.9, tuned for FedAvg, the same for all rows. Normalisation is by
the statistics of the batch in all rows. The fleet: 25 devices of each of four classes, of 2, 1, 0.5 and 0.25 GFLOP/s, with
memory for 2, 1.5, 1.1 and 0.7 times the predicted training of the whole model, links of 100 kB/s up and 400 kB/s down, and a
host of 1 TFLOP/s. A method that trains the whole model leaves out the last class.

``public``: the network trained on the public images alone (``fedbonsai pretrain``), in results/methods.safetensors, and trained
again if that file is missing. "EcoFed" and "FedAvg, trunk" start with the blocks of it before the cut, rows "holistic" with all
of it, the others with random weights. The last three rows are mixes that were tried by hand.

``accuracy``: on the test images, mean of the last three evaluations (every fourth round). ``up_MB``, ``down_MB``: sent by and
to all devices, all packets, plans and reports, without evaluation; ``other_MB``: between the server and its hosts or its
distiller. ``seconds``: simulated. ``peak_MB``: the largest predicted memory of a plan. ``participation``: devices that have
trained, by all. ``to_60``, ``to_70``: rounds, bytes and seconds to the first evaluation with that accuracy; null: not
reached. ``wall_s``: of this run, one thread; runs share the cores. ``runs_s``: of all. The last line is JSON.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import fedbonsai
from common import Results, add_options, over_seeds, refuse
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.links.predict import Residual
from fedbonsai.learning.training.pretraining import Recipe
from fedbonsai.policies.decision import Decision
from fedbonsai.runtime.cli.pretrain import pretrain
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.events import Evaluated, PlanEnded, VersionClosed
from msgspec.structs import replace
from safetensors import safe_open

DEVICES, COHORT = 100, 0.1
CUT = "0.4"  # behind the second convolution: 32x8x8
SPEEDS, MEMORY = (2e9, 1e9, 0.5e9, 0.25e9), (2.0, 1.5, 1.1, 0.7)
TARGETS = (0.6, 0.7)
WEIGHTS = Path(__file__).resolve().parent / "results" / "methods.safetensors"
EIGHT_BIT = [{"name": "uniform", "bits": 8, "granularity": "channel"}, "entropy"]
HETEROFL = {"name": "width", "levels": [1.0, 0.5, 0.25, 0.125, 0.0625], "unit": "width", "min_channels": 1,
            "scaled": True, "channels": "prefix"}  # fmt: skip
REFT = {"name": "width", "rule": "deadline", "channels": "l1", "too_slow": "fewer_steps"}

DISTILLATION = {
    "name": "distillation",
    "steps": 60,
    "batch_size": 64,
    "check_every": 20,
    "class_prior": 1.0,
    "every": 5,
}


@dataclass(frozen=True)
class Links:
    """Residuals in both directions by given rules and codecs, for methods that the policy ``residuals`` does not offer."""

    up: dict[str, Any]
    down: dict[str, Any]
    codecs: tuple[dict[str, Any], ...] = field(default=())

    def init(self) -> None:
        """No state."""

    def decide(self, view: Any, state: None, decision: Decision) -> tuple[Decision, None]:
        """Set rules and codecs of every plan."""
        chain = tuple(CodecSpec(each["name"], each.get("options", {})) for each in self.codecs)
        changes = {"link_up": Residual(**self.up), "link_down": Residual(**self.down)}
        plans = [replace(plan, codec_up=chain, codec_down=chain, **changes) for plan in decision.plans]
        return replace(decision, plans=tuple(plans)), None


def links(up: dict[str, Any], down: dict[str, Any], *codecs: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """The entry of a chain."""
    chain = [{"name": name, "options": options} for name, options in codecs]
    return {"name": "methods:Links", "up": up, "down": down, "codecs": chain}


def paper(density: float) -> dict[str, Any]:
    """ResFed by the paper's prediction and quantiser; of these entries the quantiser drops half. Our entropy coder."""
    half_step = {"rule": "half_step"}
    median = {"levels": 1, "scope": "global", "rule": "median"}
    vectors = ("uniform", {"bits": 8, "roles": ["vector"]})
    return links(half_step, half_step, ("topk", {"density": density}), ("ternary", median), vectors, ("entropy", {}))


def zerofl(sparsity: float) -> dict[str, Any]:
    """ZeroFL at that sparsity of weights and activations."""
    return {"policy": [{"name": "zerofl"}], "training": {"sparsity": {"weights": sparsity, "activations": sparsity}}}


STC = links(
    {"rule": "delta", "feedback": True},
    {"rule": "stationary", "feedback": True},
    ("topk", {"density": 0.01}),
    ("ternary", {}),
    ("uniform", {"bits": 8, "roles": ["vector"]}),
    ("rans", {}),
)
ROWS: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedAvg, float16": {"codecs": {"up": ["float16"], "down": ["float16"]}},
    "FedAvg, 8 bit, entropy": {"codecs": {"up": EIGHT_BIT, "down": EIGHT_BIT}},
    "STC, 1 %": {"policy": [STC]},
    "SplitFed": {"policy": [{"name": "splitfed", "cut": CUT}]},
    "local loss": {"policy": [{"name": "local_loss", "cut": CUT}]},
    "EcoFed": {"policy": [{"name": "ecofed", "cut": CUT}], "init": "partial"},
    "EcoFed, holistic": {"policy": [{"name": "ecofed", "cut": CUT}], "init": "holistic"},
    "FedAvg, trunk": {"init": "partial"},
    "FedAvg, holistic": {"init": "holistic"},
    "HeteroFL": {"policy": [HETEROFL]},
    "REFT": {"policy": [REFT, DISTILLATION]},
    "ZeroFL, 90 %": zerofl(0.9),
    "ZeroFL, 95 %": zerofl(0.95),
    "ProFL": {"select": "last", "policy": [{"name": "profl"}]},
    "ResFed, paper, 5 %": {"policy": [paper(0.05)]},
    "ResFed, paper, 10 %": {"policy": [paper(0.1)]},
    "ResFed": {"policy": [{"name": "residuals"}]},
    "REFT's widths, ResFed": {"policy": [REFT, {"name": "residuals"}]},
    "REFT, 8 bit, entropy": {"policy": [REFT, DISTILLATION], "codecs": {"up": EIGHT_BIT, "down": EIGHT_BIT}},
    "ResFed, holistic": {"policy": [{"name": "residuals"}], "init": "holistic"},
}


def configuration(row: str, *, root: str, seed: int, rounds: int, weights: str, memory_bytes: int) -> dict[str, Any]:
    """The configuration of one run. ``memory_bytes``: predicted peak of training the whole model."""
    about = ROWS[row]
    classes = [
        {"name": f"class{n}", "count": DEVICES // len(SPEEDS), "flop_per_s": speed, "memory_bytes": int(share * memory_bytes),
         "up_bytes_per_s": 1e5, "down_bytes_per_s": 4e5}
        for n, (speed, share) in enumerate(zip(SPEEDS, MEMORY, strict=True))
    ]  # fmt: skip
    cohort, chain = [{"name": "random", "cohort": COHORT}], about.get("policy", [])
    optimiser = {"learning_rate": 0.02, "momentum": 0.9}
    training = {"epochs": 1, "batch_size": 16, "layout": "channels_last", "optimiser": optimiser}
    init = {"mode": about["init"], "weights": weights} if "init" in about else {}
    return {
        "name": row,
        "seed": seed,
        "model": "networks:narrow_vgg",
        "data": {
            "name": "cifar10",
            "root": root,
            "partition": {"name": "dirichlet", "alpha": 1.0, "sizes": "equal"},
            "public_share": 0.04,
        },
        "fleet": {"classes": classes, "hosts": {"count": 1, "flop_per_s": 1e12}},
        "policy": [{"name": "all"}, *chain, *cohort] if about.get("select") == "last" else [*cohort, *chain],
        "training": training | about.get("training", {}),
        "codecs": about.get("codecs", {}),
        "init": init | ({"trunk": CUT} if init.get("mode") == "partial" else {}),
        "server": {"statistics": "batch"},
        "evaluation": {"every": 4},
        "checkpoint": {"every": None},
        "backend": "inline",
        "stop": {"rounds": rounds},
    }


def whole_peak(root: str) -> int:
    """The predicted peak of training the whole model."""
    from fedbonsai.learning.parts.part import whole
    from fedbonsai.learning.workload import Workload
    from fedbonsai.runtime.configuration.resolution import workload_settings
    from fedbonsai.runtime.simulation.costs import Costs

    config = load_config(configuration("FedAvg", root=root, seed=0, rounds=1, weights="", memory_bytes=10**9))
    workload = Workload(workload_settings(config, num_devices=DEVICES))
    return Costs(workload, config.load_fleet()).row(whole(workload.spec), config.training).peak_memory_bytes


def train_public(root: str, path: Path, *, epochs: int) -> None:
    """Train the network on the public share."""
    settings = configuration("FedAvg", root=root, seed=0, rounds=1, weights="", memory_bytes=10**9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        out = Path(unfinished) / path.name
        pretrain(load_config(settings), out=out, recipe=Recipe(epochs=epochs, batch_size=64, learning_rate=0.02))
        out.replace(path)


def public(weights: Path) -> dict[str, Any]:
    """The figures of the pretrained network by itself."""
    with safe_open(weights, framework="numpy") as file:
        metadata = file.metadata()
    return {"accuracy": round(float(metadata["test_accuracy"]), 4), "hash": metadata["hash"]} | {
        name: int(metadata[name]) for name in ("samples", "epochs", "best_epoch")
    }


def run(config: dict[str, Any]) -> dict[str, Any]:
    """One run to its end."""
    import torch

    torch.set_num_threads(1)
    started, peak = time.perf_counter(), 0
    closed = VersionClosed(version=0, folded=0, loss=None, up_bytes=0, down_bytes=0, wall_s=0)
    accuracies, trained, reached = list[float](), set[int](), dict[str, Any]()
    for event in fedbonsai.run(config):
        if isinstance(event, PlanEnded):
            peak = max(peak, event.report.virtual.peak_memory_bytes)
            if event.report.samples:
                trained.add(event.report.plan.device)
        elif isinstance(event, VersionClosed):
            closed = event
        elif isinstance(event, Evaluated):
            accuracies.append(event.figures["accuracy"])
            for target in TARGETS:
                if accuracies[-1] >= target and (key := f"to_{100 * target:.0f}") not in reached:
                    reached[key] = {"rounds": closed.version} | spent(closed)
    return {
        "accuracy": round(statistics.fmean(accuracies[-3:]), 4),
        "best": round(max(accuracies), 4),
        "rounds": closed.version,
        **spent(closed),
        "peak_MB": round(peak / 1e6, 2),
        "participation": len(trained) / DEVICES,
        **{f"to_{100 * target:.0f}": reached.get(f"to_{100 * target:.0f}") for target in TARGETS},
        "wall_s": round(time.perf_counter() - started, 1),
    }


def spent(closed: VersionClosed) -> dict[str, Any]:
    """Bytes and simulated seconds so far."""
    return {
        "up_MB": round(closed.up_bytes / 1e6, 3),
        "down_MB": round(closed.down_bytes / 1e6, 3),
        "other_MB": round((closed.host_bytes + closed.task_bytes) / 1e6, 3),
        "seconds": round(closed.time_s, 1),
    }


def table(results: Results, rows: list[str], seeds: range) -> dict[str, Any]:
    """The rows of which some seed is measured."""
    found = {}
    for row in rows:
        by_seed = {str(seed): results[f"{row}, seed {seed}"] for seed in seeds if f"{row}, seed {seed}" in results}
        if by_seed:
            found[row] = over_seeds(by_seed) | {
                f"to_{100 * target:.0f}": means([each[f"to_{100 * target:.0f}"] for each in by_seed.values()])
                for target in TARGETS
            }
    return found


def means(reached: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The mean of each figure over the seeds; None if a seed has not reached the target."""
    known = [each for each in reached if each is not None]
    if len(known) < len(reached):
        return None
    return {name: round(statistics.fmean(each[name] for each in known), 3) for name in known[0]}


def missing(results: Results, rows: list[str], seeds: range) -> Iterator[tuple[str, str, int]]:
    """Key, row and seed of the runs to be made, the first seed of all rows first."""
    for seed in seeds:
        for row in rows:
            if (key := f"{row}, seed {seed}") not in results:
                yield key, row, seed


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, four rows, two rounds")
    parser.add_argument("--data", required=True, help="folder of CIFAR-10 (data.root)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, help="default: 100, with --quick 2")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE",
                        help="the pretrained network, trained if it is missing; default: that of results/")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time; default: cores")
    add_options(parser)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # so that other processes can import Links
    rounds, epochs = options.rounds or (2 if options.quick else 100), 1 if options.quick else 40
    seeds = range(1 if options.quick else options.seeds)
    rows = options.rows or (["FedAvg", "EcoFed", "ResFed", "HeteroFL"] if options.quick else list(ROWS))
    settings = {"rounds": rounds, "pretraining": epochs}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = Results("methods", options, seeds=seeds, settings=settings)
    with tempfile.TemporaryDirectory() as scratch:
        weights: Path = Path(scratch) / "public.safetensors" if options.quick else options.weights
        if not weights.exists():
            train_public(options.data, weights, epochs=epochs)
        kept, here = results.row("public", public, weights)["hash"], public(weights)["hash"]
        if kept != here:  # of a network that was pretrained on another machine: bits depend on processor and threads
            refuse(f"--weights holds a network with hash {here}; the rows so far start from {kept}: name its file")
        memory_bytes = results.row("whole peak", whole_peak, options.data)
        common = {"root": options.data, "rounds": rounds, "weights": str(weights), "memory_bytes": memory_bytes}
        # A process for each run, with one thread: no run inherits memory or random states of another.
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            try:
                made = {
                    pool.submit(run, configuration(row, seed=seed, **common)): key
                    for key, row, seed in missing(results, rows, seeds)
                }
                for each in as_completed(made):
                    results.row(made[each], each.result)
            except BaseException:  # also a signal: else the other runs would go on, and be lost
                pool.shutdown(wait=False, cancel_futures=True)
                for process in active_children():
                    process.terminate()
                raise
    rows = table(results, list(ROWS), seeds)
    runs_s = round(sum(run["wall_s"] for row in rows.values() for run in row["by_seed"].values()))
    about = {"public": results["public"], "whole_peak_MB": round(memory_bytes / 1e6, 2), "runs_s": runs_s}
    results.finish(about | {"rows": rows})


if __name__ == "__main__":
    main()
