"""Training steps of benchmarks/zerofl.py: whole ones, dense and sparse in turns, and the passes of each sparse layer.

A step is the library's own: forward and backward pass, thresholds, packing, and the optimiser. Turns have as many steps as a
sparse layer has between exact thresholds, so that these are counted in proportion. Times are of the thread's processor time
(one thread), which other load disturbs least; the fastest of the turns counts.
"""

import time
from typing import Any

from fedbonsai.actors.device.module import Module
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import whole
from fedbonsai.learning.sparse.kernel_table import measure_kernels
from fedbonsai.learning.spec import Call, KernelTable, Optimiser, Sparsity, Training
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.training import Stepper, WholeModel
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings

PERIOD = 10  # steps between exact thresholds
MODELS: dict[str, dict[str, Any]] = {
    "femnist_cnn": {"model": "zerofl_models:femnist_cnn", "shape": [1, 28, 28], "classes": 62, "batch": 10,
                    "layers": ("conv1", "conv2", "fc1")},
    "resnet18": {"model": "resnet18", "shape": [3, 32, 32], "classes": 10, "batch": 32, "layers": ()},
}  # fmt: skip
FORMATS = {"contiguous": False, "channels last": True}


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


def table(name: str, share: float, *, channels_last: bool) -> KernelTable:
    """The kernels that the library chooses on this machine."""
    own, sparsity = workload(name), sparsity_of(name, share)
    found, missing = measure_kernels(
        workload(name, sparsity).new_model(),
        own.example()[0],
        batch=MODELS[name]["batch"],
        sparsities=[sparsity],
        channels_last=channels_last,
    )
    assert not missing, missing
    return found


class Steps:
    """Steps of one model, and the seconds of each turn."""

    def __init__(self, name: str, share: float, *, channels_last: bool, momentum: float) -> None:
        """``share``: the sparsity; 0 for the dense model."""
        sparsity = sparsity_of(name, share) if share else None
        kernels = table(name, share, channels_last=channels_last) if share else {}
        own = workload(name, sparsity, kernels)
        training = Training(
            batch_size=MODELS[name]["batch"],
            optimiser=Optimiser(learning_rate=0.004, momentum=momentum),
            channels_last=channels_last,
            sparsity=sparsity,
        )
        model = Module(own.architecture(whole(own.spec)), channels_last=channels_last).model
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
