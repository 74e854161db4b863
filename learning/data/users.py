"""The user's own data: ``module:function``, called ``function(num_devices=..., seed=..., root=..., **kwargs)``.

It returns a ``Pool`` of samples, which is dealt to the devices like a built-in set, or a ``FederatedData`` of its own, which
already knows who owns what.
"""

import inspect
from dataclasses import dataclass

from ..resolve import resolve
from .config import DataConfig, Iid
from .transforms import build
from .types import FederatedData, Pool, Samples, Transform


@dataclass(frozen=True, kw_only=True, eq=False)
class Configured:
    """A user's own ``FederatedData``, with what the experiment says about transforms and the server's data."""

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
        return self.inner.num_samples(device)

    def train(self, device: int) -> Samples:
        """A device's training samples."""
        return self.inner.train(device)

    def test(self, device: int) -> Samples | None:
        """A device's own held-out samples."""
        return self.inner.test(device)

    def server_test(self) -> Samples | None:
        """The server's test samples, unless the run does without."""
        return self.inner.server_test() if self.with_server_test else None

    def digest(self) -> dict[str, str]:
        """Hashes of content and split."""
        return self.inner.digest()


def call_users(config: DataConfig, *, num_devices: int, seed: int) -> Pool | FederatedData:
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
    if not isinstance(result, (Pool, FederatedData)):
        raise ValueError(
            f"data.name: {config.name!r} returned {type(result).__name__}; it must return a Pool or a FederatedData "
            "(learning.data.types) with all of its members"
        )
    return result


def configure(data: FederatedData, config: DataConfig, *, num_devices: int) -> FederatedData:
    """A user's ``FederatedData`` under the experiment's settings. Raises ``ValueError`` for those that cannot apply."""
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
    return Configured(
        inner=data,
        train_transform=build(train, field="data.train_transforms") if train else data.train_transform,
        test_transform=build(test, field="data.test_transforms") if test else data.test_transform,
        with_server_test=config.server_test,
    )


def refuse_partition(config: DataConfig) -> None:
    """Data that say themselves who owns what are not partitioned. Raises ``ValueError`` when that is asked for."""
    if not isinstance(config.partition, Iid):
        name = type(config.partition).__struct_config__.tag
        raise ValueError(
            f"data.partition.name is {name!r}, but {config.name!r} says itself which device owns what; leave it out"
        )
