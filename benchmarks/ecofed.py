"""Bytes of FedAvg, SplitFed, local losses and EcoFed for each device and round on real packets, and time by the cost model.

    python benchmarks/ecofed.py --quick               generated images, bytes only, in under a minute
    python benchmarks/ecofed.py --data ROOT --save    CIFAR-10's images

EcoFed's VGG11-BN (34,440,970 parameters) on CIFAR-10's shapes, cut behind its second block (128x8x8), 500 samples for each
device, batch 10, uploads every other round; all bytes count: labels, headers, plans, reports. ``int8``: plain 8 bit codes, as
the paper's code sends; top level: the default codec (4 bit for each channel, entropy coded). The last line is JSON.

``seconds``: virtual seconds of a round on a Raspberry Pi 4 of fleet ``testbed-wifi`` (13 GFLOP/s) with a link of 10 or 100 Mb/s
and a host of its own, for hosts of 0.2, 1 and 5 TFLOP/s; of EcoFed the mean of an upload and a replay. ``shared_host``:
the same where ten devices share a host, by ``fedbonsai advise``: a lower bound, without waiting times. ``host_bytes``: bytes
between the server and the hosts for each device and round, which no other figure includes. ``break_even_flop_per_s``: the
host's speed from which EcoFed's round is shorter than FedAvg's. ``buffer_over_payload``: memory of 100 devices' 8 bit views,
over their activations (410 MB).

Wu et al., IEEE TPDS 35(3), 2024, arXiv 2304.05495: up to 133 times fewer bytes than FedAvg and 16 than SplitFed, 21 and 2.86
times less time. By its formulas, without labels and headers: 275.53, 33.38, 17.65 (local losses) and 2.05 MB.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import fedbonsai
import torch
from common import Results, add_options
from ecofed_buffer import memory_over_payload
from fedbonsai.clusters.fleet import load_fleet
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.learning.parts.part import whole
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.local_loss import LocalLoss
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.policy import Policy, chain
from fedbonsai.policies.selection.plain import All
from fedbonsai.policies.view import View
from fedbonsai.runtime.cli.advise import advise
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.simulation.costs import Costs
from msgspec.structs import replace

CUT = "features.4"  # the second block; its pooling is on the device
SAMPLES = 500
FORMULA = {"fl": 275_527_760, "splitfed": 33_376_256, "local_loss": 17_647_696, "ecofed": 2_048_000}
MEGABIT = 1e6 / 8


@dataclass(frozen=True)
class Int8(EcoFed):
    """Plain 8 bit codes, one step size for a tensor, no entropy coding."""

    @property
    def _codec(self) -> tuple[CodecSpec, ...]:
        return (CodecSpec("uniform", {"bits": 8, "signed": "auto", "roles": ["activation"]}),)


METHODS: dict[str, Policy] = {
    "fl": All(),
    "splitfed": chain(All(), SplitFed(cut=CUT)),
    "local_loss": chain(All(), LocalLoss(cut=CUT)),
    "int8": chain(All(), Int8(cut=CUT)),
    "ecofed": chain(All(), EcoFed(cut=CUT)),
}


def config_for(
    root: str | None, *, link: float = 100 * MEGABIT, host_flop_per_s: float = 1e12, devices: int = 1, hosts: int = 1
) -> dict[str, Any]:
    """Devices with 500 images each; with CIFAR-10 they are 100, each with a host, of which one is measured."""
    pi = next(kind for kind in load_fleet("testbed-wifi").classes if kind.name == "rpi4")
    device = {
        "name": pi.name,
        "flop_per_s": pi.flop_per_s,
        "memory_bytes": 8 * 10**9,
        "latency_s": pi.latency_s,
        "count": devices,
        "up_bytes_per_s": link,
        "down_bytes_per_s": link,
    }
    generated = {"shape": [3, 32, 32], "classes": 10, "samples_per_device": SAMPLES, "test_samples": 10}
    data: dict[str, Any] = {"name": "synthetic", "kwargs": generated}
    if root:
        data = {"name": "cifar10", "root": root, "partition": {"name": "iid"}}
        hosts *= 50_000 // SAMPLES // devices
        device["count"] = 50_000 // SAMPLES
    return {
        "backend": "inline",
        "model": "vgg11_bn",
        "fleet": {"classes": [device], "hosts": {"count": hosts, "flop_per_s": host_flop_per_s}},
        "data": data,
        # The precision changes no byte of SplitFed or of plain 8 bit codes.
        "training": {
            "batch_size": 10,
            "precision": "auto",
            "layout": "channels_last",
            "optimiser": {"learning_rate": 0.01, "momentum": 0.9},
        },
        "evaluation": {"where": "none"},
    }


@dataclass(frozen=True)
class First:
    """Keeps one of the chosen devices: all of them send the same number of bytes."""

    policy: Policy

    def init(self) -> Any:
        """The state of the policy."""
        return self.policy.init()

    def decide(self, view: Any, state: Any, decision: Any) -> Any:
        """The first plan."""
        decided, state = self.policy.decide(view, state, decision)
        return replace(decided, plans=decided.plans[:1]), state


def measure(name: str, root: str | None, *, quick: bool) -> tuple[float, float]:
    """Bytes that one device sends and receives in a round, all of them, and those between server and hosts.

    Of EcoFed, over an upload and a replay.

    ``quick``: FedAvg on a few samples, since its bytes do not depend on them; no replay, which costs its device nothing.
    """
    rounds = 2 if name in ("int8", "ecofed") and not quick else 1
    config = config_for(root) | {"stop": {"rounds": rounds}}
    if quick and name == "fl" and not root:
        config["data"]["kwargs"]["samples_per_device"] = 20
    started = time.perf_counter()
    run = fedbonsai.run(config, policy=First(METHODS[name]))
    for _ in run:
        pass
    total = (run.summary["up_bytes"] + run.summary["down_bytes"]) / (2 if name in ("int8", "ecofed") else 1)
    hosts = run.summary["host_bytes"] / rounds
    by_kind = run.summary["up_by_kind"], run.summary["down_by_kind"]
    print(f"  {name}: {total:,.0f} bytes a round, {by_kind}, {time.perf_counter() - started:.0f} s", flush=True)
    return total, hosts


class Model:
    """Seconds of a round by the cost model, for any link and host."""

    def __init__(self, root: str | None) -> None:
        """Data and model are loaded once."""
        self._root = root
        config = load_config(config_for(root))
        self._training = config.training
        fleet = config.load_fleet()
        self._workload = Workload(workload_settings(config, num_devices=fleet.num_devices))

    def seconds(self, name: str, *, link: float, host_flop_per_s: float) -> float:
        """Of device 0; of EcoFed the mean of an upload and a replay."""
        fleet = load_config(config_for(self._root, link=link, host_flop_per_s=host_flop_per_s)).load_fleet()
        costs = Costs(self._workload, fleet)
        found = []
        for version in range(2 if name in ("int8", "ecofed") else 1):
            view = View(
                time_s=0.0,
                version=version,
                seed=0,
                profiles=fleet.profiles()[:1],
                samples=[SAMPLES],
                replay=[("trunk", CUT, 0, "1", version, 1)],
                plan_maker=lambda device: Plan(
                    id=0, device=device, version=0, part=whole(self._workload.spec), training=self._training, seed=0
                ),
                estimator=costs.estimate,
            )
            policy = METHODS[name]
            (plan,) = policy.decide(view, policy.init(), Decision())[0].plans
            found.append(view.estimate(0, plan).seconds)
        return sum(found) / len(found)

    def table(self) -> dict[str, Any]:
        """The settings of the paper's claim: by what factor EcoFed is faster, for each."""
        seconds: dict[str, Any] = {}
        for megabits in (10, 100):
            for host in (0.2e12, 1e12, 5e12):
                row = {
                    name: self.seconds(name, link=megabits * MEGABIT, host_flop_per_s=host)
                    for name in ("fl", "splitfed", "local_loss", "ecofed")
                }
                ratios = {f"{name}_over_ecofed": row[name] / row["ecofed"] for name in ("fl", "splitfed")}
                cell = {name: round(value, 2) for name, value in (row | ratios).items()}
                seconds[f"{megabits} Mb/s, {host / 1e12:g} TFLOP/s"] = cell
                print(f"  {megabits} Mb/s, host {host / 1e12:g} TFLOP/s: {cell}", flush=True)
        return seconds

    def shared(self) -> dict[str, Any]:
        """The same with ten devices on one host."""
        found: dict[str, Any] = {}
        for megabits in (10, 100):
            for host in (0.2e12, 1e12, 5e12):
                settings = config_for(self._root, link=megabits * MEGABIT, host_flop_per_s=host, devices=10)
                policy = [{"name": "random", "cohort": 1.0}, {"name": "ecofed", "cut": CUT}]
                rows = advise(load_config(settings | {"policy": policy, "stop": {"rounds": 2}})).methods
                seconds = {row.method: row.seconds for row in rows if row.seconds is not None}
                ratios = {f"{name}_over_EcoFed": seconds[name] / seconds["EcoFed"] for name in ("FedAvg", "SplitFed")}
                cell = {name: round(value, 2) for name, value in (seconds | ratios).items()}
                found[f"{megabits} Mb/s, {host / 1e12:g} TFLOP/s"] = cell
                print(f"  ten devices share a host, {megabits} Mb/s, {host / 1e12:g} TFLOP/s: {cell}", flush=True)
        return found

    def break_even(self, megabits: float) -> float:
        """The host's speed from which EcoFed's round is shorter than FedAvg's."""
        link = megabits * MEGABIT
        fl = self.seconds("fl", link=link, host_flop_per_s=1e12)
        low, high = 1e9, 1e13
        for _ in range(14):
            middle = (low * high) ** 0.5
            slower = self.seconds("ecofed", link=link, host_flop_per_s=middle) > fl
            low, high = (middle, high) if slower else (low, middle)
        return float(f"{high:.3g}")


def ratios(fl: float, splitfed: float, ecofed: float) -> dict[str, float]:
    """The figures of one codec."""
    return {
        "ecofed_bytes": round(ecofed),
        "fl_over_ecofed": round(fl / ecofed, 2),
        "splitfed_over_ecofed": round(splitfed / ecofed, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bytes only")
    parser.add_argument("--data", help="folder that holds cifar-10-batches-py; default: generated images")
    add_options(parser)
    args = parser.parse_args()
    results = Results("ecofed", args)
    torch.set_num_threads(2)
    measured = {name: results.row(name, measure, name, args.data, quick=args.quick) for name in METHODS}
    found = {name: total for name, (total, _) in measured.items()}
    fl, splitfed = found["fl"], found["splitfed"]
    result: dict[str, Any] = {
        "data": "cifar10" if args.data else "synthetic",
        "fl_bytes": round(fl),
        "splitfed_bytes": round(splitfed),
        "local_loss_bytes": round(found["local_loss"]),
        "host_bytes": {name: round(hosts) for name, (_, hosts) in measured.items()},
        **ratios(fl, splitfed, found["ecofed"]),
        "int8": ratios(fl, splitfed, found["int8"]),
        "formula": ratios(FORMULA["fl"], FORMULA["splitfed"], FORMULA["ecofed"])
        | {"local_loss_bytes": FORMULA["local_loss"]},
        "local_loss": {
            f"{name}_over_local_loss": round(found[name] / found["local_loss"], 2) for name in ("fl", "splitfed")
        },
        "buffer_over_payload": results.row("buffer", memory_over_payload),
    }
    if not args.quick:
        model = Model(args.data)
        result["seconds"] = results.row("seconds", model.table)
        result["shared_host"] = results.row("shared host", model.shared)
        result["break_even_flop_per_s"] = {
            f"{rate} Mb/s": results.row(f"break even, {rate} Mb/s", model.break_even, rate) for rate in (10, 100)
        }
    results.finish(result)


if __name__ == "__main__":
    main()
