"""Ten minutes of chaos: a random worker or partition host of a run on Ray, its server, or one of its two nodes is killed
every one to four seconds. (A killed node is replaced by a new one; the other node is Ray's head.)

    python benchmarks/soak_chaos.py --save      ten seeds with 20 kills each

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
from common import Results, add_options
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


def survived(*, seed: int, kills: int, rounds: int, undisturbed_hash: str) -> dict[str, Any]:
    """The figures of one seed, or its fault."""
    started = time.perf_counter()
    try:
        with (
            start_local(num_cpus=CPUS, env_vars=QUICK) as cluster,
            OtherNode(cluster, num_cpus=CPUS) as node,
        ):
            killed, summary, _ = survive(seed=seed, kills=kills, rounds=rounds, node=node)
    except (AssertionError, FedbonsaiError) as error:
        return {"seed": seed, "fault": f"{type(error).__name__}: {error}"}
    return {
        "seed": seed,
        "killed": dict(killed),
        "outcomes": summary["outcomes"],
        "accuracy": round(summary["accuracy"], 4),
        "same_model": summary["model_hash"] == undisturbed_hash,
        "wall_s": round(time.perf_counter() - started, 1),
    }


def kills_in(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Kills in all runs that survived, and those of nodes among them."""
    killed = [(kind, count) for row in rows for kind, count in row.get("killed", {}).items()]
    nodes = sum(count for kind, count in killed if kind.startswith("Node"))
    return {"all": sum(count for _, count in killed), "nodes": nodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--kills", type=int, default=20, help="in each run; default: 20")
    parser.add_argument("--rounds", type=int, default=200, help="of each run; default: 200")
    add_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results("soak_chaos", args, seeds=range(args.seeds))
    expected = undisturbed(args.rounds)
    rows = [
        results.row(
            f"seed {seed}",
            survived,
            seed=seed,
            kills=args.kills,
            rounds=args.rounds,
            undisturbed_hash=expected["model_hash"],
        )
        for seed in range(args.seeds)
    ]
    faults = sum("fault" in row or row["accuracy"] < 0.85 for row in rows)
    results.finish(
        {"undisturbed_accuracy": expected["accuracy"], "faults": faults, "kills": kills_in(rows), "seeds": rows}
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
