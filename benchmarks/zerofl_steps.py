"""Training steps of benchmarks/zerofl.py: whole ones, dense and sparse in turns; the passes of each sparse layer.

A step is the library's own: forward and backward pass, thresholds, packing, and the optimiser. Turns have as many steps as a
sparse layer has between exact thresholds, so that these are counted in proportion. Times are of the thread's processor time
(one thread), which other load disturbs least; the fastest of the turns counts.
"""

import statistics
import time
from typing import Any

import torch
from fedbonsai.actors.device.module import Module
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import whole
from fedbonsai.learning.sparse.kernel_table import fastest, measure_kernels
from fedbonsai.learning.sparse.kernels.measure import Geometry, PassSeconds, geometry, measure
from fedbonsai.learning.sparse.layers import sparse_layers
from fedbonsai.learning.spec import Call, KernelTable, Layout, Optimiser, Sparsity, Training
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.training import Stepper, WholeModel
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings
from torch import Tensor, nn

PASSES = ("pack", "forward", "grad_input", "grad_weight")
PERIOD = 10  # steps between exact thresholds
MODELS: dict[str, dict[str, Any]] = {
    "femnist_cnn": {"model": "networks:femnist_cnn", "shape": [1, 28, 28], "classes": 62, "batch": 10,
                    "layers": ("conv1", "conv2", "fc1"), "turns": 12},
    "resnet18": {"model": "resnet18", "shape": [3, 32, 32], "classes": 10, "batch": 32, "layers": (), "turns": 3},
}  # fmt: skip
FORMATS: dict[str, Layout] = {"contiguous": "contiguous", "channels last": "channels_last"}


def workload(name: str, sparsity: Sparsity | None = None, kernels: KernelTable | None = None) -> Workload:
    """A model on drawn images."""
    about = MODELS[name]
    images = {"shape": about["shape"], "classes": about["classes"], "samples_per_device": about["batch"]}
    settings = WorkloadSettings(
        model=Call(about["model"]),
        data=DataConfig(name="synthetic", kwargs=images),
        metrics=(),
        num_devices=1,
        seed=0,
        sparsity=sparsity,
        kernels=kernels or {},
    )
    return Workload(settings)


def sparsity_of(name: str, share: float) -> Sparsity:
    """Weights and activations at one sparsity."""
    return Sparsity(weights=share, activations=share, period=PERIOD, layers=MODELS[name]["layers"])


def table(name: str, share: float, *, layout: Layout) -> KernelTable:
    """The kernels that the library chooses on this machine."""
    own, sparsity = workload(name), sparsity_of(name, share)
    found, missing = measure_kernels(
        workload(name, sparsity).new_model(),
        own.example()[0],
        batch=MODELS[name]["batch"],
        sparsities=[sparsity],
        layout=layout,
    )
    assert not missing, missing
    return found


class Steps:
    """Steps of one model, and the seconds of each turn."""

    def __init__(self, name: str, share: float, *, layout: Layout, momentum: float) -> None:
        """``share``: the sparsity; 0 for the dense model."""
        sparsity = sparsity_of(name, share) if share else None
        kernels = table(name, share, layout=layout) if share else {}
        own = workload(name, sparsity, kernels)
        training = Training(
            batch_size=MODELS[name]["batch"],
            optimiser=Optimiser(learning_rate=0.004, momentum=momentum),
            layout=layout,
            sparsity=sparsity,
        )
        model = Module(own.architecture(whole(own.spec)), layout=layout).model
        self._stepper = Stepper(model, training=training, trainable=None)
        self._gradient = WholeModel(model, training=training, loss=make_loss(training.loss))
        samples = own.data.train(0)
        self._x, self._y = samples.x.float(), samples.y
        self.kernels, self.seconds = kernels, list[float]()

    def turn(self) -> None:
        """Make as many steps as there are from one exact threshold to the next."""
        with self._stepper:
            started = time.thread_time()
            for _ in range(PERIOD):
                self._gradient(self._x, self._y, 1.0)
                self._stepper.step()
            self.seconds.append((time.thread_time() - started) / PERIOD)


def step_rows(name: str, sparsities: tuple[float, ...], *, momentum: float, turns: int) -> list[dict[str, Any]]:
    """A row for each sparsity: whole steps, dense and sparse in turns, in both memory formats."""
    shares = (0.0, *sparsities)
    steps = {
        (share, each): Steps(name, share, layout=layout, momentum=momentum)
        for share in shares
        for each, layout in FORMATS.items()
    }
    for _ in range(turns):
        for each in steps.values():
            each.turn()
    best = {key: 1e3 * min(each.seconds) for key, each in steps.items()}
    middle = {key: 1e3 * statistics.median(each.seconds) for key, each in steps.items()}
    rows = []
    for share in sparsities:
        row: dict[str, Any] = {"model": name, "momentum": momentum, "sparsity": share}
        for word, at in (("dense", 0.0), ("sparse", share)):
            row[f"{word}_ms"] = {each: round(best[at, each], 2) for each in FORMATS}
            row[f"{word}_median_ms"] = {each: round(middle[at, each], 2) for each in FORMATS}
        row["times_faster"] = round(_fastest(best, 0.0) / _fastest(best, share), 2)
        row["times_faster_by_medians"] = round(_fastest(middle, 0.0) / _fastest(middle, share), 2)
        rows.append(row)
    return rows


def _fastest(found: dict[tuple[float, str], float], share: float) -> float:
    """The time in the faster memory format."""
    return min(found[share, each] for each in FORMATS)


def layer_rows(name: str, share: float, *, turns: int) -> list[dict[str, Any]]:
    """A row for each geometry among the sparse layers of a model: its passes by kernel, and what is chosen."""
    model, rows = workload(name, sparsity_of(name, share)).new_model(), dict[Geometry, dict[str, Any]]()
    for layer, shape in input_shapes(model, workload(name).example()[0]).items():
        at = geometry(model.get_submodule(layer), shape)
        if at in rows:
            rows[at]["layers"].append(layer)
            continue
        found = measure(
            at,
            batch=MODELS[name]["batch"],
            weight_sparsity=share,
            activation_sparsity=share,
            native=True,
            turns=turns,
        )
        times = {kernel: _passes(found, kernel) for kernel in ("dense", "native", "csr") if kernel in found}
        rows[at] = {
            "model": name,
            "sparsity": share,
            "layers": [layer],
            "weight": list(at.weight),
            "stride": at.stride[0],
            **{
                f"{kernel}_ms": {each: round(1e3 * seconds, 3) for each, seconds in by.items()}
                for kernel, by in times.items()
            },
            "times_faster": {
                each: round(times["dense"][each] / times["native"][each], 2) for each in (*PASSES[1:], "step")
            },
            "chosen": list(fastest(found).kernels),
        }
    return list(rows.values())


def _passes(found: dict[str, PassSeconds], kernel: str) -> dict[str, float]:
    """Seconds of each pass in the memory format in which it is faster, and their sum."""
    own = [each for name, each in found.items() if name.startswith(kernel)]
    times = {each: min(float(getattr(one, each)) for one in own) for each in PASSES}
    return times | {"step": sum(times.values())}


def input_shapes(model: nn.Module, sample: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of each sparse layer's input, without the batch dimension."""
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in sparse_layers(model):
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: found.setdefault(name, tuple(inputs[0].shape[1:])) and None
        )
    with torch.no_grad():
        model.eval()(sample.unsqueeze(0))
    return found
