"""Groups of channels that can be removed from a model, and the choice of those that a narrow part keeps.

All removable channels of a model are numbered, group after group (``find_groups``). A *map* is one boolean per channel, True
for those that are kept; it fits only the groups that it was made for. Kept channels stay in their order.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .part import ChannelRule


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """The removable channels of a model, as index data.

    Channels of one group occur in the same dimensions of the same tensors; which of them are kept does not matter to the model,
    as long as it is at least one.

    Attributes:
        names: of each group the first layer that produces it, in the order of the model's state dict.
        sizes: channels of each group.
        owners: by tensor and dimension, the number of the channel that each index belongs to; -1: the index always stays.
            Tied tensors are listed under each of their names.
        producers: of each group the weights of convolutions and linear layers whose dimension 0 holds its channels.
        scales: of each group the weights of the batch normalisations of its channels.
        whole: layers whose channels always stay, and why; it continues the layer's name as a sentence.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    owners: Mapping[str, Mapping[int, NDArray[np.int32]]]
    producers: tuple[tuple[str, ...], ...]
    scales: tuple[tuple[str, ...], ...]
    whole: Mapping[str, str]

    @cached_property
    def channels(self) -> int:
        """Number of removable channels."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of the first channel of each group."""
        return tuple(int(end) - size for end, size in zip(np.cumsum(self.sizes), self.sizes, strict=True))

    def without(self, reasons: Mapping[int, str]) -> "ChannelGroups":
        """The same without the groups that are listed, whose layers stay whole for the given reasons."""
        left = [group for group in range(len(self.sizes)) if group not in reasons]
        numbers = np.full(self.channels + 1, -1, np.int32)  # the last one stands for the owner -1
        kept = np.repeat(np.array([group not in reasons for group in range(len(self.sizes))], np.bool_), self.sizes)
        numbers[:-1][kept] = np.arange(kept.sum())
        owners = {
            name: {d: numbers[owner] for d, owner in dimensions.items() if (numbers[owner] >= 0).any()}
            for name, dimensions in self.owners.items()
        }
        added = {name.rpartition(".")[0]: why for group, why in reasons.items() for name in self.producers[group]}
        return ChannelGroups(
            names=tuple(self.names[group] for group in left),
            sizes=tuple(self.sizes[group] for group in left),
            owners={name: dimensions for name, dimensions in owners.items() if dimensions},
            producers=tuple(self.producers[group] for group in left),
            scales=tuple(self.scales[group] for group in left),
            whole={**self.whole, **added},
        )


def channel_counts(groups: ChannelGroups, *, width: float, min_channels: int) -> tuple[int, ...]:
    """Channels that each group keeps: ``width`` of them, rounded up; at least ``min_channels``, as far as it has as many."""
    # width * size may exceed a whole number by a rounding error, as 0.07 * 100 does.
    return tuple(min(size, max(min_channels, math.ceil(width * size - 1e-9))) for size in groups.sizes)


def score_channels(groups: ChannelGroups, tensors: Mapping[str, Tensor], *, rule: ChannelRule) -> NDArray[np.float64]:
    """Scores by which a rule ranks the channels of each group, [channel].

    l1: the L1 norms of their filters (Li et al., arXiv 1608.08710); where several layers produce a group, the sum of the norms,
    each layer's divided by its mean. batchnorm: their absolute scales (Liu et al., arXiv 1708.06519), summed likewise, and l1
    in groups without batch normalisation. Other rules rank by position: all scores are 0.

    ``tensors``: the full model's state; only l1 and batchnorm read it.
    """
    scores = np.zeros(groups.channels)
    known: dict[str, NDArray[np.float64]] = {}
    for start, size, producers, scales in zip(
        groups.starts, groups.sizes, groups.producers, groups.scales, strict=True
    ):
        if rule in ("l1", "batchnorm"):
            named = scales if rule == "batchnorm" and scales else producers
            scores[start : start + size] = _norms(groups, tensors, named, known)[start : start + size]
    return scores


def choose_channels(
    groups: ChannelGroups,
    *,
    width: float,
    min_channels: int,
    scores: NDArray[np.float64] | None = None,
    turn: int | None = None,
) -> NDArray[np.bool_]:
    """The map of a narrow part, see ``Part``: bool [channel].

    With ``scores``, those of ``score_channels``: the channels with the highest ones; of equal ones the first. With ``turn``:
    neighbouring channels from the channel number ``turn`` on, modulo the size of their group (FedRolex, arXiv 2212.01548, eq.
    4). Else the first channels (HeteroFL, arXiv 2010.01264). Without ``turn`` the choices nest: a smaller width keeps channels
    that a larger one keeps.
    """
    kept = np.zeros(groups.channels, dtype=np.bool_)
    for group, count in enumerate(channel_counts(groups, width=width, min_channels=min_channels)):
        start, size = groups.starts[group], groups.sizes[group]
        if scores is not None:
            chosen = np.argsort(-scores[start : start + size], kind="stable")[:count]
        else:
            chosen = ((turn or 0) + np.arange(count)) % size
        kept[start + chosen] = True
    return kept


def _norms(
    groups: ChannelGroups, tensors: Mapping[str, Tensor], names: tuple[str, ...], known: dict[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Of each channel the sum of its L1 norms in dimension 0 of the named tensors. ``known``: those of tensors seen before."""
    total = np.zeros(groups.channels)
    for name in names:
        if name not in known:
            known[name] = _relative_norms(groups, tensors[name], groups.owners[name][0])
        total += known[name]
    return total


def _relative_norms(groups: ChannelGroups, tensor: Tensor, owner: NDArray[np.int32]) -> NDArray[np.float64]:
    """L1 norms of a tensor's rows by channel, divided in each group by their mean; 0 where it is 0."""
    rows = tensor.detach().reshape(len(tensor), -1).abs().sum(dim=1, dtype=torch.float64).cpu().numpy()
    held = owner >= 0
    norms = np.bincount(owner[held], weights=rows[held], minlength=groups.channels)
    present = np.bincount(owner[held], minlength=groups.channels) > 0
    starts = np.asarray(groups.starts)
    sums, counts = np.add.reduceat(norms, starts), np.add.reduceat(present.astype(np.int64), starts)
    means = np.repeat(sums / np.maximum(counts, 1), groups.sizes)
    return np.divide(norms, means, out=np.zeros_like(norms), where=means != 0)


def map_bytes(kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A map as bytes, eight channels in each, the first in the highest bit."""
    return np.packbits(kept)


def read_map(data: NDArray[np.uint8] | bytes, groups: ChannelGroups) -> NDArray[np.bool_]:
    """The map that ``map_bytes`` wrote. Raises ``ValueError`` if it does not fit ``groups``."""
    packed = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    if (needed := -(-groups.channels // 8)) != packed.size or packed.dtype != np.uint8:
        raise ValueError(
            f"the map of channels has {packed.nbytes} bytes; the model's {groups.channels} channels need {needed}"
        )
    bits = np.unpackbits(packed.reshape(-1)).astype(np.bool_)
    kept = bits[: groups.channels]
    if bits[groups.channels :].any():
        raise ValueError(f"the map of channels names more channels than the model's {groups.channels}")
    check_map(groups, kept)
    return kept


def check_map(groups: ChannelGroups, kept: NDArray[np.bool_]) -> None:
    """Raise ``ValueError`` if ``kept`` is not a map of ``groups``: one boolean per channel, at least one True in each group."""
    if kept.shape != (groups.channels,) or kept.dtype != np.bool_:
        raise ValueError(f"the map of channels is {kept.dtype} {kept.shape}; it must be bool ({groups.channels},)")
    empty = np.flatnonzero(~np.logical_or.reduceat(kept, groups.starts))
    if empty.size:
        raise ValueError(f"the map of channels keeps none of {groups.names[empty[0]]!r}; it must keep at least one")


def map_hash(kept: NDArray[np.bool_]) -> str:
    """Hash of a map, 16 hexadecimal digits."""
    return hashlib.blake2b(map_bytes(kept).tobytes(), digest_size=8).hexdigest()
