"""A model of the workload at one width: its module, its blocks, what crosses its cuts, and its auxiliaries.

An architecture does not depend on *which* channels a narrow part holds, only on how many: parts with other channels of the same
numbers share it, and with it the modules of a worker.

Narrow modules are built without the full one where that is possible: on torch's meta device, which has shapes and no values.
Their parameters and running statistics are always sent by the server. A model with other tensors, whose values only its builder
knows, and one whose builder needs values, are built at full width first, for a moment.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .narrowing.find_groups import find_groups
from .narrowing.narrow import narrow, scale_outputs
from .parts.auxiliaries import LinearHead, auxiliary_spec, build_head, empty_head
from .parts.blocks import Blocks, cut
from .parts.channels import ChannelGroups, choose_channels
from .parts.compare_blocks import blocks_difference
from .parts.module_state import ModuleState
from .parts.part import Part, cut_of, replaced_by
from .parts.proxies import build_proxy, check_proxy
from .parts.slices import Slice, slices
from .parts.structure import BlockSpec, ModelSpec
from .randomness import seeded
from .resolve import error_line
from .seeds import derive
from .spec import Training
from .training.split import Boundary, boundary

Scores = NDArray[np.float64]
Kept = NDArray[np.bool_]  # [channel] whether it is held; the channels of all groups, one group after the other


class Examples(NamedTuple):
    """Access to training samples: one without batch dimension with its target, and the first few as a batch."""

    one: Callable[[], tuple[Tensor, Tensor]]
    first: Callable[[int], tuple[Tensor, Tensor]]


_INITIALISERS = {"normal_", "uniform_", "trunc_normal_", "random_", "fill_", "zero_", "copy_"}


class _NoInitialValues(TorchFunctionMode):
    """Leaves meta tensors as they are: their initialisers would load torch's kernels in Python, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init's functions name it
        if getattr(func, "__name__", "") in _INITIALISERS and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **kwargs)


class Architecture:
    """One model at one width. Each object is built at its first use and cached."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        examples: Examples,
        *,
        seed: int,
        structure: Callable[[], nn.Module] | None = None,
        full: "Architecture | None" = None,
        part: Part | None = None,
    ) -> None:
        """``build``: makes the model at full width with its initial weights. ``seed``: of the run.

        ``structure``: the same without reading weights from a file (None: as ``build``). ``full``: the architecture that this
        one narrows, to the width of ``part``; None: it is the full one.
        """
        self._build, self._structure, self._examples, self._seed = build, structure or build, examples, seed
        self._full, self._part = full, part
        self._boundaries: dict[tuple[tuple[str, ...], str], Boundary] = {}
        self._auxiliaries: dict[str, BlockSpec] = {}

    def new_model(self) -> nn.Module:
        """Build the model, the same bits at every call.

        At full width it has its initial weights. Those of a narrow one mean nothing: every plan sets them.
        """
        if self._full is None:
            return self._build()
        assert self._part is not None
        model = self._full.skeleton()
        narrow(model, self._full.groups, self._full.choose(self._part))
        if self._part.scaled:
            scale_outputs(model, self._full.groups, self._part.width)
        _fill(model)
        return model

    def skeleton(self) -> nn.Module:
        """A full model to be narrowed: on the meta device if no value is lost there, else with its builder's values."""
        model = self._on_meta()
        return model if model is not None else self._structure()

    def _on_meta(self) -> nn.Module | None:
        """The model on the meta device; None if that fails, or if the model has values that the server does not send."""
        try:
            with torch.device("meta"), _NoInitialValues():
                model = self._structure()
        except Exception:  # a user's builder may need values; it is then called without this
            return None
        state = model.state_dict()
        for name, buffer in model.named_buffers():
            sent = name in state and buffer.is_floating_point()
            if not sent and not name.endswith("num_batches_tracked"):
                return None
        if any(_holds_tensor(value) for module in model.modules() for value in _own_attributes(module)):
            return None
        return model if all(tensor.is_meta for tensor in state.values()) else None

    @cached_property
    def groups(self) -> ChannelGroups:
        """The channels that can be removed, of the full width. Raises ``ValueError`` if there are none."""
        assert self._full is None
        model = self.skeleton()
        device = next(model.parameters()).device
        inputs, _ = self._examples.one()
        return find_groups(model, torch.stack([inputs, inputs]).to(device))

    def choose(self, part: Part, *, scores: Scores | None = None) -> Kept:
        """As many channels of each group as ``part`` holds: those with the highest ``scores``, [channel].

        Without scores: the window of its turn where its rule is ``rolling``, else the first ones.
        """
        turn = part.turn if part.channels == "rolling" else None
        return choose_channels(self.groups, width=part.width, min_channels=part.min_channels, scores=scores, turn=turn)

    def slices(self, kept: Kept) -> dict[str, Slice]:
        """Where the tensors of a model with only these channels are in the full tensors."""
        return slices(self.groups, kept)

    @cached_property
    def blocks(self) -> Blocks:
        """The model, cut into blocks. (Of a narrow one the values mean nothing.)"""
        return cut(self.new_model())

    @cached_property
    def cut_fault(self) -> str:
        """Why the model cannot be cut: it is one block, or its blocks compute something else; "" if it can be cut.

        Of a narrow model, whose values mean nothing, it is the full one that is tried.
        """
        if self._full is not None:
            return self._full.cut_fault
        if len(self.blocks.modules) == 1:
            return self.blocks.reason
        return blocks_difference(self.blocks, self._examples.first(2)[0])

    @cached_property
    def alone_fault(self) -> str:
        """Why the model cannot be trained on one sample at a time, as with batch normalisation; "" if it can."""
        model = self.blocks.model
        state = ModuleState(model, values=True)
        try:
            with seeded(0), torch.no_grad():
                model.train()(self._examples.first(1)[0])
        except Exception as error:  # a user's code may raise anything
            return error_line(error)
        finally:
            state.restore()
        return ""

    @cached_property
    def spec(self) -> ModelSpec:
        """Names, shapes and roles of the model's tensors, by block, and of its auxiliaries."""
        return msgspec.structs.replace(self.blocks.spec, auxiliary=self._auxiliary_spec)

    def boundary(self, front: tuple[str, ...], training: Training) -> Boundary:
        """Shape and type of the tensor that crosses the cut behind the ``front`` blocks."""
        key = front, training.precision
        if key not in self._boundaries:
            self._boundaries[key] = boundary(self.blocks, front, example=self._examples.one()[0], training=training)
        return self._boundaries[key]

    def new_auxiliary(self, name: str) -> nn.Module:
        """Build an auxiliary with its initial weights: the same bits at every call. Raises as ``empty_auxiliary``."""
        seed = derive(self._seed, "auxiliary", name)
        if replaced_by(name) is not None:
            build = self._proxy(name)
            with seeded(seed):
                return build()
        entering, leaving = self._endpoints(name)
        return build_head(entering.shape, leaving.shape, seed=seed, dtype=entering.dtype)

    def empty_auxiliary(self, name: str) -> nn.Module:
        """Build an auxiliary without weights, on the meta device. A head on a large map can be larger than its model.

        Raises ``ValueError`` if the model cannot have it: a linear head stands behind a block that is followed by a cut; a
        proxy stands for neighbouring blocks; and what crosses the cuts is a single tensor.
        """
        if replaced_by(name) is not None:
            build = self._proxy(name)
            with torch.device("meta"):
                return build()
        return self.empty_head(name)

    def empty_head(self, name: str) -> LinearHead:
        """A linear head without weights, on the meta device. Raises ``ValueError`` as ``empty_auxiliary``."""
        entering, leaving = self._endpoints(name)
        return empty_head(entering.shape, leaving.shape, dtype=entering.dtype)

    def _endpoints(self, name: str) -> tuple[Boundary, Boundary]:
        """Input and output of a linear head for each sample, in the types of the model's own weights."""
        block, names = cut_of(name), self.blocks.spec.block_names
        if block not in names[:-1]:
            allowed = ", ".join(names[:-1]) or "no block"
            raise ValueError(f"part.auxiliaries names {name!r}; a head can stand behind: {allowed}")
        entering = self.boundary(names[: names.index(block) + 1], Training())
        leaving = self.boundary(names, Training())
        return entering, leaving

    def _proxy(self, name: str) -> Callable[[], nn.Module]:
        """Builds a proxy on the device and from the random state that are then set. Raises ``ValueError`` if there is none."""
        names, ends = self.blocks.spec.block_names, replaced_by(name)
        assert ends is not None
        if not set(ends) <= set(names) or not 0 < names.index(ends[0]) <= names.index(ends[1]):
            allowed = ", ".join(names[1:]) or "no block"
            raise ValueError(f"part.auxiliaries names {name!r}; a proxy can stand for neighbours among: {allowed}")
        first, last = names.index(ends[0]), names.index(ends[1])
        entering = self.boundary(names[:first], Training())
        leaving = self.boundary(names[: last + 1], Training())
        weights = [t for t in self.spec.tensors_of(names[first : last + 1]) if t.is_weight]
        channels = weights[-1].shape[0] if weights and len(weights[-1].shape) == 4 else 0
        try:
            check_proxy(entering.shape, leaving.shape)
        except ValueError as error:
            raise ValueError(f"part.auxiliaries names {name!r}; {error}") from error
        return partial(build_proxy, entering, leaving, channels=channels)

    def _auxiliary_spec(self, name: str) -> BlockSpec:
        if name not in self._auxiliaries:
            self._auxiliaries[name] = auxiliary_spec(name, self.empty_auxiliary(name))
        return self._auxiliaries[name]


def _fill(model: nn.Module) -> None:
    """Replace the tensors of a model that are on the meta device by zeros, in place. Tied ones stay tied.

    (``nn.Module.to_empty`` unties them.) The zeros of a large tensor take no memory until they are written to: numpy leaves
    them to the operating system. The server has many narrow models of which it only ever reads the shapes.
    """
    new: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the old tensor, which is kept alive with it
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in tables:
            for name, tensor in own.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in new:
                    zeros = _zeros(tensor)
                    if isinstance(tensor, nn.Parameter):
                        zeros = nn.Parameter(zeros, requires_grad=tensor.requires_grad)
                    new[id(tensor)] = tensor, zeros
                own[name] = new[id(tensor)][1]


def _zeros(like: Tensor) -> Tensor:
    """Zeros of the shape and type of a tensor, on the CPU."""
    try:
        dtype = torch.empty(0, dtype=like.dtype, device="cpu").numpy().dtype
    except TypeError:  # one that numpy lacks, such as bfloat16
        return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
    return torch.from_numpy(np.zeros(like.shape, dtype))


def _own_attributes(module: nn.Module) -> Iterator[object]:
    """The attributes of a module besides its parameters, buffers and submodules."""
    registered = ("_parameters", "_buffers", "_modules")
    return (value for name, value in vars(module).items() if name not in registered)


def _holds_tensor(value: object) -> bool:
    """Whether a value is a tensor, or a container with one."""
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)
