"""A part of the model, compiled: what is held, trained, sent and received, and where its elements are in the server's tensors.

Server, device, partition host, costs and packet sizes all derive from the same compiled part, so they agree on names, shapes
and order without exchanging them::

    server's tensors ── gather ──► down ──► the device's stages ──► up ── slices ──► the server's fold

A part at the whole width has tensors of the server's own shapes. A narrower one has the same names with smaller shapes;
``slices`` says which rows and columns of the full tensors they are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import msgspec
from torch import Tensor

from .blocks import Blocks
from .part import Part, path
from .slices import Slice, gather
from .structure import ModelSpec, TensorSpec


class Stage(NamedTuple):
    """One step of a part's forward pass: a block of the model or a proxy, and whether it is trained.

    ``auxiliary``: whether it is a proxy; its module is not part of ``SubModel.blocks``.
    """

    name: str
    trained: bool
    auxiliary: bool = False


@dataclass(frozen=True, eq=False)
class SubModel:
    """A part of the model with everything that follows from it.

    Attributes:
        part: the part.
        blocks: the model at the part's width, in blocks.
        spec: names, shapes and roles of all tensors at the part's width, and of its auxiliaries.
        prefix: of the part's tensors among the server's: "" for the global model, "NAME:" for a family of models.
        locate: finds ``slices``. Devices need them only where a link remembers parts with other channels.
    """

    part: Part
    blocks: Blocks
    spec: ModelSpec
    prefix: str = ""
    locate: Callable[[], Mapping[str, Slice]] = dict

    @cached_property
    def slices(self) -> Mapping[str, Slice]:
        """By tensor, where a narrowed tensor is in the full one; tensors that are not named are whole."""
        return self.locate()

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Blocks that are held, and the proxies in place of others, in the order of the forward pass."""
        learns = {*self.part.trained, *self.part.trained_auxiliaries}
        names = path(self.part, self.spec.block_names)
        return tuple(Stage(name, name in learns, name in self.part.auxiliaries) for name in names)

    @cached_property
    def down(self) -> tuple[TensorSpec, ...]:
        """Tensors sent to the device: the blocks' in model order, then the auxiliaries'; no counters, no frozen tensors."""
        tensors = (*self.spec.tensors_of(self.part.sent), *self.spec.auxiliary_tensors(self.part.auxiliaries))
        return tuple(t for t in tensors if t.role != "counter" and not t.frozen)

    def up(self, *, statistics: bool) -> tuple[TensorSpec, ...]:
        """Tensors sent back: those of trained blocks and auxiliaries; running statistics only if ``statistics``."""
        excluded = {"counter"} if statistics else {"counter", "statistic"}
        learned = self.spec.auxiliary_tensors(self.part.trained_auxiliaries)
        tensors = (*self.spec.tensors_of(self.part.trained), *learned)
        return tuple(t for t in tensors if t.role not in excluded and not t.frozen)

    @cached_property
    def statistics(self) -> tuple[TensorSpec, ...]:
        """Running statistics of the blocks that are held, in model order: what a plan that collects them sends back."""
        return tuple(t for t in self.spec.tensors_of(self.part.blocks) if t.role == "statistic" and not t.frozen)

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """Names of the model's tensors that training changes, counters included: those of trained blocks, unless frozen."""
        return tuple(t.name for t in self.spec.tensors_of(self.part.trained) if not t.frozen)

    @cached_property
    def frozen(self) -> tuple[str, ...]:
        """Names of the blocks' tensors that the model's author has frozen, without counters, whose values do not matter."""
        return tuple(t.name for t in frozen_tensors(self.spec, self.part.blocks))

    @cached_property
    def parameters(self) -> int:
        """Number of scalars in the parameters of the blocks that are held, and of the proxies in place of others."""
        proxies = self.spec.auxiliary_tensors(tuple(stage.name for stage in self.stages if stage.auxiliary))
        tensors = (*self.spec.tensors_of(self.part.blocks), *proxies)
        return sum(t.items for t in tensors if t.is_parameter)

    def rest(self, *, frozen_to: str = "") -> Part:
        """The remaining blocks of the model: the host's part of a split plan.

        All are trained, except those up to block ``frozen_to``, which belong to the frozen trunk.
        """
        names = self.spec.block_names
        others = tuple(name for name in names if name not in self.part.blocks)
        first = names.index(frozen_to) + 1 if frozen_to else 0
        return msgspec.structs.replace(
            self.part,
            blocks=others,
            trained=tuple(name for name in others if names.index(name) >= first),
            cached=(),
            frozen="",
            head="",
            auxiliaries=(),
            untrained=(),
        )

    def gather(self, tensors: Mapping[str, Tensor], specs: Iterable[TensorSpec] | None = None) -> dict[str, Tensor]:
        """The part's values of ``specs`` (None: of all that is sent down) from the server's ``tensors``, by their own names.

        A whole tensor is returned as it is, a narrowed one as a contiguous copy.
        """
        found = {}
        for spec in self.down if specs is None else specs:
            full = tensors[self.prefix + spec.name]
            found[spec.name] = gather(full, self.slices[spec.name]) if spec.name in self.slices else full
        return found

    def server_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the part under the names that they have at the server."""
        return {self.prefix + name: tensor for name, tensor in tensors.items()} if self.prefix else dict(tensors)

    @cached_property
    def server_slices(self) -> dict[str, Slice]:
        """``slices`` under the names that the tensors have at the server."""
        return {self.prefix + name: part for name, part in self.slices.items()}


def frozen_tensors(spec: ModelSpec, blocks: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    """Tensors of these blocks that the model's author has frozen, without counters, whose values do not matter."""
    return tuple(t for t in spec.tensors_of(blocks) if t.frozen and t.role != "counter")


def compile_part(part: Part, blocks: Blocks) -> SubModel:
    """A part of a model at its own width."""
    return SubModel(part, blocks, blocks.spec)
