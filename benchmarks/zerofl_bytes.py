"""Bytes of benchmarks/zerofl.py: sealed updates of trained models, beside the files of the paper (table 1).

At each sparsity a model is trained in a run of one device, and its local training in another run that starts there. What the
device then sends is sealed as a device seals it, by the plan of the policy ``zerofl``, for each rule and mask ratio. Headers
and dense layers count.
"""

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import fedbonsai
import numpy as np
from fedbonsai.actors.messages.dense_packets import open_update, seal_update
from fedbonsai.actors.messages.messages import update_tensors
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.sparsity.zerofl import ZeroFL
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.events import PlanEnded
from safetensors.torch import load_file

PAPER_MB = {  # by model, sparsity and mask ratio; that of FEMNIST has none at 90 %
    "resnet18": {0.9: {0.0: 10.1, 0.1: 18.7, 0.2: 27.3}, 0.95: {0.0: 5.9, 0.1: 14.4, 0.2: 23.0}},
    "femnist_cnn": {0.95: {0.0: 1.3, 0.1: 2.9, 0.2: 4.4}},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "resnet18": {"model": "resnet18", "data": "cifar10", "shape": [3, 32, 32], "batch": 32, "layers": []},
    "femnist_cnn": {"model": {"name": "networks:femnist_cnn", "kwargs": {"num_classes": 62}}, "data": "mnist",
                    "shape": [1, 28, 28], "batch": 10, "layers": ["conv1", "conv2", "fc1"]},
}  # fmt: skip
RULES = ("top_weights", "diff_top_weights", "top_diff")
LINK = {"flop_per_s": 1e9, "memory_bytes": 10**10, "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}


def configuration(model: str, sparsity: float, *, root: str | None, steps: int) -> dict[str, Any]:
    """One device; drawn images where no folder of data is given."""
    about = SETTINGS[model]
    drawn = {"name": "synthetic", "kwargs": {"shape": about["shape"], "classes": 10, "samples_per_device": 512}}
    rate = {"learning_rate": 0.05, "momentum": 0.0}
    return {
        "model": about["model"],
        "data": {"name": about["data"], "root": root} if root else drawn,
        "fleet": {"classes": [{"name": "device", "count": 1} | LINK]},
        "training": {
            "steps": steps,
            "batch_size": about["batch"],
            "optimiser": rate,
            "sparsity": {"weights": sparsity, "activations": sparsity, "layers": about["layers"]},
        },
        "kernels": {"sparse": "auto"},
        "policy": [{"name": "all"}],
        "evaluation": {"where": "none"},
        "backend": "inline",
        "stop": {"rounds": 1},
    }


class Sealed(NamedTuple):
    """An update: its bytes, those of float32 values and int32 positions, and processor seconds to seal and to open it."""

    bytes: int
    csr_bytes: int
    seal_s: float
    open_s: float


class Update:
    """What one device received and trained at one sparsity."""

    def __init__(self, model: str, sparsity: float, *, root: str | None, steps: int) -> None:
        """``steps``: before the device's local training, which has a quarter of them."""
        config = configuration(model, sparsity, root=root, steps=steps)
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "before", Path(folder) / "after"
            list(fedbonsai.run(config, out=before))
            weights = before / "final.master.safetensors"
            local = {
                "init": {"mode": "holistic", "weights": str(weights)},
                "training": config["training"] | {"steps": max(1, steps // 4)},
            }
            second = fedbonsai.run(config | local, out=after)
            plans = [event.report.plan for event in second if isinstance(event, PlanEnded)]
            self._base, self._trained = load_file(weights), load_file(after / "final.master.safetensors")
            self._plan: Plan = plans[0]
            self._submodel = Workload(workload_settings(second.config, num_devices=1)).submodel(self._plan.part)

    def sealed(self, **policy: Any) -> Sealed:
        """The update by the policy, sealed and opened."""
        decision, _ = ZeroFL(**policy).decide(None, None, Decision(plans=(self._plan,)))  # type: ignore[arg-type]
        plan, times, opened = decision.plans[0], list[tuple[float, float]](), {}
        for _ in range(2):
            started = time.thread_time()
            packet = seal_update(self._trained, self._base, plan, submodel=self._submodel)
            sealed = time.thread_time()
            opened = open_update(packet, plan, self._submodel)
            times.append((sealed - started, time.thread_time() - sealed))
        seal_s, open_s = (min(each) for each in zip(*times, strict=True))
        roles = {tensor.name: tensor.role for tensor in update_tensors(plan, self._submodel)}
        csr = sum(8 * np.count_nonzero(x) if roles[name] == "sparse" else x.nbytes for name, x in opened.items())
        return Sealed(packet.nbytes, csr, round(seal_s, 3), round(open_s, 3))


def row_of(update: Update, model: str, sparsity: float, ratio: float) -> dict[str, Any]:
    """The row of an update at one mask ratio."""
    found = {rule: update.sealed(rule=rule, ratios=(ratio,)) for rule in RULES}
    found["top_weights, 8 bit"] = update.sealed(rule="top_weights", ratios=(ratio,), value_bits=8)
    first, paper = found[RULES[0]], PAPER_MB[model].get(sparsity, {}).get(ratio)
    row = {"model": model, "sparsity": sparsity, "mask_ratio": ratio, "paper_MB": paper}
    row["dense_MB"] = round(update.sealed(rule="all").bytes / 1e6, 2)
    row["csr_MB"] = round(first.csr_bytes / 1e6, 2)
    row["sent_MB"] = {name: round(each.bytes / 1e6, 2) for name, each in found.items()}
    if paper:
        row["share_of_paper"] = {name: round(each.bytes / 1e6 / paper, 3) for name, each in found.items()}
    return row | {"seal_s": first.seal_s, "open_s": first.open_s}
