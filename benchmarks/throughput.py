"""The share of the machine that is left for training: fedbonsai on Ray compared with bare PyTorch in one run.

    bare, 1 thread     one process, one torch thread, the ten devices one after another
    bare, all cores    the same with one torch thread per core
    bare, processes    as many processes as cores, one thread each, five devices each (two cores)
    fedbonsai          a local Ray, one worker per core, whole rounds: decide, send, train, return, fold

Every contender trains the same batches of the same ten devices with the same optimiser, precision and memory format: ten of
100 devices, 100 samples each, batch 32, on ``small`` and on ``resfed_cnn``. Contenders take turns within each repetition,
so that a slow minute of the machine affects all of them. ``efficiency`` = bare processes / round; ``overhead_ms`` is the
median round of devices that train nothing but receive, load, seal and return the whole model (``small``: 8.6 MB each way),
and are folded; the aim is 30. For comparison, ``object_store_ms``: ten plain Ray calls that return an array of the model's
size to one caller, and do nothing else.

    python benchmarks/throughput.py --quick               four devices a round
    python benchmarks/throughput.py --variants --save
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import fedbonsai
import numpy as np
import ray
import torch
from common import Results, add_options, median
from fedbonsai.clusters.ray_backend.ray_cluster import start_local
from fedbonsai.learning.data.batches import batches
from fedbonsai.learning.data.types import SamplePool, Samples
from fedbonsai.learning.models import build
from fedbonsai.learning.spec import Call, Optimiser
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.runtime.events import VersionClosed
from torch import Tensor

DEVICES, COHORT, SAMPLES, BATCH = 100, 10, 100, 32
OPTIMISER = Optimiser(learning_rate=0.01, momentum=0.9)
CORES = len(os.sched_getaffinity(0))


def dataset(num_devices: int, seed: int, root: str | None) -> SamplePool:
    """Images of CIFAR's shape, in memory: training is timed, not loading."""
    generator = torch.Generator().manual_seed(0)
    count = num_devices * SAMPLES
    x = torch.randn((count, 3, 32, 32), generator=generator)
    y = torch.randint(0, 10, (count,), generator=generator)
    return SamplePool(train=Samples(x, y), num_classes=10)


class Bare:
    """A plain PyTorch loop over devices: no framework, no transport, no aggregation."""

    def __init__(self, model: str, *, channels_last: bool, bf16: bool) -> None:
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.bf16 = bf16
        self.model = build(Call(model), seed=0, outputs=10).to(memory_format=self.layout)
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.loss = make_loss(Call("cross_entropy"))
        pool = dataset(COHORT, 0, None)
        self.x, self.y = pool.train.x, pool.train.y

    def device(self, number: int) -> None:
        """One device's epoch."""
        self.model.load_state_dict(self.start)
        self.model.train()
        optimiser = torch.optim.SGD(
            self.model.parameters(), lr=OPTIMISER.learning_rate, momentum=OPTIMISER.momentum, fused=True
        )
        offset = number * SAMPLES
        for indices in batches(SAMPLES, batch_size=BATCH, seed=number):
            chosen = torch.from_numpy(indices) + offset
            x: Tensor = self.x[chosen].contiguous(memory_format=self.layout)
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                value = self.loss(self.model(x), self.y[chosen])
            value.backward()
            optimiser.step()
            float(value.detach())

    def timed(self, devices: list[int], *, threads: int) -> float:
        """Train these devices; returns the seconds."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        start = time.perf_counter()
        for number in devices:
            self.device(number)
        seconds = time.perf_counter() - start
        torch.set_num_threads(before)
        return seconds


def bare_worker(pipe: Any, model: str, channels_last: bool, bf16: bool) -> None:
    """A bare process: trains the devices that it receives, and reports when it has finished."""
    torch.set_num_threads(1)
    bare = Bare(model, channels_last=channels_last, bf16=bf16)
    bare.device(0)
    pipe.send("ready")
    while (devices := pipe.recv()) is not None:
        for number in devices:
            bare.device(number)
        pipe.send("done")


class BareProcesses:
    """One bare process per core; the devices are divided evenly."""

    def __init__(self, model: str, *, channels_last: bool, bf16: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(CORES):
            ours, theirs = context.Pipe()
            process = context.Process(target=bare_worker, args=(theirs, model, channels_last, bf16), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def timed(self) -> float:
        """Train all devices; returns the seconds."""
        start = time.perf_counter()
        for number, pipe in enumerate(self.pipes):
            pipe.send(list(range(number, COHORT, CORES)))
        for pipe in self.pipes:
            pipe.recv()
        return time.perf_counter() - start

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


class Rounds:
    """Rounds of a fedbonsai run on a local Ray, one at a time."""

    def __init__(self, model: str, *, epochs: int, channels_last: bool, bf16: bool) -> None:
        start = time.perf_counter()
        fleet_class = {"name": "device", "count": DEVICES, "flop_per_s": 1e10, "memory_bytes": 10**10}
        fleet_class |= {"up_bytes_per_s": 1e7, "down_bytes_per_s": 1e7}
        self.run = fedbonsai.run(
            {
                "name": "throughput",
                "model": model,
                "data": {"name": "throughput:dataset"},
                "fleet": {"classes": [fleet_class]},
                "policy": [{"name": "random", "cohort": COHORT}],
                "training": {
                    "epochs": epochs,
                    "batch_size": BATCH,
                    "optimiser": {"learning_rate": 0.01, "momentum": 0.9},
                    "layout": "channels_last" if channels_last else "contiguous",
                    "precision": "bf16" if bf16 else "float32",
                },
                "evaluation": {"where": "none"},
                "stop": {"rounds": 1_000_000},
                "ray": {"preallocate": True},
            },
            backend="ray",
            workers=CORES,
        )
        self.timed()
        self.cold_start_s = time.perf_counter() - start

    def timed(self) -> float:
        """Wall seconds of the next round, from the request for its first event to the arrival of its last."""
        start = time.perf_counter()
        for event in self.run:
            if isinstance(event, VersionClosed):
                return time.perf_counter() - start
        raise RuntimeError("the run ended")

    def close(self) -> None:
        """End the run."""
        self.run.close()


class Returner:
    """A plain Ray actor: returns an array, and does nothing else."""

    def __init__(self, num_bytes: int) -> None:
        self.array = np.ones(num_bytes, np.uint8)

    def call(self, array: Any) -> Any:
        """The array."""
        return self.array


class Caller:
    """A plain Ray actor that calls one returner per core, as the server calls its workers."""

    def __init__(self, num_bytes: int) -> None:
        share = 0.8 / CORES
        self.array = np.ones(num_bytes, np.uint8)
        self.returners = [ray.remote(Returner).options(num_cpus=share).remote(num_bytes) for _ in range(CORES)]

    def rounds(self, count: int) -> list[float]:
        """Seconds of each round: one put, ten calls, ten returns."""
        walls = []
        for _ in range(count):
            start = time.perf_counter()
            reference = ray.put(self.array)
            calls = [self.returners[i % CORES].call.remote(reference) for i in range(COHORT)]
            for call in calls:
                ray.get(call)
            del reference, calls
            walls.append(time.perf_counter() - start)
        return walls


def object_store_ms(model: str, *, rounds: int) -> float:
    """Time in which Ray's object store alone transfers the bytes of a round."""
    num_bytes = 4 * sum(p.numel() for p in build(Call(model), seed=0, outputs=10).parameters())
    with start_local(num_cpus=CORES, preallocate=True, env_vars={"PYTHONPATH": str(Path(__file__).parent)}):
        caller = ray.remote(Caller).options(num_cpus=0.1).remote(num_bytes)
        walls = ray.get(caller.rounds.remote(rounds))
    return round(median(walls[rounds // 4 :]) * 1000, 1)


def compare(model: str, *, repetitions: int, empty_rounds: int, channels_last: bool, bf16: bool) -> dict[str, Any]:
    """All contenders on one model; each is idle while another is timed."""
    bare = Bare(model, channels_last=channels_last, bf16=bf16)
    processes = BareProcesses(model, channels_last=channels_last, bf16=bf16)
    rounds = Rounds(model, epochs=1, channels_last=channels_last, bf16=bf16)
    seconds: dict[str, list[float]] = {name: [] for name in ("bare_1thread_s", "bare_all_s", "bare_procs_s", "round_s")}
    bare.timed([0], threads=1)
    try:
        for _ in range(repetitions):
            seconds["bare_1thread_s"].append(bare.timed(list(range(COHORT)), threads=1))
            seconds["bare_all_s"].append(bare.timed(list(range(COHORT)), threads=CORES))
            seconds["bare_procs_s"].append(processes.timed())
            seconds["round_s"].append(rounds.timed())
    finally:
        rounds.close()
        processes.close()
    result: dict[str, Any] = {name: median(values) for name, values in seconds.items()}
    ratios = [bare / ours for bare, ours in zip(seconds["bare_procs_s"], seconds["round_s"], strict=True)]
    result["efficiency"] = median(ratios)
    each = seconds | {"efficiency": ratios}
    result["each"] = {name: [round(value, 4) for value in values] for name, values in each.items()}
    result["speedup_over_bare_all"] = round(result["bare_all_s"] / result["round_s"], 3)
    result["cold_start_s"] = round(rounds.cold_start_s, 2)
    if empty_rounds:
        empty = Rounds(model, epochs=0, channels_last=channels_last, bf16=bf16)
        try:
            walls = [empty.timed() for _ in range(empty_rounds)][empty_rounds // 4 :]
        finally:
            empty.close()
        result["overhead_ms"] = round(median(walls) * 1000, 1)
        if empty_rounds >= 80:
            result["object_store_ms"] = object_store_ms(model, rounds=empty_rounds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="fedbonsai on Ray against bare PyTorch")
    parser.add_argument("--quick", action="store_true", help="under a minute: four devices a round")
    parser.add_argument("--variants", action="store_true", help="also channels_last and bf16, as rows of their own")
    add_options(parser)
    arguments = parser.parse_args()
    results = Results("throughput", arguments)
    repetitions, empty_rounds = (1, 16) if arguments.quick else (5, 80)
    sys.path.insert(0, str(Path(__file__).parent))
    if arguments.quick:
        global COHORT
        COHORT = 4
    result: dict[str, Any] = results.row(
        "resfed_cnn",
        compare,
        "resfed_cnn",
        repetitions=repetitions,
        empty_rounds=0 if arguments.quick else empty_rounds,
        channels_last=False,
        bf16=False,
    )
    result["small"] = results.row(
        "small",
        compare,
        "small",
        repetitions=2 * repetitions,
        empty_rounds=empty_rounds,
        channels_last=False,
        bf16=False,
    )
    if arguments.variants:
        result["rows"] = [
            {"model": model, "channels_last": True, "precision": "bf16" if bf16 else "float32"}
            | results.row(
                f"{model}, channels_last{', bf16' if bf16 else ''}",
                compare,
                model,
                repetitions=repetitions,
                empty_rounds=0,
                channels_last=True,
                bf16=bf16,
            )
            for model in ("resfed_cnn", "small")
            for bf16 in (False, True)
        ]
    result["cohort"] = COHORT
    results.finish(result)


if __name__ == "__main__":
    main()
