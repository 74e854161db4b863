"""From a name in the configuration to every device's samples.

load(config, num_devices, seed)
    built-in name or module:function -> a Pool of samples -> partition -> shares -> FederatedData
    synthetic                        ------------------------------------> shares -> FederatedData
    a user's own FederatedData       ----------------------------------------------> FederatedData
"""

from typing import TypeVar

import msgspec
import numpy as np

from ..seeds import derive
from .config import DataConfig
from .devices import DeviceData, PoolShares, Shares
from .digits import load_digits
from .folder import FolderOptions, load_folder
from .partition import Integers, split
from .synthetic import Synthetic, SyntheticOptions
from .transforms import build
from .types import FederatedData, Pool, Source
from .users import call_users, configure, refuse_partition
from .vision import SETS, load_vision

Options = TypeVar("Options")


class _NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For data sets that take no keywords."""


def names() -> dict[str, str]:
    """Built-in data sets, with one line about each."""
    return {
        "digits": "handwritten digits, 8 x 8 grey, 1,437 + 360 (comes with scikit-learn; no download)",
        **{name: f"{wanted.title} (torchvision; data.root or data.download)" for name, wanted in SETS.items()},
        "folder": "image folders <root>/<device>/<class>/ or <root>/<class>/, with data.classes",
        "synthetic": "generated from each device's seed on demand: any shape, any number of devices",
    }


def load(config: DataConfig, *, num_devices: int, seed: int) -> FederatedData:
    """Everybody's data. The same configuration, number of devices and seed give the same samples everywhere.

    Raises ``ValueError`` for an unknown name, files that are missing, or a partition that does not fit the data.
    """
    if config.classes is not None and config.name != "folder":
        raise ValueError(f"data.classes is for the image folders of 'folder', not for {config.name!r}; leave it out")
    if config.name == "synthetic":
        refuse_partition(config)
        options = _options(config, SyntheticOptions)
        generated = Synthetic(options=options, num_devices=num_devices, seed=seed)
        return _device_data(generated, config, seed=seed, num_classes=options.classes)
    if ":" in config.name:
        result = call_users(config, num_devices=num_devices, seed=seed)
        if not isinstance(result, Pool):
            return configure(result, config, num_devices=num_devices)
        return _dealt(result, config, num_devices=num_devices, seed=seed)
    return _dealt(_built_in(config, num_devices=num_devices), config, num_devices=num_devices, seed=seed)


def _built_in(config: DataConfig, *, num_devices: int) -> Pool:
    """The pool of a built-in data set."""
    if config.name == "folder":
        return load_folder(config, _options(config, FolderOptions), num_devices=num_devices)
    if config.name not in names():
        raise ValueError(f"data.name is {config.name!r}; allowed: {', '.join(names())}, or module:function")
    _options(config, _NoOptions)
    return load_digits() if config.name == "digits" else load_vision(config)


def _options(config: DataConfig, kind: type[Options]) -> Options:
    """The data set's keywords, checked."""
    known = getattr(kind, "__struct_fields__", ())
    if unknown := [key for key in config.kwargs if key not in known]:
        allowed = ", ".join(known) or "none"
        raise ValueError(
            f"data.kwargs: the keywords of {config.name!r} do not fit: `{unknown[0]}` is unknown; allowed: {allowed}"
        )
    try:
        return msgspec.convert(config.kwargs, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"data.kwargs: the keywords of {config.name!r} do not fit: {error}") from None


def _dealt(pool: Pool, config: DataConfig, *, num_devices: int, seed: int) -> FederatedData:
    """A pool, dealt to the devices."""
    labels = _labels(pool.train)
    if pool.owners is not None:
        refuse_partition(config)
        if set(np.unique(pool.owners).tolist()) != set(range(num_devices)):
            raise ValueError(
                f"data.name: in {config.name!r} samples belong to {len(np.unique(pool.owners))} devices, and the fleet has "
                f"{num_devices}; owners must be 0 to {num_devices - 1}, each of at least one sample"
            )
        owned = [np.flatnonzero(pool.owners == device) for device in range(num_devices)]
    else:
        owned = split(
            config.partition,
            num_samples=len(pool.train),
            num_devices=num_devices,
            seed=derive(seed, "partition"),
            labels=labels,
            groups=None if pool.groups is None else pool.groups.numpy(),
        )
    num_classes = pool.num_classes
    if num_classes is None and labels is not None:
        highest = [
            int(found.max()) for part in (pool.train, pool.test) if part and (found := _labels(part)) is not None
        ]
        num_classes = max(highest) + 1
    return _device_data(PoolShares(pool, owned), config, seed=seed, num_classes=num_classes, pool=pool)


def _device_data(
    shares: Shares, config: DataConfig, *, seed: int, num_classes: int | None, pool: Pool | None = None
) -> FederatedData:
    """Shares, with the experiment's transforms and test share."""
    mean, std = (pool.mean, pool.std) if pool else ((), ())
    return DeviceData(
        shares=shares,
        num_classes=num_classes,
        train_transform=build(config.train_transforms, field="data.train_transforms", mean=mean, std=std),
        test_transform=build(config.test_transforms, field="data.test_transforms", mean=mean, std=std),
        with_server_test=config.server_test,
        test_share=config.test_share,
        seed=seed,
        skipped=pool.skipped if pool else 0,
    )


def _labels(source: Source) -> Integers | None:
    """One class for each sample; None where targets are anything else."""
    targets = source.targets()
    return targets if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer) else None
