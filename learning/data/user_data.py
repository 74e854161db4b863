"""A user's own data: ``module:function``, called ``function(num_devices=..., seed=..., root=..., **kwargs)``.

It returns a ``SamplePool``, which is partitioned over the devices like a built-in set, or a ``FederatedData`` of its own, which
is partitioned already.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..resolve import error_line, resolve
from .config import DataConfig, Iid
from .transforms import build
from .types import FederatedData, SamplePool, Samples, Transform


@dataclass(frozen=True, kw_only=True, eq=False)
class ConfiguredData:
    """A user's own ``FederatedData``, with the experiment's settings for transforms and the server's data.

    An exception or a wrong return value of its members becomes a ``ValueError`` that names the member and the device.
    """

    name: str
    inner: FederatedData
    train_transform: Transform
    test_transform: Transform
    with_server_test: bool

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return self.inner.num_devices

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if the task is not classification."""
        return self.inner.num_classes

    @property
    def skipped(self) -> int:
        """Number of corrupt files that were left out."""
        return self.inner.skipped

    def num_samples(self, device: int) -> int:
        """Number of training samples of a device."""
        count = self._call("num_samples", device)
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            raise ValueError(f"{self._label('num_samples', device)} is {count!r}; it must be a whole number from 0")
        return int(count)

    def train(self, device: int) -> Samples:
        """A device's training samples."""
        samples, expected = self._call("train", device), self.num_samples(device)
        if not isinstance(samples, Samples):
            raise ValueError(f"{self._label('train', device)} is a {type(samples).__name__}; it must be Samples")
        if len(samples) != expected:
            raise ValueError(
                f"{self._label('train', device)} has {len(samples)} samples, where num_samples says {expected}"
            )
        return samples

    def test(self, device: int) -> Samples | None:
        """A device's own held-out samples."""
        return self._held_out("test", device)

    def server_test(self) -> Samples | None:
        """The server's test samples; None if the run has no server data."""
        return self._held_out("server_test") if self.with_server_test else None

    def digest(self) -> dict[str, str]:
        """Hashes of content and partition."""
        digest = self._call("digest")
        if not isinstance(digest, dict) or not {"data", "split"} <= digest.keys():
            raise ValueError(
                f"{self._label('digest')} is {digest!r}; it must be a mapping with the keys data and split"
            )
        return digest

    def _held_out(self, member: str, *device: int) -> Samples | None:
        """Test samples of a device or of the server, or None."""
        samples = self._call(member, *device)
        if samples is not None and not isinstance(samples, Samples):
            raise ValueError(
                f"{self._label(member, *device)} is a {type(samples).__name__}; it must be Samples, or None"
            )
        return samples

    def _call(self, member: str, *device: int) -> Any:
        """Call a member of the user's object."""
        try:
            return getattr(self.inner, member)(*device)
        except MemoryError:
            raise
        except Exception as error:  # a user's code may raise anything
            raise ValueError(f"{self._label(member, *device)} fails: {error_line(error)}") from error

    def _label(self, member: str, *device: int) -> str:
        """A member and its device, for errors."""
        return f"data.name: {member}({', '.join(map(str, device))}) of {self.name!r}"


def call_user_function(config: DataConfig, *, num_devices: int, seed: int) -> SamplePool | FederatedData:
    """Call the function that ``data.name`` names.

    Raises ``ValueError`` if it cannot be imported, does not accept the keyword arguments, or returns anything else.
    """
    function = resolve(config.name, what="data.name")
    arguments = {"num_devices": num_devices, "seed": seed, "root": config.root}
    if clash := sorted(arguments.keys() & config.kwargs.keys()):
        raise ValueError(f"data.kwargs has {clash[0]!r}, which the runtime itself passes to {config.name!r}")
    try:
        inspect.signature(function).bind(**arguments, **config.kwargs)
    except TypeError as error:
        raise ValueError(
            f"data.kwargs: {config.name!r} is called with num_devices, seed, root and the keywords, but: {error}"
        ) from None
    result = function(**arguments, **config.kwargs)
    if not isinstance(result, (SamplePool, FederatedData)):
        raise ValueError(
            f"data.name: {config.name!r} returned {type(result).__name__}; it must return a SamplePool or a FederatedData "
            "(learning.data.types) with all of its members"
        )
    return result


def configure(data: FederatedData, config: DataConfig, *, num_devices: int) -> FederatedData:
    """Apply the experiment's settings to a user's ``FederatedData``.

    Raises ``ValueError`` for settings that do not apply, and for data of another number of devices than the fleet's.
    """
    if data.num_devices != num_devices:
        raise ValueError(
            f"data.name: {config.name!r} made data for {data.num_devices} devices; the fleet has {num_devices}"
        )
    refuse_partition(config)
    if config.test_share:
        raise ValueError(
            f"data.test_share is {config.test_share:g}, but {config.name!r} defines the devices' test samples itself"
        )
    train, test = config.train_transforms, config.test_transforms
    configured = ConfiguredData(
        name=config.name,
        inner=data,
        train_transform=build(train, field="data.train_transforms") if train else data.train_transform,
        test_transform=build(test, field="data.test_transforms") if test else data.test_transform,
        with_server_test=config.server_test,
    )
    for device in range(num_devices):
        configured.num_samples(device)
    return configured


def refuse_partition(config: DataConfig) -> None:
    """Raise ``ValueError`` if a partition is configured: data that define their owners are not partitioned."""
    if not isinstance(config.partition, Iid):
        name = type(config.partition).__struct_config__.tag
        raise ValueError(
            f"data.partition.name is {name!r}, but {config.name!r} defines the owner of each sample itself; leave it out"
        )
