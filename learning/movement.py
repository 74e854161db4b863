"""Effective movement of a block: whether its weights still go somewhere, or oscillate around a point.

Let u be the change of a scalar from one version of the global model to the next. Over a window of H versions

    EM = sum over the scalars of |sum of u| / sum over the scalars of the sum of |u|        0 <= EM <= 1

is 1 where every scalar keeps its direction, and falls to 1 / sqrt(H) where the changes are independent noise: that is the noise
floor of the window, not 0. (ProFL, arXiv 2404.13349, freezes blocks by this quantity; its formula is known to us only through
the same family of methods, APF, Chen et al., ICDCS 2021, whose running means are used here.) H copies of all changes would take
H times the block's memory. So both sums are exponential means with decay a = (H - 1) / (H + 1)::

    E <- a E + (1 - a) u        A <- a A + (1 - a) |u|        EM = sum |E| / sum A

whose ratio has the same noise floor: the variance of E is (1 - a) / (1 + a) = 1 / H of that of u. Changes that alternate give
1 / H, where a window of even length gives 0. Both means begin at 0, and their ratio needs no correction for it.
"""

import math
from collections.abc import Iterable, MutableMapping

import torch
from torch import Tensor


def noise_floor(window: int) -> float:
    """The effective movement of independent noise."""
    return 1 / math.sqrt(window)


def move(means: MutableMapping[str, Tensor], changes: Iterable[tuple[str, Tensor]], *, window: int) -> float | None:
    """Add the changes of one version to the running means; returns the effective movement, None if nothing ever moved.

    ``means``: two tensors for each changed one, ``net/NAME`` and ``path/NAME``; missing ones are added. ``changes``: by name,
    in float32 or wider.
    """
    decay = (window - 1) / (window + 1)
    net = path = 0.0
    for name, change in changes:
        if f"net/{name}" not in means:
            means[f"net/{name}"], means[f"path/{name}"] = torch.zeros_like(change), torch.zeros_like(change)
        mean, length = means[f"net/{name}"], means[f"path/{name}"]
        mean.mul_(decay).add_(change, alpha=1 - decay)
        length.mul_(decay).add_(change.abs(), alpha=1 - decay)
        net += float(mean.abs().sum(dtype=torch.float64))
        path += float(length.sum(dtype=torch.float64))
    return net / path if path > 0 else None
