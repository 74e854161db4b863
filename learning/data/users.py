"""The user's own data: ``module:function``, called ``function(num_devices=..., seed=..., root=..., **kwargs)``.

It returns a ``SamplePool``, which is dealt to the devices like a built-in set, or a ``FederatedData`` of its own, which already
knows who owns what.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..resolve import resolve, told
from .config import DataConfig, Iid
from .transforms import build
from .types import FederatedData, SamplePool, Samples, Transform


@dataclass(frozen=True, kw_only=True, eq=False)
class Configured:
    """A user's own ``FederatedData``, with what the experiment says about transforms and the server's data.

    What its members raise, or return by mistake, is a ``ValueError`` that names the member and the device.
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
        """Number of classes, if there are any."""
        return self.inner.num_classes

    @property
    def skipped(self) -> int:
        """Corrupt files that were left out."""
        return self.inner.skipped

    def num_samples(self, device: int) -> int:
        """Training samples of a device."""
        count = self._ask("num_samples", device)
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            raise ValueError(f"{self._told('num_samples', device)} is {count!r}; it must be a whole number from 0")
        return int(count)

    def train(self, device: int) -> Samples:
        """A device's training samples."""
        samples, expected = self._ask("train", device), self.num_samples(device)
        if not isinstance(samples, Samples):
            raise ValueError(f"{self._told('train', device)} is a {type(samples).__name__}; it must be Samples")
        if len(samples) != expected:
            raise ValueError(
                f"{self._told('train', device)} has {len(samples)} samples, where num_samples says {expected}"
            )
        return samples

    def test(self, device: int) -> Samples | None:
        """A device's own held-out samples."""
        return self._held_out("test", device)

    def server_test(self) -> Samples | None:
        """The server's test samples, unless the run does without."""
        return self._held_out("server_test") if self.with_server_test else None

    def digest(self) -> dict[str, str]:
        """Hashes of content and split."""
        found = self._ask("digest")
        if not isinstance(found, dict) or not {"data", "split"} <= found.keys():
            raise ValueError(f"{self._told('digest')} is {found!r}; it must be a mapping with the keys data and split")
        return found

    def _held_out(self, member: str, *device: int) -> Samples | None:
        """Test samples, or None."""
        samples = self._ask(member, *device)
        if samples is not None and not isinstance(samples, Samples):
            raise ValueError(
                f"{self._told(member, *device)} is a {type(samples).__name__}; it must be Samples, or None"
            )
        return samples

    def _ask(self, member: str, *device: int) -> Any:
        """What a member of the user's object returns."""
        try:
            return getattr(self.inner, member)(*device)
        except MemoryError:
            raise
        except Exception as error:  # of a user's code: anything
            raise ValueError(f"{self._told(member, *device)} fails: {told(error)}") from error

    def _told(self, member: str, *device: int) -> str:
        """A member and its device, as errors name it."""
        return f"data.name: {member}({', '.join(map(str, device))}) of {self.name!r}"


def call_users(config: DataConfig, *, num_devices: int, seed: int) -> SamplePool | FederatedData:
    """Call the function that ``data.name`` says.

    Raises ``ValueError`` when it cannot be found, does not take the keywords, or returns neither of the two.
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
            f"data.name: {config.name!r} returned {type(result).__name__}; it must return a Pool or a FederatedData "
            "(learning.data.types) with all of its members"
        )
    return result


def configure(data: FederatedData, config: DataConfig, *, num_devices: int) -> FederatedData:
    """A user's ``FederatedData`` under the experiment's settings.

    Raises ``ValueError`` for settings that cannot apply, and for data that does not know some device of the fleet.
    """
    if data.num_devices != num_devices:
        raise ValueError(
            f"data.name: {config.name!r} made data for {data.num_devices} devices; the fleet has {num_devices}"
        )
    refuse_partition(config)
    if config.test_share:
        raise ValueError(
            f"data.test_share is {config.test_share:g}, but {config.name!r} decides itself what devices test on"
        )
    train, test = config.train_transforms, config.test_transforms
    configured = Configured(
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
    """Data that say themselves who owns what are not partitioned. Raises ``ValueError`` when that is asked for."""
    if not isinstance(config.partition, Iid):
        name = type(config.partition).__struct_config__.tag
        raise ValueError(
            f"data.partition.name is {name!r}, but {config.name!r} says itself which device owns what; leave it out"
        )
