"""Generated data: each device's samples are drawn from its own seed at each use, so 10,000 devices need no memory.

Classification: ``x = signal * prototype[y] + noise``, with one prototype for each class, all standard normal. Without
classes, a linear regression: ``y = signal * <x, prototype> / sqrt(size) + noise`` with ``y[sample, 1]``.
"""

import hashlib
import math
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from ..seeds import derive
from ..spec import Count, CountOrZero, NonNegative
from .types import Indices, Samples


class SyntheticOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keyword arguments of ``synthetic``.

    ``shape``: of one sample. ``classes``: None for a regression. ``signal``: 0 means that there is nothing to learn.
    """

    shape: tuple[Count, ...] = (1, 8, 8)
    classes: Count | None = 10
    samples_per_device: Count = 32
    test_samples: CountOrZero = 1000
    signal: NonNegative = 1.0


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A ``devices.Shares`` whose samples follow from seeds alone."""

    options: SyntheticOptions
    num_devices: int
    seed: int

    def count(self, device: int) -> int:
        """Number of samples of a device."""
        return self.options.samples_per_device

    def take(self, device: int, positions: Indices) -> Samples:
        """Draw a device's samples and return those at these positions."""
        return self._draw(self.options.samples_per_device, derive(self.seed, "synthetic", device)).take(positions)

    def fingerprint(self) -> bytes:
        """All settings that determine the samples."""
        return msgspec.json.encode([self.options, self.num_devices, self.seed])

    def content(self) -> str:
        """Hash of the fingerprint."""
        return hashlib.blake2b(self.fingerprint(), digest_size=16).hexdigest()

    def server_test(self) -> Samples | None:
        """Samples that no device has."""
        if not self.options.test_samples:
            return None
        return self._draw(self.options.test_samples, derive(self.seed, "synthetic", "test"))

    def _draw(self, count: int, seed: int) -> Samples:
        """``count`` samples from one seed."""
        options = self.options
        size, classes = math.prod(options.shape), options.classes
        prototypes = np.random.default_rng(derive(self.seed, "synthetic", "prototypes")).standard_normal(
            (classes or 1, size), dtype=np.float32
        )
        generator = np.random.default_rng(seed)
        if classes is None:
            x = generator.standard_normal((count, size), dtype=np.float32)
            noise = generator.standard_normal((count, 1), dtype=np.float32)
            y = (options.signal / math.sqrt(size)) * (x * prototypes).sum(axis=1, keepdims=True) + noise
            targets = torch.from_numpy(y.astype(np.float32))
        else:
            labels = generator.integers(classes, size=count)
            x = generator.standard_normal((count, size), dtype=np.float32)
            x += options.signal * prototypes[labels]
            targets = torch.from_numpy(labels)
        return Samples(torch.from_numpy(x.reshape(count, *options.shape)), targets)
