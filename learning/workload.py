"""The workload of a run: model, blocks, data and metrics, built from plain settings.

Server and devices each build their own from the same settings and seed; only packets are exchanged between them.
"""

from functools import cached_property

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from .data.load import load
from .data.transforms import apply_checked
from .data.types import FederatedData
from .models import build, use_batch_statistics
from .parts.auxiliaries import LinearHead, auxiliary_spec, build_head, empty_head
from .parts.blocks import Blocks, cut
from .parts.compare_blocks import blocks_difference
from .parts.module_state import ModuleState
from .parts.part import cut_of
from .parts.structure import BlockSpec, ModelSpec
from .pretrained import initialise, read_weights
from .randomness import seeded
from .resolve import error_line
from .seeds import derive
from .spec import Training
from .training.losses import Metric, default_metrics, make_metric
from .training.split import Boundary, boundary
from .workload_settings import WorkloadSettings


class Workload:
    """Builds each object at its first use and caches it.

    ``left_random``: once a model was built, its tensors that pretrained weights did not cover and that keep random values.
    """

    def __init__(self, settings: WorkloadSettings) -> None:
        """Store the settings; nothing is built yet."""
        self.settings = settings
        self.left_random: tuple[str, ...] = ()
        self._boundaries: dict[tuple[tuple[str, ...], str], Boundary] = {}
        self._auxiliaries: dict[str, BlockSpec] = {}

    @cached_property
    def data(self) -> FederatedData:
        """The devices' data."""
        settings = self.settings
        return load(settings.data, num_devices=settings.num_devices, seed=derive(settings.seed, "data"))

    def new_model(self) -> nn.Module:
        """Build the whole model with its initial weights: the same bits at every call.

        Raises ``ValueError`` for weights that cannot be read, do not have the hash ``init.hash``, or do not fit.
        """
        settings = self.settings
        model = build(settings.model, seed=derive(settings.seed, "model"), outputs=self.data.num_classes)
        if settings.batch_statistics:
            use_batch_statistics(model)
        if settings.init.mode != "random":
            weights = read_weights(settings.init, model=settings.model.name)
            self.left_random = initialise(model, weights, settings.init)
        return model

    @cached_property
    def blocks(self) -> Blocks:
        """The model, cut into blocks."""
        return cut(self.new_model())

    @cached_property
    def cut_fault(self) -> str:
        """Why the model cannot be cut: it is one block, or its blocks compute something else; "" if it can be cut."""
        if len(self.blocks.modules) == 1:
            return self.blocks.reason
        return blocks_difference(self.blocks, self.first_samples(2)[0])

    @cached_property
    def alone_fault(self) -> str:
        """Why the model cannot be trained on one sample at a time, as with batch normalisation; "" if it can."""
        model = self.blocks.model
        state = ModuleState(model, values=True)
        try:
            with seeded(0), torch.no_grad():
                model.train()(self.first_samples(1)[0])
        except Exception as error:  # a user's code may raise anything
            return error_line(error)
        finally:
            state.restore()
        return ""

    @cached_property
    def min_samples(self) -> int:
        """Training samples that a device needs to take part: 2 if some device has one and the model cannot be trained on it."""
        counts = (self.data.num_samples(device) for device in range(self.settings.num_devices))
        return 2 if 1 in counts and self.alone_fault else 1

    def boundary(self, front: tuple[str, ...], training: Training) -> Boundary:
        """Shape and type of the tensor that crosses the cut behind the ``front`` blocks."""
        key = front, training.precision
        if key not in self._boundaries:
            self._boundaries[key] = boundary(self.blocks, front, example=self.example()[0], training=training)
        return self._boundaries[key]

    @cached_property
    def spec(self) -> ModelSpec:
        """Names, shapes and roles of the model's tensors, by block, and of its auxiliaries."""
        return msgspec.structs.replace(self.blocks.spec, auxiliary=self._auxiliary_spec)

    def new_auxiliary(self, name: str) -> LinearHead:
        """Build an auxiliary with its initial weights: the same bits at every call. Raises as ``empty_auxiliary``."""
        entering, leaving = self._endpoints(name)
        seed = derive(self.settings.seed, "auxiliary", name)
        return build_head(entering.shape, leaving.shape, seed=seed, dtype=entering.dtype)

    def empty_auxiliary(self, name: str) -> LinearHead:
        """Build an auxiliary without weights, on the meta device. A head on a large map can be larger than its model.

        Raises ``ValueError`` if the name's block is not followed by a cut, or if the cut's value or the model's output is not a
        single tensor.
        """
        entering, leaving = self._endpoints(name)
        return empty_head(entering.shape, leaving.shape, dtype=entering.dtype)

    def _endpoints(self, name: str) -> tuple[Boundary, Boundary]:
        """Input and output of an auxiliary for each sample, in the types of the model's own weights."""
        block, names = cut_of(name), self.blocks.spec.block_names
        if block not in names[:-1]:
            allowed = ", ".join(names[:-1]) or "no block"
            raise ValueError(f"part.auxiliaries names {name!r}; a head can stand behind: {allowed}")
        entering = self.boundary(names[: names.index(block) + 1], Training())
        leaving = self.boundary(names, Training())
        return entering, leaving

    def _auxiliary_spec(self, name: str) -> BlockSpec:
        if name not in self._auxiliaries:
            self._auxiliaries[name] = auxiliary_spec(name, self.empty_auxiliary(name))
        return self._auxiliaries[name]

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """Metrics by name; the user's own by the name of the function.

        Raises ``ValueError`` for an unknown metric, and for two of the same name, which reports could not distinguish.
        """
        metrics: dict[str, Metric] = {}
        calls = self.settings.metrics
        if calls is None:
            calls = default_metrics(self.settings.loss, self.example()[1])
        for call in calls:
            name = call.name.rpartition(":")[2]
            if name in metrics or name == "loss":
                raise ValueError(f"evaluation.metrics names {name!r}, which is taken; each metric needs its own name")
            metrics[name] = make_metric(call)
        return metrics

    def example(self) -> tuple[Tensor, Tensor]:
        """One transformed sample and its target, without batch dimension, to take shapes and types from."""
        inputs, targets = self.first_samples(1)
        return inputs[0], targets[0]

    def first_samples(self, count: int) -> tuple[Tensor, Tensor]:
        """Take ``count`` transformed training samples and their targets from the first device that has that many.

        Returns fewer if no device has that many. Raises ``ValueError`` if no device has any, or if the transforms fail.
        """
        counts = [self.data.num_samples(device) for device in range(self.settings.num_devices)]
        available = min(count, max(counts, default=0))
        if not available:
            raise ValueError("data: no device has a single sample")
        device = next(device for device, num_samples in enumerate(counts) if num_samples >= available)
        samples = self.data.train(device).take(np.arange(available))
        return apply_checked(self.data.train_transform, samples.x, field="data.train_transforms"), samples.y
