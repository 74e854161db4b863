"""fedbonsai: FedAvg of its own network of that name. Modes: ``ray``, a local Ray with a worker a core, and ``inline``.

Torch threads: as OMP_NUM_THREADS says, else fedbonsai's own choice.
"""

import os
from typing import Any

from work import LEARNING_RATE, MOMENTUM, sealed, work, write_end, write_round


def dataset(num_devices: int, seed: int, root: str | None) -> Any:
    """The sealed images, each shard at its device."""
    import numpy as np
    from fedbonsai.learning.data.types import SamplePool, Samples

    images, labels = sealed(work().folder)
    owners = np.repeat(np.arange(num_devices), images.shape[1])
    train = Samples(images[:num_devices].flatten(0, 1), labels[:num_devices].flatten())
    return SamplePool(train=train, owners=owners, num_classes=10)


def main() -> None:
    settings = work()
    import fedbonsai
    from fedbonsai.runtime.events import PlanEnded, VersionClosed

    run = fedbonsai.run(
        {
            "name": "peers",
            "model": settings.net,
            "data": {"name": "run_fedbonsai:dataset"},
            "fleet": {
                "classes": [
                    {"name": "device", "count": settings.devices, "flop_per_s": 1e10, "memory_bytes": 10**10,
                     "up_bytes_per_s": 1e7, "down_bytes_per_s": 1e7}
                ]
            },
            "policy": [{"name": "random", "cohort": settings.cohort}],
            "training": {
                "batch_size": settings.batch,
                "optimiser": {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM},
                "layout": "channels_last" if settings.channels_last else "contiguous",
                "precision": "bf16" if settings.bf16 else "float32",
            },
            "evaluation": {"where": "none"},
            "stop": {"rounds": settings.rounds},
            "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        },
        backend=settings.mode,
        workers=settings.workers if settings.mode == "ray" else None,
    )  # fmt: skip
    losses: list[float] = []
    steps = number = 0
    for event in run:
        if isinstance(event, PlanEnded):
            steps += event.report.steps
            if number == 0:
                losses.append(event.report.loss)
        elif isinstance(event, VersionClosed):
            number += 1
            write_round(number, clients=event.folded, steps=steps)
            steps = 0
    write_end(losses, run.model())


if __name__ == "__main__":
    main()
