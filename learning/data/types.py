"""Types of training data: samples, pools of samples, and the data of all devices. A user's own loader returns these.

Nothing here assumes images or classes: ``x`` may be ``(N, T, F)`` floats and ``y`` floats. The first dimension is always
the sample. Data are kept in their compact form (images as bytes); a transform converts each batch to the model's input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.intp]

# (batch of x, generator) -> batch of x. Random transforms draw from the generator alone.
Transform = Callable[[Tensor, torch.Generator], Tensor]


class Source(Protocol):
    """Samples that can be taken by position: a ``Samples`` in memory, or arrays mapped from a file."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def take(self, indices: Indices) -> "Samples":
        """A copy of the samples at these positions, in this order."""
        ...

    def targets(self) -> NDArray[Any]:
        """All targets, ``[sample, ...]``."""
        ...


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs ``x[sample, ...]`` and targets ``y[sample, ...]``.

    Raises ``ValueError`` if their lengths differ, or if one is not a torch tensor.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        """Raise ``ValueError`` unless both are tensors of equal length."""
        for name, value in (("x", self.x), ("y", self.y)):
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"data: {name} of Samples is a {_kind(value)}; it must be a torch.Tensor (torch.as_tensor)"
                )
        if self.x.dim() == 0 or self.y.dim() == 0 or len(self.x) != len(self.y):
            raise ValueError(
                f"data: x has shape {tuple(self.x.shape)} and y {tuple(self.y.shape)}; "
                "the first dimension of both must be the number of samples"
            )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.x)

    def take(self, indices: Indices) -> "Samples":
        """A copy of the samples at these positions, in this order."""
        positions = torch.as_tensor(indices, dtype=torch.int64)
        return Samples(self.x[positions], self.y[positions])

    def targets(self) -> NDArray[Any]:
        """All targets."""
        return self.y.numpy()


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplePool:
    """Samples before their partition over devices, as a loader returns them.

    Attributes:
        train: training samples.
        test: the server's test samples.
        groups: natural group of each training sample (its writer, its user), for ``partition: {name: groups}``.
        owners: device number of each training sample, if the data define the partition themselves.
        num_classes: None means one more than the largest label, or no classes if targets are not one integer each.
        mean, std: one for each channel on the scale 0..1; the normalisation used if the experiment lists no transform.
        skipped: number of files that could not be read.
        digest: hash of the content, if it is known.

    Raises ``ValueError`` if ``train`` or ``test`` is not a source of samples, or if ``groups`` or ``owners`` do not fit the
    training samples.
    """

    train: Source
    test: Source | None = None
    groups: Tensor | None = None
    owners: Indices | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    skipped: int = 0
    digest: str = ""

    def __post_init__(self) -> None:
        """Check the sources, groups and owners."""
        for name, source in (("train", self.train), ("test", self.test)):
            missing = [word for word in ("__len__", "take", "targets") if not callable(getattr(source, word, None))]
            if missing and not (name == "test" and source is None):
                raise ValueError(
                    f"data: {name} of SamplePool is a {_kind(source)}, which has no {missing[0]}; it must be Samples, or "
                    "an object with __len__, take and targets"
                )
        if self.groups is not None and not isinstance(self.groups, Tensor):
            raise ValueError(f"data: groups of SamplePool is a {_kind(self.groups)}; it must be a torch.Tensor")
        if self.owners is not None and not isinstance(self.owners, np.ndarray):
            raise ValueError(f"data: owners of SamplePool is a {_kind(self.owners)}; it must be a numpy.ndarray")
        for name, values in (("groups", self.groups), ("owners", self.owners)):
            if values is not None and values.shape != (len(self.train),):
                raise ValueError(
                    f"data: {name} has shape {tuple(values.shape)} for {len(self.train)} training samples; "
                    "it needs one number for each"
                )


@runtime_checkable
class FederatedData(Protocol):
    """The data of all devices. ``train``, ``test`` and ``server_test`` return copies: keep what is used twice.

    ``num_classes``: None if the task is not classification. ``skipped``: number of corrupt files that were left out.
    """

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if the task is not classification."""
        ...

    @property
    def train_transform(self) -> Transform:
        """Applied to each batch before training."""
        ...

    @property
    def test_transform(self) -> Transform:
        """Applied to each batch before evaluation."""
        ...

    @property
    def skipped(self) -> int:
        """Number of corrupt files that were left out."""
        ...

    def num_samples(self, device: int) -> int:
        """Number of training samples of a device, without loading them."""
        ...

    def train(self, device: int) -> Samples:
        """A device's training samples."""
        ...

    def test(self, device: int) -> Samples | None:
        """A device's own held-out samples, if it has any."""
        ...

    def server_test(self) -> Samples | None:
        """The server's test samples, if it has any."""
        ...

    def digest(self) -> dict[str, str]:
        """Hashes of the data's content (``data``) and of its partition (``split``)."""
        ...


def _kind(value: Any) -> str:
    """Name of a value's type, with its module."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
