"""Four methods on CIFAR-10 from one initialisation: accuracy by round, by bytes and by virtual time.

    python benchmarks/ecofed_training.py --data ROOT --save

EcoFed's VGG11-BN with a head of 512, cut behind its second block (128x8x8). A tenth of the training samples are public: the
network is trained on them (``fedbonsai pretrain``), and every method starts with the first two blocks of that, and with the
others as drawn from the seed. ``public`` is the accuracy of that network itself on the test samples: training on the public
share alone, without any device. The rest is divided evenly to 100 Raspberry Pi 4 on 100 Mb/s each, of which ten take part
in a round: one epoch in batches of 20. All stream to one partition host of 1 TFLOP/s. ``MB`` is sent to and from devices,
``host_MB`` between server and host, which ``MB`` does not include; both are for each device of a cohort. The last line is JSON.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import fedbonsai
from common import Results, add_options
from fedbonsai.learning.training.pretraining import Recipe
from fedbonsai.runtime.cli.pretrain import pretrain
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.events import Evaluated, VersionClosed
from safetensors import safe_open

CUT = "features.4"
DEVICES, COHORT = 100, 10
MEGABIT = 1e6 / 8
TARGETS = (0.4, 0.5, 0.55, 0.6, 0.65, 0.7)
ROWS: dict[str, dict[str, Any] | None] = {
    "fl": None,
    "splitfed": {"name": "splitfed", "cut": CUT},
    "local_loss": {"name": "local_loss", "cut": CUT},
    "ecofed": {"name": "ecofed", "cut": CUT},
    "ecofed_8bit": {"name": "ecofed", "cut": CUT, "bits": 8},
}


def config(root: str, row: str, *, rounds: int, weights: str) -> dict[str, Any]:
    """The run of one row."""
    device = {
        "name": "rpi4",
        "count": DEVICES,
        "flop_per_s": 13e9,  # as in fleet testbed-wifi
        "memory_bytes": 2 * 10**9,
        "latency_s": 0.005,
        "up_bytes_per_s": 100 * MEGABIT,
        "down_bytes_per_s": 100 * MEGABIT,
    }
    crop = {"name": "random_crop", "kwargs": {"padding": 4}}
    return {
        "backend": "inline",
        "seed": 1,
        "name": row,
        "model": {"name": "vgg11_bn", "kwargs": {"hidden": 512}},
        "fleet": {"classes": [device], "hosts": {"count": 1, "flop_per_s": 1e12}},
        "data": {
            "name": "cifar10",
            "root": root,
            "partition": {"name": "iid"},
            "public_share": 0.1,
            "train_transforms": [crop, "random_flip", "normalize"],
        },
        "training": {
            "batch_size": 20,
            "precision": "auto",
            "channels_last": True,
            "optimiser": {"learning_rate": 0.01, "momentum": 0.9},
        },
        "policy": [policy for policy in ({"name": "random", "cohort": COHORT / DEVICES}, ROWS[row]) if policy],
        "init": {"mode": "partial", "weights": weights, "trunk": CUT},
        "evaluation": {"every": 2},
        "stop": {"rounds": rounds},
    }


def public_weights(root: str, folder: Path, *, epochs: int) -> str:
    """The network trained on the public share; trained if the file does not exist yet."""
    path = folder / "public.safetensors"
    if not path.exists():
        settings = config(root, "fl", rounds=1, weights="") | {"init": {"mode": "random"}}
        found = pretrain(
            load_config(settings),
            out=path,
            recipe=Recipe(epochs=epochs),
            note=lambda epoch: print(f"  pretraining: {epoch}", flush=True),
        )
        print(f"  pretrained: {found}", flush=True)
    return str(path)


def run(root: str, row: str, *, rounds: int, weights: str) -> dict[str, Any]:
    """One row: its curve, every other round as (round, accuracy, MB for each device so far, virtual seconds)."""
    started = time.perf_counter()
    closed: VersionClosed | None = None
    curve: list[tuple[int, float, float, float]] = []
    for event in fedbonsai.run(config(root, row, rounds=rounds, weights=weights)):
        if isinstance(event, VersionClosed):
            closed = event
        elif isinstance(event, Evaluated) and closed is not None:
            megabytes = (closed.up_bytes + closed.down_bytes) / 1e6 / COHORT
            curve.append((closed.version, event.figures["accuracy"], round(megabytes, 2), round(event.time_s, 1)))
            print(f"  {row} {curve[-1]}, {time.perf_counter() - started:.0f} s", flush=True)
    assert closed is not None
    accuracies = [accuracy for _, accuracy, _, _ in curve]
    reached = {}
    for target in TARGETS:
        there = next((point for point in curve if point[1] >= target), None)
        reached[f"{target:g}"] = there and {"rounds": there[0], "MB": there[2], "virtual_s": there[3]}
    return {
        "accuracy": round(sum(accuracies[-3:]) / len(accuracies[-3:]), 4),  # of the last three evaluations
        "best": max(accuracies),
        "rounds": rounds,
        "MB": curve[-1][2],
        "host_MB": round(closed.host_bytes / 1e6 / COHORT, 2),
        "virtual_s": curve[-1][3],
        "reached": reached,
        "curve": curve,
        "wall_s": round(time.perf_counter() - started, 1),
    }


def public(weights: str) -> dict[str, Any]:
    """The figures of the pretrained network by itself."""
    with safe_open(weights, framework="numpy") as file:
        metadata = file.metadata()
    return {name: metadata[name] for name in ("test_accuracy", "samples", "epochs", "commit")}


def main() -> None:
    """Parse the command line, and train all rows from one initialisation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=40, help="of training; default: 40")
    parser.add_argument("--epochs", type=int, default=30, help="of pretraining; default: 30")
    parser.add_argument("--weights", help="folder that keeps the pretrained weights for --continue")
    add_options(parser)
    args = parser.parse_args()
    results = Results("ecofed_training", args, seeds=[1])
    with tempfile.TemporaryDirectory() as temporary:
        weights = public_weights(args.data, Path(args.weights or temporary), epochs=args.epochs)
        found = {"public": results.row("public", public, weights)}
        for row in args.rows:
            found[row] = results.row(row, run, args.data, row, rounds=args.rounds, weights=weights)
    results.finish({"rows": found})


if __name__ == "__main__":
    main()
