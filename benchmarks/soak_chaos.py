"""Ten minutes of chaos: a random worker or partition host of a run on Ray, its server, or one of its two nodes is killed
every one to four seconds. (A killed node is replaced by a new one; the other node is Ray's head.)

    python benchmarks/soak_chaos.py [--seeds 10] [--kills 20] [--save]

The run is that of tests/runtime/chaos.py: FedBuff over six unequal devices whose models are cut, with a window of two. For
each seed: the killed processes, outcomes, accuracy, and whether the model is, bit for bit, that of an undisturbed run in
process. A plan that was killed three times is lost, and then the models differ. The last line is JSON; the exit code is 1
if an assertion failed or the accuracy is below 85 %.
"""

import argparse
import sys
import time
from typing import Any

import fedbonsai
import torch
from common import finish
from fedbonsai.clusters.ray_backend.ray_cluster import start_local
from fedbonsai.runtime.errors import FedbonsaiError
from fedbonsai.tests.runtime.chaos import CONFIG, survive
from fedbonsai.tests.runtime.nodes import CPUS, QUICK, OtherNode


def undisturbed(rounds: int) -> dict[str, Any]:
    """The same run in process."""
    run = fedbonsai.run(CONFIG | {"backend": "inline", "stop": {"rounds": rounds}})
    for _ in run:
        pass
    summary: dict[str, Any] = run.summary
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--kills", type=int, default=20, help="in each run; default: 20")
    parser.add_argument("--rounds", type=int, default=200, help="of each run; default: 200")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    expected, faults, rows = undisturbed(args.rounds), 0, []
    for seed in range(args.seeds):
        started = time.perf_counter()
        try:
            with (
                start_local(num_cpus=CPUS, env_vars=QUICK) as cluster,
                OtherNode(cluster, num_cpus=CPUS) as node,
            ):
                killed, summary, _ = survive(seed=seed, kills=args.kills, rounds=args.rounds, node=node)
        except (AssertionError, FedbonsaiError) as error:
            faults += 1
            rows.append({"seed": seed, "fault": f"{type(error).__name__}: {error}"})
        else:
            faults += summary["accuracy"] < 0.85
            rows.append(
                {
                    "seed": seed,
                    "killed": dict(killed),
                    "outcomes": summary["outcomes"],
                    "accuracy": round(summary["accuracy"], 4),
                    "same_model": summary["model_hash"] == expected["model_hash"],
                    "wall_s": round(time.perf_counter() - started, 1),
                }
            )
        print(f"  {rows[-1]}", flush=True)
    finish(
        {"undisturbed_accuracy": expected["accuracy"], "faults": faults, "seeds": rows},
        name="soak_chaos",
        save=args.save,
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
