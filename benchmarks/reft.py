"""Narrow models: what a width costs, and what REFT, HeteroFL and FedRolex reach beside FedAvg on unequal devices.

    python benchmarks/reft.py --quick               VGG-16 by width; one round of each method; digits, a few rows and rounds
    python benchmarks/reft.py --save                the same; digits with all rows and three seeds
    python benchmarks/reft.py --data ROOT --save    training alone: CIFAR-10 in place of digits, ResFed's network, one seed

``widths``: VGG-16 for 32x32 images with the 4096-4096 head (33,642,442 parameters), trained on batches of 64 with one thread,
each width in a process of its own; in each of five repetitions all take turns, and times and ratios are medians over these
(``..._each``: of one repetition). ``MACs``: of the forward pass for one sample, counted on the operations that run.
``step_s``: measured, seconds of the processor (one thread: those of a wall clock where nothing else runs), median of the steps.
``rss_MB``: measured, the process's peak resident memory beyond that after the imports. ``..._MB``: of the model as it is sent
to a device, without a codec, as float16, and with 8 and 4 bits for each entry.
``identity``: taken out of the full model and put back, it leaves the model as it was, and is read back to the same bits.
``mask``: the rival, the whole network with 79 % of its weights masked by L1 norm (torch.nn.utils.prune). Aims: a step 3.5 times
faster at width 0.5, and 6 times at 0.25.

``fleet``: ten devices, five of speed 1, two of 1/2, and one each of 1/4, 1/8 and 1/16. ``stragglers``: one round in which each
has as many samples and its transfers take no time; ``spread``: simulated seconds of the slowest device by those of the median
one; ``past_deadline``: devices of the preset ``reft`` that took longer than the median device does for the whole model.

``training``: the same fleet with links of 1 MB/s (digits: all devices in every round; CIFAR-10: half of them, each for 20 steps
of 32 images, distillation every fourth round); labels by a Dirichlet distribution with alpha 0.1; a tenth of the samples is
public, and no device has it in any row. All rows have the same training settings. ``smallest``: FedAvg with the narrowest width
of the row reft on all devices. ``seconds`` are simulated, bytes are those of all packets, plans and reports; ``task_MB`` is
between the server and its distiller. ``times_sooner``: FedAvg's seconds to the target by the row's, of the same seed (aim: at
least 3), and ``times_the_MB``: the row's bytes to the target by FedAvg's; ``times_shorter``: FedAvg's seconds for all rounds by
the row's. ``gain_of_distillation``: accuracy with it minus that without, of narrow and of whole parts, paired by seed. Runs
share the cores. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fedbonsai
from common import Results, add_options, over_seeds
from fedbonsai.runtime.events import Evaluated, PlanEnded, VersionClosed

WIDTHS = (1.0, 0.75, 0.5, 0.25, 0.125)
BATCH = 64
SPEEDS = {1.0: 5, 1 / 2: 2, 1 / 4: 1, 1 / 8: 1, 1 / 16: 1}  # and the number of devices of each
LEVELS = [1.0, 0.5, 0.25, 0.125, 0.0625]


def measure(width: float, steps: int, masked: bool) -> dict[str, Any]:
    """Figures of VGG-16 at one width, in this process, which must be new."""
    import torch

    torch.set_num_threads(1)
    from fedbonsai.actors.device.module import Module
    from fedbonsai.actors.messages.messages import array_specs
    from fedbonsai.comms.codec import CodecSpec
    from fedbonsai.comms.codecs.make_codec import make_codec
    from fedbonsai.comms.packet import sealed_bytes
    from fedbonsai.learning.costs.cost import part_cost
    from fedbonsai.learning.data.config import DataConfig
    from fedbonsai.learning.data.types import Samples
    from fedbonsai.learning.parts.part import Part
    from fedbonsai.learning.spec import Call, Optimiser, Training
    from fedbonsai.learning.training.losses import make_loss
    from fedbonsai.learning.training.training import train
    from fedbonsai.learning.workload import Workload
    from fedbonsai.learning.workload_settings import WorkloadSettings

    data = DataConfig(name="synthetic", kwargs={"shape": [3, 32, 32], "classes": 10, "samples_per_device": BATCH})
    workload = Workload(WorkloadSettings(model=Call("vgg16_bn"), data=data, metrics=(), num_devices=1, seed=0))
    samples = Samples(torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % 10)
    before = _peak_rss()
    blocks = _block_names()
    part = Part(blocks=blocks, trained=blocks, width=width)
    submodel = workload.submodel(part)
    module = Module(workload.architecture(part), channels_last=False)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.normal_(std=0.02)
    training = Training(batch_size=BATCH, optimiser=Optimiser(learning_rate=0.001), steps=1)
    if masked:
        from torch.nn.utils import prune

        for layer in module.model.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                prune.l1_unstructured(layer, "weight", amount=0.79)
    seconds = []
    for _ in range(1 + steps):
        started = time.process_time()
        train(
            module.model,
            samples,
            training=training,
            loss=make_loss(training.loss),
            transform=lambda x, _: x,
            seed=0,
            trainable=None if masked else submodel.trained,
        )
        seconds.append(time.process_time() - started)
    rss = _peak_rss() - before
    example = samples.x[0], samples.y[0]
    cost = part_cost(submodel, example=example, training=training, loss=make_loss(training.loss))
    codecs: dict[str, tuple[CodecSpec, ...]] = {
        "packet": (),
        "float16": (CodecSpec("float16"),),
        "8_bit": (CodecSpec("uniform"),),
        "4_bit": (CodecSpec("uniform", {"bits": 4}), CodecSpec("pack", {"bits": 4})),
    }
    expected = array_specs(submodel.down)
    sent = {
        f"{name}_MB": round(sealed_bytes(make_codec(specs), expected)[0] / 1e6, 2) for name, specs in codecs.items()
    }
    return {
        "parameters": submodel.parameters,
        "MiB": round(4 * submodel.parameters / 2**20, 2),
        "MACs": cost.forward_flops // 2,
        "step_s": round(statistics.median(seconds[1:]), 4),
        "rss_MB": round(rss / 1e6, 1),
        **sent,
        "identity": _identity(workload.slices(part)),
    }


def _identity(slices: dict[str, Any]) -> bool:
    """Whether each slice of a random model can be taken out and put back without any change, and read back from zeros."""
    import torch
    from fedbonsai.learning.models.cnn import vgg16_bn
    from fedbonsai.learning.parts.slices import gather, put

    full = {name: torch.randn_like(value.float()) for name, value in vgg16_bn().state_dict().items()}
    for name, part in slices.items():
        taken, before, zeros = gather(full[name], part), full[name].clone(), torch.zeros_like(full[name])
        put(full[name], part, taken)
        put(zeros, part, taken)
        if not torch.equal(full[name], before) or not torch.equal(gather(zeros, part), taken):
            return False
    return True


def _block_names() -> tuple[str, ...]:
    """Names of the network's blocks, from a copy without weights."""
    import torch
    from fedbonsai.learning.models.cnn import vgg16_bn
    from fedbonsai.learning.parts.blocks import cut

    with torch.device("meta"):
        return cut(vgg16_bn()).spec.block_names


def _peak_rss() -> int:
    """The peak resident memory of this process, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def in_a_process(width: float, steps: int, masked: bool) -> dict[str, Any]:
    """Figures of one width, from a new process."""
    command = [sys.executable, __file__, "--measure", str(width), "--steps", str(steps)]
    command += ["--masked"] if masked else []
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def widths(results: Results, steps: int, repetitions: int) -> dict[str, Any]:
    """A row for each width, and one for the masked network: medians of the repetitions, in each of which all take turns."""
    names = [*((f"{width:g}", width, False) for width in WIDTHS), ("mask", 1.0, True)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in names}
    for repetition in range(repetitions):
        for name, width, masked in names:
            key = f"width {name}, repetition {repetition + 1}"
            found[name].append(results.row(key, in_a_process, width, steps, masked))
    rows = {
        name: each[0] | {key: round(statistics.median(one[key] for one in each), 4) for key in ("step_s", "rss_MB")}
        for name, each in found.items()
    }
    faster: dict[str, Any] = {f"MACs_of_1_by_MACs_of_{name}": macs_ratio(rows, name) for name in rows}
    for name in ("0.75", "0.5", "0.25", "0.125", "mask"):
        pairs = zip(found["1"], found[name], strict=True)
        ratios = [round(whole["step_s"] / other["step_s"], 2) for whole, other in pairs]
        faster[f"step_of_1_by_step_of_{name}"] = round(statistics.median(ratios), 2)
        faster[f"step_of_1_by_step_of_{name}_each"] = ratios
    return {"rows": rows, **faster}


def macs_ratio(rows: dict[str, Any], name: str) -> float:
    """How many times the multiply-accumulates of a row the whole network needs."""
    return round(rows["1"]["MACs"] / rows[name]["MACs"], 2)


def stragglers() -> dict[str, Any]:
    """One round of FedAvg and one of the preset ``reft``, without its distillation: the spread of the devices' seconds."""
    link = {"up_bytes_per_s": 1e15, "down_bytes_per_s": 1e15, "memory_bytes": 10**10}
    common: dict[str, Any] = {
        "model": "resfed_cnn",
        "data": {
            "name": "synthetic",
            "kwargs": {"shape": [3, 32, 32], "classes": 10, "samples_per_device": 8},
        },
        "fleet": fleet(50e9, link),
        "training": {"epochs": 1, "batch_size": 8},
        "evaluation": {"where": "none"},
        "backend": "inline",
        "stop": {"rounds": 1},
    }
    seconds = {}
    for name, chain in (("fedavg", []), ("reft", policies("reft_no_distillation", {}))):
        events = list(fedbonsai.run(common | {"policy": [{"name": "all"}, *chain]}))
        reports = [event.report for event in events if isinstance(event, PlanEnded)]
        assert len(reports) == sum(SPEEDS.values())
        seconds[name] = [report.virtual.seconds for report in reports]
    deadline = statistics.median_low(seconds["fedavg"])
    found: dict[str, Any] = {
        f"spread_{name}": round(max(each) / statistics.median(each), 2) for name, each in seconds.items()
    }
    return found | {"past_deadline": sum(each > 1.0001 * deadline for each in seconds["reft"])}


def policies(row: str, distillation: dict[str, Any]) -> list[dict[str, Any]]:
    """The policy list of a row; ``distillation``: settings of that policy."""
    by_level = {"name": "width", "levels": LEVELS, "unit": "width", "min_channels": 1, "scaled": True}
    reft = {"name": "width", "rule": "deadline", "too_slow": "fewer_steps"}
    slowest = {"name": "width", "rule": "fixed", "widths": {f"class{n}": 0.25 for n, _ in enumerate(SPEEDS)}}
    chains: dict[str, list[dict[str, Any]]] = {
        "fedavg": [],
        "smallest": [slowest | {"channels": "prefix"}],
        "heterofl": [by_level | {"channels": "prefix"}],
        "fedrolex": [by_level | {"channels": "rolling", "refresh": 1}],
        "reft_no_distillation": [reft],
        "reft_no_width": [distillation],
        "reft": [reft, distillation],
    }
    return chains[row]


ROWS = ("fedavg", "smallest", "heterofl", "fedrolex", "reft_no_distillation", "reft_no_width", "reft")
# A tenth of the digits is public: about 140 samples. A tenth of these is too few to tell a better student from a worse one.
DISTILLATION = {"name": "distillation", "class_prior": 1.0, "steps": 100, "held_out": 0.3}
# On CIFAR-10 a step of the server costs as much as one of a device's, so there are fewer, every fourth round.
DISTILLATION_CIFAR = DISTILLATION | {"steps": 60, "held_out": 0.1, "batch_size": 64, "check_every": 20}
DISTILLATION_CIFAR |= {"every": 4, "from_round": 3}
DIGITS: dict[str, Any] = {
    "model": "digits_cnn",
    "training": {"epochs": 2, "batch_size": 16, "optimiser": {"learning_rate": 0.02}},
    "backend": "inline",
}
CIFAR: dict[str, Any] = {
    "model": "resfed_cnn",
    "training": {
        "steps": 20,
        "batch_size": 32,
        "optimiser": {"learning_rate": 0.02},
        "precision": "auto",
        "channels_last": True,
    },
    "workers": 2,
}


MEGABYTE = {"up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6, "memory_bytes": 10**9}


def fleet(flop_per_s: float, link: dict[str, Any]) -> dict[str, Any]:
    """Ten devices of five classes; ``flop_per_s``: of the fastest."""
    classes = [
        {"name": f"class{n}", "count": count, "flop_per_s": speed * flop_per_s, **link}
        for n, (speed, count) in enumerate(SPEEDS.items())
    ]
    return {"classes": classes}


def run(row: str, config: dict[str, Any], *, cohort: float, target: float) -> dict[str, Any]:
    """One run: its accuracy, and what it took, also until it first reached ``target``."""
    started, closed, accuracies = time.perf_counter(), None, list[float]()
    reached: dict[str, Any] = {"rounds_to_target": None, "seconds_to_target": None, "MB_to_target": None}
    distillation = DISTILLATION_CIFAR if config["data"]["name"] == "cifar10" else DISTILLATION
    policy = [{"name": "random", "cohort": cohort}, *policies(row, distillation)]
    for event in fedbonsai.run(config | {"name": row, "policy": policy}):
        if isinstance(event, VersionClosed):
            closed = event
        elif isinstance(event, Evaluated) and closed is not None:
            accuracies.append(event.figures["accuracy"])
            if accuracies[-1] >= target and reached["rounds_to_target"] is None:
                megabytes = round((closed.up_bytes + closed.down_bytes) / 1e6, 2)
                reached = {"rounds_to_target": closed.version, "seconds_to_target": round(event.time_s, 1),
                           "MB_to_target": megabytes}  # fmt: skip
    assert closed is not None
    return {
        "accuracy": round(statistics.fmean(accuracies[-3:]), 4),
        "best": round(max(accuracies), 4),
        "seconds": round(closed.time_s, 1),
        "up_MB": round(closed.up_bytes / 1e6, 2),
        "down_MB": round(closed.down_bytes / 1e6, 2),
        "task_MB": round(closed.task_bytes / 1e6, 2),
        **reached,
        "wall_s": round(time.perf_counter() - started, 1),
    }


def training(
    results: Results,
    common: dict[str, Any],
    *,
    rows: list[str],
    seeds: range,
    cohort: float,
    target: float,
    jobs: int,
) -> dict[str, Any]:
    """A row for each method: the mean over the seeds, and each seed's figures; ``jobs`` runs at once."""
    keys = {(row, seed): f"{row}, seed {seed}" for row in rows for seed in seeds}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {
            pool.submit(run, row, common | {"seed": seed}, cohort=cohort, target=target): key
            for (row, seed), key in keys.items()
            if key not in results
        }
        for future in as_completed(running):
            results.row(running[future], future.result)
    result = {}
    for row in rows:
        by_seed = {str(seed): results[keys[row, seed]] for seed in seeds}
        if "fedavg" in rows:
            by_seed = {
                seed: figures | beside(results[keys["fedavg", int(seed)]], figures) for seed, figures in by_seed.items()
            }
        result[row] = over_seeds(by_seed)
    return result


def beside(fedavg: dict[str, Any], figures: dict[str, Any]) -> dict[str, float | None]:
    """Ratios of a row and FedAvg, of one seed; None where one of them has not reached the target."""

    def ratio(over: float | None, under: float | None) -> float | None:
        return round(over / under, 2) if over and under else None

    return {
        "times_sooner": ratio(fedavg["seconds_to_target"], figures["seconds_to_target"]),
        "times_the_MB": ratio(figures["MB_to_target"], fedavg["MB_to_target"]),
        "times_shorter": ratio(fedavg["seconds"], figures["seconds"]),
    }


def gain(of: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """What one row's accuracy is above another's, seed by seed, beside the standard deviations over the seeds."""
    pairs = zip(of["by_seed"].values(), over["by_seed"].values(), strict=True)
    gains = [round(one["accuracy"] - other["accuracy"], 4) for one, other in pairs]
    return {
        "by_seed": gains,
        "mean": round(statistics.fmean(gains), 4),
        "stdev": round(statistics.stdev(gains), 4) if len(gains) > 1 else None,
        **{
            f"accuracy_stdev_{name}": round(statistics.stdev(f["accuracy"] for f in row["by_seed"].values()), 4)
            for name, row in (("with", of), ("without", over))
            if len(gains) > 1
        },
    }


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", help="folder of CIFAR-10 (data.root)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    add_options(parser)
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5, help=argparse.SUPPRESS)
    parser.add_argument("--masked", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.steps, options.masked)))
        return
    result: dict[str, Any] = {}
    data = {"partition": {"name": "dirichlet", "alpha": 0.1}, "public_share": 0.1}
    if options.data:
        rounds, seeds, cohort, target = options.rounds or 24, range(options.seeds or 1), 0.5, 0.35
        common = CIFAR | {"data": {"name": "cifar10", "root": options.data, **data}, "fleet": fleet(50e9, MEGABYTE)}
        common |= {"evaluation": {"every": 4}}
    else:
        seeds = range(options.seeds or (1 if options.quick else 3))
        rounds, cohort, target = options.rounds or (4 if options.quick else 50), 1.0, 0.9
        common = DIGITS | {"data": {"name": "digits", **data}, "fleet": fleet(1e9, MEGABYTE)}
    results = Results("reft_cifar" if options.data else "reft", options, seeds=seeds)
    common |= {"stop": {"rounds": rounds}, "server": {"statistics": "batch"}}
    print(f"{common['data']['name']}, {rounds} rounds, {len(seeds)} seeds", flush=True)
    settings = {
        "data": common["data"]["name"],
        "model": common["model"],
        "rounds": rounds,
        "seeds": len(seeds),
        "target": target,
    }
    chosen = options.rows or (["fedavg", "heterofl", "reft"] if options.quick else list(ROWS))
    jobs = 1 if options.data else len(os.sched_getaffinity(0))  # on CIFAR-10 each run has workers of its own
    rows = training(results, common, rows=chosen, seeds=seeds, cohort=cohort, target=target, jobs=jobs)
    gains = {
        name: gain(rows[of], rows[over])
        for name, of, over in (
            ("narrow", "reft", "reft_no_distillation"),
            ("whole", "reft_no_width", "fedavg"),
        )
        if of in rows and over in rows
    }
    result["training"] = settings | {"rows": rows, "gain_of_distillation": gains}
    if not options.data:
        print("VGG-16 by width", flush=True)
        result["widths"] = widths(results, *((2, 1) if options.quick else (5, 5)))
        result["stragglers"] = results.row("stragglers", stragglers)
    results.finish(result)


if __name__ == "__main__":
    main()
