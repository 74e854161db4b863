"""The workload of a run: models, data and metrics, built from plain settings.

Server and devices each build their own from the same settings and seed, and those of one process have twins of one workload;
only packets are exchanged between them.
"""

from collections import OrderedDict
from functools import cached_property, partial

import msgspec
import numpy as np
from torch import Tensor, nn

from .architecture import Architecture, Examples, Kept
from .data.load import load
from .data.public import PublicSet, load_public_set, make_disjoint
from .data.transforms import apply_checked
from .data.types import FederatedData
from .models import build, use_batch_statistics
from .parts.blocks import Blocks
from .parts.channels import map_hash
from .parts.part import Part
from .parts.slices import Slice
from .parts.structure import ModelSpec
from .parts.submodel import SubModel
from .pretrained import initialise, read_weights
from .seeds import derive
from .sparse.selection import make_sparse
from .spec import Sparsity
from .training.losses import Metric, default_metrics, make_metric
from .workload_settings import WorkloadSettings

_MAX_NARROW = 16  # narrow architectures that are kept
_MAX_PARTS = 256  # compiled parts that are kept


class Workload:
    """Builds each object at its first use and caches it.

    ``left_random``: once a model was built, its tensors that pretrained weights did not cover and that keep random values.
    """

    def __init__(self, settings: WorkloadSettings) -> None:
        """Store the settings; nothing is built yet."""
        self.settings = settings
        self.left_random: tuple[str, ...] = ()
        self._families: dict[str, Architecture] = {}
        self._narrow: OrderedDict[tuple[object, ...], Architecture] = OrderedDict()
        self._parts: OrderedDict[str, SubModel] = OrderedDict()
        self._maps: dict[str, Kept] = {}
        self._public: dict[float, PublicSet] = {}

    def twin(self) -> "Workload":
        """The same workload for another actor of this process.

        They share what no plan changes: data, and the models of which structures are taken. Index maps come with packets, and
        are its own.
        """
        other = Workload(self.settings)
        other.data, other._public = self.data, self._public
        other._families, other._narrow = self._families, self._narrow
        return other

    def with_sparsity(self, sparsity: Sparsity) -> "Workload":
        """The same workload, of models with sparse products, on the same data."""
        other = Workload(msgspec.structs.replace(self.settings, sparsity=sparsity))
        other.data = self.data
        return other

    @cached_property
    def data(self) -> FederatedData:
        """The devices' data."""
        settings = self.settings
        return load(settings.data, num_devices=settings.num_devices, seed=derive(settings.seed, "data"))

    def public(self, held_out: float) -> PublicSet:
        """The public set, of which a share is held out, without samples that a device or the test set has.

        Raises ``ValueError`` if none is configured, or if too many of its samples are not public.
        """
        if held_out not in self._public:
            settings = self.settings
            public = load_public_set(
                settings.data,
                settings.public,
                num_devices=settings.num_devices,
                seed=derive(settings.seed, "data"),
                held_out=held_out,
                num_classes=self.data.num_classes,
            )
            self._public[held_out] = make_disjoint(public, self.data)
        return self._public[held_out]

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families of models; "" is the global model."""
        return ("", *self.settings.models)

    def new_model(self) -> nn.Module:
        """Build the whole global model with its initial weights: the same bits at every call.

        Raises ``ValueError`` for weights that cannot be read, do not have the hash ``init.hash``, or do not fit.
        """
        return self.family("").new_model()

    @property
    def blocks(self) -> Blocks:
        """The global model, cut into blocks."""
        return self.family("").blocks

    @property
    def spec(self) -> ModelSpec:
        """Names, shapes and roles of the global model's tensors, by block, and of its auxiliaries."""
        return self.family("").spec

    def family(self, name: str) -> Architecture:
        """The model of a family at full width. Raises ``ValueError`` for a name that is none of the ``families``."""
        if name not in self.families:
            known = ", ".join(map(repr, self.settings.models)) or "none are configured"
            raise ValueError(f"part.model is {name!r}; allowed: '' for the global model, or a name in models: {known}")
        if name not in self._families:
            examples, seed = Examples(self.example, self.first_samples), self.settings.seed
            structure = partial(self._build, name, weights=False)
            self._families[name] = Architecture(partial(self._build, name), examples, seed=seed, structure=structure)
        return self._families[name]

    def architecture(self, part: Part) -> Architecture:
        """The model of a part's family at the part's width."""
        family = self.family(part.model)
        if part.width == 1:
            return family
        key = part.model, part.width, part.min_channels, part.scaled
        if key not in self._narrow:
            examples, seed = Examples(self.example, self.first_samples), self.settings.seed
            self._narrow[key] = Architecture(
                partial(self._build, part.model), examples, seed=seed, full=family, part=part
            )
            if len(self._narrow) > _MAX_NARROW:
                self._narrow.popitem(last=False)
        self._narrow.move_to_end(key)
        return self._narrow[key]

    def submodel(self, part: Part) -> SubModel:
        """A part, compiled. Raises ``ValueError`` for a width to which its model cannot be narrowed."""
        key = part.key
        if key not in self._parts:
            architecture = self.architecture(part)
            prefix = f"{part.model}:" if part.model else ""
            locate = partial(self.slices, part)
            self._parts[key] = SubModel(part, architecture.blocks, architecture.spec, prefix, locate)
            if len(self._parts) > _MAX_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(key)
        return self._parts[key]

    def slices(self, part: Part) -> dict[str, Slice]:
        """Where the tensors of a part are in the full ones, by name; empty at the whole width. Raises as ``channels``."""
        return self.family(part.model).slices(self.channels(part)) if part.width < 1 else {}

    def channels(self, part: Part) -> Kept:
        """The channels that a narrow part holds.

        Those of its index map, if it names one; else those that follow from the part itself, and where they depend on weights,
        the first of each group, which are as many. Raises ``ValueError`` for an index map that was not added.
        """
        if not part.index_map:
            return self.family(part.model).choose(part)
        if part.index_map not in self._maps:
            raise ValueError(f"part.index_map is {part.index_map!r}, a map that this process does not have")
        return self._maps[part.index_map]

    def add_map(self, kept: Kept) -> str:
        """Add an index map; returns its hash, by which parts name it."""
        name = map_hash(kept)
        self._maps[name] = kept
        return name

    def drop_map(self, name: str) -> None:
        """Drop an index map, and the parts that were compiled with it."""
        self._maps.pop(name, None)
        self._parts = OrderedDict((key, each) for key, each in self._parts.items() if each.part.index_map != name)

    def _build(self, family: str, *, weights: bool = True) -> nn.Module:
        """The model of a family with its initial weights. ``weights``: whether to read pretrained ones, if it has some."""
        settings = self.settings
        call = settings.models[family] if family else settings.model
        path = ("model", family) if family else ("model",)
        try:
            model = build(call, seed=derive(settings.seed, *path), outputs=self.data.num_classes)
        except ValueError as error:
            raise ValueError(f"models.{family}: {error}" if family else str(error)) from error
        if settings.batch_statistics:
            use_batch_statistics(model)
        if weights and settings.init.mode != "random" and not family:
            pretrained = read_weights(settings.init, model=settings.model.name)
            self.left_random = initialise(model, pretrained, settings.init)
        if settings.sparsity is not None:
            try:
                make_sparse(
                    model, settings.sparsity, {} if family else settings.kernels
                )  # which are the global model's
            except ValueError as error:
                raise ValueError(f"models.{family}: {error}" if family else str(error)) from error
        return model

    @cached_property
    def min_samples(self) -> int:
        """Training samples that a device needs to take part: 2 if some device has one and a model cannot be trained on it."""
        counts = (self.data.num_samples(device) for device in range(self.settings.num_devices))
        return 2 if 1 in counts and self.alone_fault else 1

    @cached_property
    def alone_fault(self) -> str:
        """Why the first model of all families that cannot be trained on one sample at a time cannot; "" if all can."""
        return next((fault for name in self.families if (fault := self.family(name).alone_fault)), "")

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
