"""What a round costs beside training: devices that train nothing, compared with Ray's object store alone.

Ten of 100 devices a round, on a local Ray with one worker per core: each receives the whole model, loads it, and seals and
returns it, and the server folds them (``epochs: 0``). ``overhead_ms`` is the median round after the first quarter of them.
``object_store_ms``: ten plain Ray calls that return an array of the model's size to one caller, and do nothing else.
``times_object_store``: one over the other. Seconds of whole rounds, beside bare PyTorch and other simulators, are measured by
peers.py.

    python benchmarks/overhead.py --quick
    python benchmarks/overhead.py --save
"""

import argparse
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
from fedbonsai.learning.data.types import SamplePool, Samples
from fedbonsai.learning.models import build
from fedbonsai.learning.spec import Call
from fedbonsai.runtime.events import VersionClosed

DEVICES, COHORT, SAMPLES = 100, 10, 100
CORES = len(os.sched_getaffinity(0))


def dataset(num_devices: int, seed: int, root: str | None) -> SamplePool:
    """Images of CIFAR's shape, in memory."""
    generator = torch.Generator().manual_seed(0)
    count = num_devices * SAMPLES
    x = torch.randn((count, 3, 32, 32), generator=generator)
    y = torch.randint(0, 10, (count,), generator=generator)
    return SamplePool(train=Samples(x, y), num_classes=10)


def empty_rounds_ms(model: str, *, rounds: int) -> float:
    """The median of rounds in which no device trains, from the request for a round's first event to its last."""
    fleet_class = {"name": "device", "count": DEVICES, "flop_per_s": 1e10, "memory_bytes": 10**10}
    fleet_class |= {"up_bytes_per_s": 1e7, "down_bytes_per_s": 1e7}
    run = fedbonsai.run(
        {
            "name": "overhead",
            "model": model,
            "data": {"name": "overhead:dataset"},
            "fleet": {"classes": [fleet_class]},
            "policy": [{"name": "random", "cohort": COHORT}],
            "training": {"epochs": 0, "batch_size": 32},
            "evaluation": {"where": "none"},
            "stop": {"rounds": rounds},
            "ray": {"preallocate": True},
        },
        backend="ray",
        workers=CORES,
    )
    walls, start = [], time.perf_counter()
    for event in run:
        if isinstance(event, VersionClosed):
            walls.append(time.perf_counter() - start)
            start = time.perf_counter()
    return round(median(walls[rounds // 4 :]) * 1000, 1)


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


def compare(model: str, *, rounds: int) -> dict[str, Any]:
    """Rounds of devices that train nothing, and the object store alone, on one model."""
    ours, store = empty_rounds_ms(model, rounds=rounds), object_store_ms(model, rounds=rounds)
    return {"overhead_ms": ours, "object_store_ms": store, "times_object_store": round(ours / store, 2)}


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: few rounds of one model")
    add_options(parser)
    arguments = parser.parse_args()
    results = Results("overhead", arguments)
    sys.path.insert(0, str(Path(__file__).parent))  # so that other processes can import the data
    models, rounds = (("small",), 16) if arguments.quick else (("resfed_cnn", "small"), 80)
    results.finish({"cohort": COHORT, **{model: results.row(model, compare, model, rounds=rounds) for model in models}})


if __name__ == "__main__":
    main()
