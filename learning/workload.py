"""What is learned from what: the model, its blocks, the data and the losses, built from plain settings.

Server and devices each build their own from the same settings and seed; nothing but packets passes between them.
"""

from functools import cached_property

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from .data.load import load
from .data.transforms import tried
from .data.types import FederatedData
from .models import build, use_batch_statistics
from .parts.auxiliaries import LinearHead, auxiliary_spec, build_head, empty_head
from .parts.blocks import Blocks, cut
from .parts.compare_blocks import lost_in_blocks
from .parts.module_state import ModuleState
from .parts.part import cut_of
from .parts.structure import BlockSpec, ModelSpec
from .pretrained import initialise, read_weights
from .randomness import seeded
from .resolve import told
from .seeds import derive
from .spec import Training
from .training.losses import Metric, default_metrics, make_metric
from .training.split import Boundary, boundary
from .workload_settings import WorkloadSettings


class Workload:
    """Builds each thing when it is first asked for, and keeps it.

    ``left_random``: the tensors of the model that the holistic mode found no equals of, once a model was built.
    """

    def __init__(self, settings: WorkloadSettings) -> None:
        """Nothing is built yet."""
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
        """The whole model with its initial weights: the same bits at every call.

        Raises ``ValueError`` for weights that cannot be read, are not those of ``init.hash``, or do not fit.
        """
        settings = self.settings
        model = build(settings.model, seed=derive(settings.seed, "model"), outputs=self.data.num_classes)
        if settings.batch_statistics:
            use_batch_statistics(model)
        if settings.init.mode != "random":
            found = read_weights(settings.init, model=settings.model.name)
            self.left_random = initialise(model, found, settings.init)
        return model

    @cached_property
    def blocks(self) -> Blocks:
        """The model, cut into blocks."""
        return cut(self.new_model())

    @cached_property
    def cut_fault(self) -> str:
        """Why the model cannot be cut: it is one block, or its blocks do not do what it does; "" where it can."""
        if len(self.blocks.modules) == 1:
            return self.blocks.reason
        return lost_in_blocks(self.blocks, self.few(2)[0])

    @cached_property
    def alone_fault(self) -> str:
        """Why the model cannot be trained on one sample at a time, as with batch normalisation; "" where it can."""
        model = self.blocks.model
        state = ModuleState(model, values=True)
        try:
            with seeded(0), torch.no_grad():
                model.train()(self.few(1)[0])
        except Exception as error:  # of a user's code: anything
            return told(error)
        finally:
            state.restore()
        return ""

    @cached_property
    def min_samples(self) -> int:
        """Training samples that a device needs to take part: 2 where some have one, and the model cannot be trained on it."""
        counts = (self.data.num_samples(device) for device in range(self.settings.num_devices))
        return 2 if 1 in counts and self.alone_fault else 1

    def boundary(self, front: tuple[str, ...], training: Training) -> Boundary:
        """What crosses the cut behind the ``front`` blocks."""
        key = front, training.precision
        if key not in self._boundaries:
            self._boundaries[key] = boundary(self.blocks, front, example=self.example()[0], training=training)
        return self._boundaries[key]

    @cached_property
    def spec(self) -> ModelSpec:
        """Names, shapes and roles of the model's tensors, by block; and what its auxiliaries are."""
        return msgspec.structs.replace(self.blocks.spec, auxiliary=self._auxiliary_spec)

    def new_auxiliary(self, name: str) -> LinearHead:
        """The auxiliary of that name with its initial weights, the same bits at every call. Raises as ``empty_auxiliary``."""
        entering, leaving = self._ends(name)
        seed = derive(self.settings.seed, "auxiliary", name)
        return build_head(entering.shape, leaving.shape, seed=seed, dtype=entering.dtype)

    def empty_auxiliary(self, name: str) -> LinearHead:
        """The same without any memory: shapes, on the meta device. A head on a large map can be larger than its model.

        Raises ``ValueError`` where there can be none: behind no clean cut, or where what crosses it or leaves the model is no
        single tensor.
        """
        entering, leaving = self._ends(name)
        return empty_head(entering.shape, leaving.shape, dtype=entering.dtype)

    def _ends(self, name: str) -> tuple[Boundary, Boundary]:
        """What enters and leaves the auxiliary of that name, by the sample, in the types of the model's own weights."""
        behind, names = cut_of(name), self.blocks.spec.block_names
        if behind not in names[:-1]:
            allowed = ", ".join(names[:-1]) or "no block"
            raise ValueError(f"part.auxiliaries names {name!r}; a head can stand behind: {allowed}")
        entering = self.boundary(names[: names.index(behind) + 1], Training())
        leaving = self.boundary(names, Training())
        return entering, leaving

    def _auxiliary_spec(self, name: str) -> BlockSpec:
        if name not in self._auxiliaries:
            self._auxiliaries[name] = auxiliary_spec(name, self.empty_auxiliary(name))
        return self._auxiliaries[name]

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """Metrics by name; the user's own by the name of the function.

        Raises ``ValueError`` for an unknown one, and for two of one name: reports could not tell them apart.
        """
        found: dict[str, Metric] = {}
        calls = self.settings.metrics
        if calls is None:
            calls = default_metrics(self.settings.loss, self.example()[1])
        for call in calls:
            name = call.name.rpartition(":")[2]
            if name in found or name == "loss":
                raise ValueError(f"evaluation.metrics names {name!r}, which is taken; each metric needs its own name")
            found[name] = make_metric(call)
        return found

    def example(self) -> tuple[Tensor, Tensor]:
        """One transformed sample and its target, without batch dimension: their shapes and types are what matters."""
        inputs, targets = self.few(1)
        return inputs[0], targets[0]

    def few(self, count: int) -> tuple[Tensor, Tensor]:
        """So many transformed training samples and their targets, of the first device that has as many.

        Fewer where no device has; raises ``ValueError`` where none has any, or the transforms fail.
        """
        counts = [self.data.num_samples(device) for device in range(self.settings.num_devices)]
        found = min(count, max(counts, default=0))
        if not found:
            raise ValueError("data: no device has a single sample")
        device = next(device for device, have in enumerate(counts) if have >= found)
        samples = self.data.train(device).take(np.arange(found))
        return tried(self.data.train_transform, samples.x, field="data.train_transforms"), samples.y
