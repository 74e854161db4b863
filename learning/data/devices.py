"""The data of each device: its share of the samples, of which a part can be held out as its own test set."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import xxhash

from ..seeds import derive
from .partition import Owned
from .types import Indices, SamplePool, Samples, Transform


class Shares(Protocol):
    """The samples of each device, before any are held out for testing."""

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        ...

    def count(self, device: int) -> int:
        """Number of samples of a device, without loading them."""
        ...

    def take(self, device: int, positions: Indices) -> Samples:
        """A device's samples at these positions of its share."""
        ...

    def server_test(self) -> Samples | None:
        """Samples that no device has."""
        ...

    def content(self) -> str:
        """Hash of the samples."""
        ...

    def fingerprint(self) -> bytes:
        """Bytes that identify the partition."""
        ...


@dataclass(frozen=True, eq=False)
class PoolShares:
    """A partitioned pool of samples: ``owned[device]`` are positions in its training samples."""

    pool: SamplePool
    owned: Owned

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return len(self.owned)

    def count(self, device: int) -> int:
        """Number of samples of a device."""
        return len(self.owned[device])

    def take(self, device: int, positions: Indices) -> Samples:
        """A device's samples at these positions of its share."""
        return self.pool.train.take(self.owned[device][positions])

    def server_test(self) -> Samples | None:
        """The pool's test samples."""
        test = self.pool.test
        return test.take(np.arange(len(test))) if test else None

    def content(self) -> str:
        """Hash of the samples: the pool's own, or else computed over 1024 samples at a time."""
        if self.pool.digest:
            return self.pool.digest
        state = xxhash.xxh3_128()
        for part in filter(None, (self.pool.train, self.pool.test)):
            for start in range(0, len(part), 1024):
                samples = part.take(np.arange(start, min(start + 1024, len(part))))
                for tensor in (samples.x, samples.y):
                    state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                    state.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return state.hexdigest()

    def fingerprint(self) -> bytes:
        """Hash of the number of samples and the positions of each device."""
        state = xxhash.xxh3_128(np.array([len(positions) for positions in self.owned], dtype=np.int64).tobytes())
        for positions in self.owned:
            state.update(positions.astype(np.int64).tobytes())
        return state.digest()


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceData:
    """A ``FederatedData`` over shares.

    ``test_share``: share of each device's samples (rounded) that is its own test set, drawn from ``seed``; at least one sample
    is left for training. ``with_server_test``: false means that the server has no samples.
    """

    shares: Shares
    num_classes: int | None
    train_transform: Transform
    test_transform: Transform
    with_server_test: bool
    test_share: float
    seed: int
    skipped: int = 0

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return self.shares.num_devices

    def num_samples(self, device: int) -> int:
        """Number of training samples of a device."""
        return self.shares.count(device) - self._num_held_out(device)

    def train(self, device: int) -> Samples:
        """A device's training samples."""
        return self.shares.take(device, self._order(device)[self._num_held_out(device) :])

    def test(self, device: int) -> Samples | None:
        """A device's own held-out samples."""
        held_out = self._num_held_out(device)
        return self.shares.take(device, self._order(device)[:held_out]) if held_out else None

    def server_test(self) -> Samples | None:
        """The server's test samples."""
        return self.shares.server_test() if self.with_server_test else None

    def digest(self) -> dict[str, str]:
        """Hashes of content and split."""
        text = f"{self.test_share}/{self.seed if self.test_share else ''}/".encode()
        split = hashlib.blake2b(text + self.shares.fingerprint(), digest_size=16).hexdigest()
        return {"data": self.shares.content(), "split": split}

    def _num_held_out(self, device: int) -> int:
        """Number of a device's samples that are held out for testing."""
        count = self.shares.count(device)
        return min(int(count * self.test_share + 0.5), count - 1)

    def _order(self, device: int) -> Indices:
        """Positions in a device's share, starting with those held out."""
        count = self.shares.count(device)
        if not self.test_share:
            return np.arange(count)
        held_out = self._num_held_out(device)
        order = np.random.default_rng(derive(self.seed, "test_share", device)).permutation(count)
        return np.concatenate([np.sort(order[:held_out]), np.sort(order[held_out:])])
