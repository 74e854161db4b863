"""Tries whether the channels of a model can be removed as its groups say.

Two properties are tried on narrow copies with random values. They run, and their outputs have the shapes of the full model's.
And the order of the channels of a group does not matter: if they are permuted in all tensors alike, the copy computes the same
function. This holds for any arithmetic if, and only if, the groups are right, whereas removed channels equal channels of zeros
only in some networks. Groups without the two properties are found by bisection. All of it runs on the CPU, mostly in double
precision, so that every process finds the same groups, whatever its processor.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..parts.channels import ChannelGroups
from ..randomness import seeded
from ..resolve import error_line
from .narrow import narrow

_ORDER_MATTERS = "what the model computes depends on the order of its channels"
# Elements may differ by this share of the largest one: rounding, when sums are taken in another order.
_TOLERANCE, _LOOSE_TOLERANCE = 1e-6, 1e-2  # in double precision, and in any other


def meta_copy(model: nn.Module, *, buffers: bool = True) -> nn.Module:
    """A copy of ``model`` with its parameters, and its ``buffers`` unless false, on the meta device. Tied ones stay tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers() if buffers else ():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return deepcopy(model, memo)


def hollow_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU whose tensors have one element each, seen in all places. Tied ones stay tied.

    Unlike meta tensors they need none of torch's kernels in Python, whose import takes seconds and some 70 MB.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        one = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        memo[id(parameter)] = nn.Parameter(one, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.ones((), dtype=buffer.dtype).expand(buffer.shape)
    return deepcopy(model, memo)


@dataclass(frozen=True)
class Probe:
    """Narrows and runs copies of ``model``. ``shapes``: of its outputs for ``inputs``."""

    model: nn.Module
    inputs: Tensor
    shapes: Sequence[tuple[int, ...]]

    def accepted(self, groups: ChannelGroups) -> ChannelGroups:
        """The groups that can be narrowed independently of each other; the others become ``whole``."""
        faults: dict[int, str] = {}

        def admit(accepted: list[int], candidates: list[int]) -> list[int]:
            fault = self.fault(groups, [*accepted, *candidates])
            if not fault:
                return [*accepted, *candidates]
            if len(candidates) == 1:
                faults[candidates[0]] = fault
                return accepted
            middle = len(candidates) // 2
            return admit(admit(accepted, candidates[:middle]), candidates[middle:])

        admit([], list(range(len(groups.sizes))))
        return groups.without(faults)

    def fault(self, groups: ChannelGroups, chosen: Sequence[int]) -> str:
        """Why the ``chosen`` groups cannot be narrowed, the others being whole; "" if they can."""
        for dtype in (torch.float64, None):  # some models' code does not run in double precision
            fault = self._few(groups, chosen, dtype)
            if not fault or fault == _ORDER_MATTERS:
                break
        if fault:
            return fault
        _, fault = self._run(self._narrow(groups, _random_map(groups, chosen, one=True), dtype))
        return fault

    def _few(self, groups: ChannelGroups, chosen: Sequence[int], dtype: torch.dtype | None) -> str:
        """Why the model cannot be narrowed to a few of the ``chosen`` groups' channels."""
        kept = _random_map(groups, chosen, one=False)
        copy = self._narrow(groups, kept, dtype)
        before, fault = self._run(copy)
        # In the first round all groups are permuted; of any two groups, another round permutes only one.
        for bit in range(-1, (len(chosen) - 1).bit_length()):
            permuted = [group for number, group in enumerate(chosen) if bit < 0 or number >> bit & 1]
            if not fault:
                _permute(copy, groups, kept, permuted)
                after, fault = self._run(copy)
                if not fault and not all(map(_equal, before, after)):
                    fault = _ORDER_MATTERS
        return fault

    def _narrow(self, groups: ChannelGroups, kept: NDArray[np.bool_], dtype: torch.dtype | None) -> nn.Module:
        """A narrow copy in evaluation mode, with random values in place of parameters and narrowed buffers."""
        copy = meta_copy(self.model, buffers=False)
        narrow(copy, groups, kept)
        generator = torch.Generator().manual_seed(0)
        new: dict[int, tuple[Tensor, nn.Parameter]] = {}  # by id of the old parameter, which is kept alive with it
        for path, module in copy.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in new:
                        values = _random(parameter, generator, dtype)
                        new[id(parameter)] = parameter, nn.Parameter(values, requires_grad=False)
                    module._parameters[name] = new[id(parameter)][1]
            for name, buffer in module._buffers.items():
                if buffer is not None and (buffer.is_meta or f"{path}.{name}".lstrip(".") in groups.owners):
                    module._buffers[name] = _random(buffer, generator, dtype)
                elif buffer is not None:
                    module._buffers[name] = buffer.to("cpu", dtype if buffer.is_floating_point() else None)
        return copy.eval()

    def _run(self, copy: nn.Module) -> tuple[list[Tensor], str]:
        """The outputs of a copy, or why it has none of the right shapes."""
        if self.inputs.is_floating_point():
            dtype = next((p.dtype for p in copy.parameters() if p.is_floating_point()), self.inputs.dtype)
            inputs = torch.randn(
                self.inputs.shape, generator=torch.Generator().manual_seed(1), dtype=dtype, device="cpu"
            )
        else:
            inputs = torch.zeros_like(self.inputs, device="cpu") if self.inputs.is_meta else self.inputs.cpu()
        try:
            with seeded(2), torch.no_grad():
                outputs = [leaf for leaf in tree_leaves(copy(inputs)) if isinstance(leaf, Tensor)]
        except Exception as error:  # a user's code may raise anything
            return [], f"a narrower model fails: {error_line(error)}"
        if [tuple(leaf.shape) for leaf in outputs] != list(self.shapes):
            return [], "the shape of the model's outputs depends on the number of its channels"
        return outputs, ""


def _random_map(groups: ChannelGroups, chosen: Sequence[int], *, one: bool) -> NDArray[np.bool_]:
    """A map with some channels of each of the ``chosen`` groups, or with ``one``; and with all of the others."""
    random = np.random.default_rng(0)
    kept = np.ones(groups.channels, np.bool_)
    for group in chosen:
        start, size = groups.starts[group], groups.sizes[group]
        # Few, since a device that has no room for the full model tries them too; but of two or three channels the order may
        # happen not to matter, as to a normalisation over neighbours.
        count = 1 if one else min(size - 1, 8)
        kept[start : start + size] = False
        kept[start + random.choice(size, count, replace=False)] = True
    return kept


def _random(like: Tensor, generator: torch.Generator, dtype: torch.dtype | None) -> Tensor:
    """Values of the shape of ``like`` under which a network's outputs vary: positive vectors, He-normal weights."""
    if not (like.is_floating_point() or like.is_complex()):
        return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
    if like.dim() > 1:
        scale = sqrt(2 * len(like) / max(1, like.numel()))
        values = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu") * scale
    else:
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    wanted = dtype if dtype is not None and like.is_floating_point() else like.dtype
    return values.to(wanted)


def _permute(copy: nn.Module, groups: ChannelGroups, kept: NDArray[np.bool_], permuted: Sequence[int]) -> None:
    """Permute the kept channels of the ``permuted`` groups in all tensors of a narrow copy, in place."""
    random = np.random.default_rng(0)
    target = np.append(np.arange(groups.channels), -1)  # the owner -1 of indices that stay reads the last entry
    for group in permuted:
        start, size = groups.starts[group], groups.sizes[group]
        channels = start + np.flatnonzero(kept[start : start + size])
        moved = random.permutation(channels)
        target[channels] = np.roll(channels, 1) if (moved == channels).all() else moved
    state = copy.state_dict(keep_vars=True)
    for name in {id(state[name]): name for name in groups.owners}.values():  # tied tensors once
        tensor = state[name].detach()
        for dimension, every in groups.owners[name].items():
            owner = every[(every < 0) | kept[every]]
            index = np.empty(owner.size, np.int64)
            # The k-th index of a channel takes the values of the k-th index of the channel that moves there.
            index[np.argsort(owner, kind="stable")] = np.argsort(target[owner], kind="stable")
            tensor.copy_(tensor.index_select(dimension, torch.from_numpy(index)))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal but for rounding."""
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    share = _TOLERANCE if one.dtype == torch.float64 else _LOOSE_TOLERANCE
    largest = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=share * largest)
