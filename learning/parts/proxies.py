"""Proxies: small networks that imitate removed blocks, so that the blocks before them keep their place in the network.

In ProFL (Wu, Li and Xu, KDD 2025, arXiv 2404.13349) a block is trained before the blocks behind it exist: each of those is
represented by a *basic layer* with the same input, output and stride, and all of them with the classifier are the block's
output module. The paper's own layers are not known to us; one strided convolution for each block of a convolutional network is
what the same group has published (NeuLite). Here a proxy follows from the shapes at the two cuts alone, so it fits any model
that can be cut:

    maps to maps         one convolution without bias; its stride is the ratio of the sizes, and its kernel is as large
    maps to a vector     where the blocks end with a convolution: the same, then average pooling to the grid that the vector
                         holds; where they end with a linear layer: one linear map of the maps, pooled to 4x4 at most
    sequence             one linear map of each element; where the sequence ends in one vector, of the mean element
    vector to vector     one linear map

(The kernel reads every value once. One of 3x3 has 2.25 times the weights at stride 2, and 9 times at stride 1; in networks
whose last blocks have the most weights that was half of what a stage needs.)

Between the proxies there are no normalisation and no activation. Maps are [channels, height, width], or with the channels last
where height and width come first. The name of a proxy, ``proxy@FIRST..LAST``, says for which blocks it stands.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

_GRID = 4  # of maps that a linear layer reads, or that are averaged


class Crossing(Protocol):
    """What is known of the tensor at a cut: its shape for one sample, and its type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the batch dimension."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """In the types of the model's own weights."""
        ...


def check_proxy(entering: tuple[int, ...], leaving: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if no proxy leads from one shape to the other; both for one sample."""
    dimensions = len(entering), len(leaving)
    possible = dimensions in ((3, 3), (3, 1), (1, 1), (2, 1)) or (dimensions == (2, 2) and entering[0] == leaving[0])
    if possible and dimensions == (3, 3):
        possible = channels_last(entering) == channels_last(leaving) or _same_sizes(entering) or _same_sizes(leaving)
    if not possible:
        shapes = " to ".join("x".join(map(str, shape)) or "a number" for shape in (entering, leaving))
        raise ValueError(
            f"no proxy leads from {shapes}; it stands for blocks with maps, sequences or vectors at both ends"
        )


def build_proxy(entering: Crossing, leaving: Crossing, *, channels: int) -> nn.Module:
    """The proxy between two cuts that ``check_proxy`` accepts, with torch's initialisation, from the process's random state.

    ``channels``: of the last of the layers that it stands for, if that is a convolution (else 0), by which a vector that leaves
    is divided into maps.
    """
    start, end, dtype = entering.shape, leaving.shape, entering.dtype
    if len(start) == 3 and len(end) == 1 and not channels:
        return PooledProxy(start, end[0], dtype=dtype)
    if len(start) == 3:
        return MapProxy(start, end, channels=channels, dtype=dtype)
    if len(start) == 2:
        return SequenceProxy(start[-1], end, dtype=dtype)
    return nn.Linear(start[0], end[0], dtype=dtype)


def channels_last(shape: tuple[int, ...]) -> bool:
    """Whether maps of one sample have their channels in the last dimension: height and width come first and are equal."""
    return shape[0] == shape[1] != shape[2]


def _same_sizes(shape: tuple[int, ...]) -> bool:
    """Whether all dimensions are equal, so that the place of the channels cannot be seen."""
    return len(set(shape)) == 1


class MapProxy(nn.Conv2d):
    """One strided convolution from maps to maps; to a vector with average pooling and flattening behind it."""

    def __init__(
        self, entering: tuple[int, ...], leaving: tuple[int, ...], *, channels: int, dtype: torch.dtype
    ) -> None:
        """``entering``, ``leaving``: shapes for one sample. ``channels``: see ``build_proxy``."""
        last = channels_last(leaving if len(leaving) == 3 and _same_sizes(entering) else entering)
        size = entering[:2] if last else entering[1:]
        if len(leaving) == 3:
            grid, leaving_channels = (leaving[:2], leaving[2]) if last else (leaving[1:], leaving[0])
        else:
            leaving_channels, grid = _grid(leaving[0], channels)
        stride = (_stride(size[0], grid[0]), _stride(size[1], grid[1]))
        channels_in = entering[2] if last else entering[0]
        super().__init__(channels_in, leaving_channels, stride, stride=stride, bias=False, dtype=dtype)
        self.last, self.grid, self.flat = last, grid, len(leaving) == 1

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, *entering] to [n, *leaving]."""
        x = super().forward(x.permute(0, 3, 1, 2) if self.last else x)
        if tuple(x.shape[-2:]) != tuple(self.grid):
            x = nn.functional.adaptive_avg_pool2d(x, self.grid)
        if self.flat:
            return x.flatten(1)
        return x.permute(0, 2, 3, 1).contiguous() if self.last else x


def _grid(items: int, channels: int) -> tuple[int, tuple[int, int]]:
    """Channels and square grid of maps that hold ``items`` values; one value each where the channels do not divide them so."""
    side = math.isqrt(items // channels)
    return (channels, (side, side)) if side and side * side * channels == items else (items, (1, 1))


def _stride(before: int, after: int) -> int:
    """The stride of the convolution: the ratio of the sizes.

    Where a single value is left, pooling completes what leads to a small grid, with a stride of 2 at least.
    """
    return max(1, before // after) if after > 1 else min(before, max(2, before // _GRID))


class PooledProxy(nn.Linear):
    """One linear map from maps, pooled to a small grid, to a vector."""

    def __init__(self, entering: tuple[int, ...], features: int, *, dtype: torch.dtype) -> None:
        """``entering``: shape for one sample. ``features``: of the vector."""
        last = channels_last(entering)
        size, channels = (entering[:2], entering[2]) if last else (entering[1:], entering[0])
        grid = min(_GRID, size[0]), min(_GRID, size[1])
        super().__init__(channels * grid[0] * grid[1], features, dtype=dtype)
        self.last, self.grid = last, grid

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, *entering] to [n, features]."""
        x = nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2) if self.last else x, self.grid)
        return super().forward(x.flatten(1))


class SequenceProxy(nn.Linear):
    """One linear map of each element of a sequence; to one vector, of the elements' mean."""

    def __init__(self, features: int, leaving: tuple[int, ...], *, dtype: torch.dtype) -> None:
        """``features``: of an element. ``leaving``: shape for one sample."""
        super().__init__(features, leaving[-1], dtype=dtype)
        self.pooled = len(leaving) == 1

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, length, features] to [n, length, leaving] or [n, leaving]."""
        return super().forward(x.mean(dim=1) if self.pooled else x)
