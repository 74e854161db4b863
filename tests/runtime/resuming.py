"""Shared by the tests of resuming: a small run for every method, and the comparison of two runs."""

import json

import fedbonsai
from fedbonsai.runtime.events import PlanEnded

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**6, "down_bytes_per_s": 10**6, "latency_s": 0.01}
BASE = {
    "backend": "inline",
    "seed": 5,
    "fleet": {
        "classes": [{"name": f"c{i}", "count": 2, "flop_per_s": 1e8 / 2.5**i} | LINK for i in range(3)],
        "hosts": {"count": 2},
    },
    "data": {"name": "synthetic", "kwargs": {"shape": [1, 8, 8], "samples_per_device": 24, "test_samples": 50}},
    "training": {"batch_size": 8},
    "evaluation": {"every": 2},
    "checkpoint": {"share": None},  # one of each version, so that tests know which ones exist
    "stop": {"rounds": 8},
}
POLYNOMIAL = {"staleness": {"rule": "polynomial"}}
BUFFERED = {"name": "asynchronous", "buffer": 2, "concurrency": 1.0}
SHARED = {
    "classes": [
        {"name": f"c{i}", "count": 2, "flop_per_s": 1e8 / 2.5**i, "shared_link": "air"} | LINK for i in range(3)
    ],
    "shared_links": {"air": {"up_bytes_per_s": 10**5, "down_bytes_per_s": 10**5}},
}
NARROW = {
    "name": "width",
    "rule": "fixed",
    "widths": {"c0": 1.0, "c1": 0.5, "c2": 0.5},
    "channels": "l1",
    "refresh": 2,
    "warm_up": 0,
    "min_channels": 2,
}
PROFL = {
    "name": "profl",
    "blocks": ["features.0", "features.2"],
    "shrink_rounds": 1,
    "imitate_rounds": 1,
    "grow_rounds": 2,
    "min_rounds": 1,
}
UNSTEADY = {"dropout": {"before": 0.1, "during": 0.1, "after": 0.1, "early": 0.2}, "jitter": 0.2}
METHODS = {
    "fedavg": {},
    "adam": {"server": {"optimiser": {"name": "adam", "learning_rate": 0.01}}},
    "momentum": {"server": {"optimiser": {"name": "momentum"}}},
    "resfed": {"preset": "resfed"},
    "resfed, spilled": {"preset": "resfed", "server": {"link_memory_bytes": 60_000}},
    "fedbuff": {"preset": "fedbuff"},
    "fedasync": {"preset": "fedasync"},
    "deadline, late plans": {
        "policy": [{"name": "deadline", "deadline_s": 10.0}, {"name": "closing", "after_s": 10.0}],
        "server": POLYNOMIAL,
        "fleet": SHARED,
    },
    "splitfed": {"preset": "splitfed"},
    "ecofed": {"preset": "ecofed"},
    "splitfed, in flight": {"policy": [BUFFERED, {"name": "splitfed"}], "server": POLYNOMIAL},
    "ecofed, in flight": {
        "policy": [BUFFERED, {"name": "ecofed", "period": 3}],
        "server": POLYNOMIAL,
    },
    "devices that come and go": {
        "preset": "fedbuff",
        "fleet": {
            "classes": [
                {"name": f"c{i}", "count": 2, "flop_per_s": 1e8 / 2.5**i, "availability": 0.7} | LINK | UNSTEADY
                for i in range(3)
            ]
        },
    },
    "residuals, in flight": {"policy": [BUFFERED, {"name": "residuals"}], "server": POLYNOMIAL},
    "residuals, narrow": {"policy": [{"name": "random", "cohort": 1.0}, NARROW, {"name": "residuals"}]},
    "residuals, narrow, in flight": {
        "policy": [BUFFERED, NARROW | {"channels": "rolling"}, {"name": "residuals", "down": "half_step"}],
        "server": POLYNOMIAL | {"link_memory_bytes": 60_000},
    },
    "shared links": {"preset": "fedbuff", "fleet": SHARED},
    "profl": {"policy": [{"name": "all"}, PROFL, {"name": "random", "cohort": 0.5}]},
    "profl, in flight": {"policy": [BUFFERED, PROFL | {"shrinking": False}], "server": POLYNOMIAL},
    "zerofl": {"preset": "zerofl"},
    "zerofl, in flight": {
        "policy": [BUFFERED, {"name": "zerofl", "rule": "diff_top_weights", "ratios": [0.0, 0.2]}],
        "server": POLYNOMIAL,
        "training": {"batch_size": 8, "sparsity": {"weights": 0.8, "activations": 0.5, "period": 2}},
    },
    "reft": {
        "policy": [
            {"name": "random", "cohort": 1.0},
            {"name": "width", "rule": "deadline", "channels": "l1"},
            {"name": "distillation", "steps": 40, "check_every": 10, "held_out": 0.2},
        ],
        "data": {
            "name": "digits",
            "partition": {"name": "dirichlet", "alpha": 0.3, "min_samples": 8},
            "public_share": 0.3,
        },
    },
}


def told(summary):
    """The part of a summary that must be equal; the rest depends on the machine, or on being resumed."""
    apart = ("wall_s", "round_wall_s", "peak_memory_bytes", "notices", "num_notices")
    return {name: value for name, value in summary.items() if name not in apart}


def facts(folder):
    """The log without what depends on this machine, or on how often the run was resumed."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event.pop("number") for event in events] == list(range(1, len(events) + 1))
    for event in events:
        event.pop("wall_s", None)
        event.get("report", {}).pop("measured", None)
    return [event for event in events if event["type"] != "Notice"]


def uninterrupted(config, out):
    run = fedbonsai.run(config, out=out)
    list(run)
    return run.summary


def started(config, out, *, stops=2, **how):
    """A run that is left in the middle of a round."""
    with fedbonsai.run(config, out=out, **how) as run:
        for event in run:
            if isinstance(event, PlanEnded) and event.report.plan.version >= stops:
                break
    return run
