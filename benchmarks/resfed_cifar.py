"""Bytes to 70 % on CIFAR-10: ResFed's own setting, dense FedAvg and residuals by density.

    python benchmarks/resfed_cifar.py --data ROOT --save                three seeds: hours
    python benchmarks/resfed_cifar.py --data ROOT --save --continue     the runs that are missing, also on another machine

ResFed's network (1,020,160 weights), ten devices with five cyclic classes each, all in every round, one local epoch in batches
of 64, SGD with a learning rate of 0.01 and momentum 0.9, no augmentation; on Ray. All bytes of packets, plans and reports
are counted from the first round on (``up_Mb`` and ``down_Mb`` are megabits for each device, in units of 10^6 bits, as in
the paper). A run ends at 70 % or after ``--rounds``. The paper (Song et al., IEEE Internet of Things Journal 2024, arXiv
2212.05602): 587.61 Mb each way with dense models, 6.79 up and 4.61 down with residuals, without the first dense models. The
last line is JSON.
"""

import argparse
from typing import Any

from common import Results, add_options, over_seeds
from resfed import COMMON, run

TARGET = 0.7
ROWS = ("dense", "delta_1%", "delta_0.7%", "delta_0.5%", "half_step")
CIFAR: dict[str, Any] = {
    "model": "resfed_cnn",
    "training": {
        "epochs": 1,
        "batch_size": 64,
        "optimiser": {"learning_rate": 0.01, "momentum": 0.9},
        "precision": "bf16",  # fixed, so that rows of several machines compare
        "layout": "channels_last",
    },
    "workers": 2,
}
DATA: dict[str, Any] = {"name": "cifar10", "partition": {"name": "classes", "classes_per_device": 5}}


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of one row")
    parser.add_argument("--data", required=True, help="folder of CIFAR-10 (data.root)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=60, help="at most; default: 60")
    parser.add_argument("--seeds", type=int, default=3)
    add_options(parser)
    options = parser.parse_args()
    rounds, seeds = (1, range(1)) if options.quick else (options.rounds, range(options.seeds))
    results = Results("resfed_cifar", options, seeds=seeds, settings={"rounds": rounds, "target": TARGET})
    common = COMMON | CIFAR | {"stop": {"rounds": rounds, "accuracy": TARGET}}
    for seed in seeds:
        for row in options.rows[:1] if options.quick else options.rows:
            config = common | {"data": DATA | {"root": options.data}, "seed": seed}
            results.row(f"{row}, seed {seed}", run, row, config, cohort=1.0, target=TARGET, verbose=True)
    found = {}
    for row in ROWS:
        measured = {str(seed): results[f"{row}, seed {seed}"] for seed in seeds if f"{row}, seed {seed}" in results}
        if measured:
            found[row] = over_seeds(measured, digits=5)
    results.finish({"target": TARGET, "rows": found})


if __name__ == "__main__":
    main()
