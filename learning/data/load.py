"""Loads the data set that the configuration names, and partitions it over the devices.

load(config, num_devices, seed)
    built-in name or module:function -> SamplePool -> partition -> Shares -> FederatedData
    synthetic                        ----------------------------> Shares -> FederatedData
    a user's own FederatedData       --------------------------------------> FederatedData

load_public(config, num_devices, seed): the pool's public share, as the data of one device
"""

from typing import TypeVar

import msgspec
import numpy as np

from ..seeds import derive
from .config import DataConfig
from .devices import DeviceData, PoolShares, Shares
from .folder import FolderOptions, load_folder
from .partition import Integers, Owned, public_and_rest, refuse_public, split
from .synthetic import Synthetic, SyntheticOptions
from .transforms import build
from .types import FederatedData, Indices, SamplePool, Source
from .user_data import call_user_function, configure, refuse_partition
from .vision import SETS, load_digits, load_vision

Options = TypeVar("Options")


class _NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of data sets without keyword arguments."""


def names() -> dict[str, str]:
    """Built-in data sets, with a one-line description of each."""
    return {
        "digits": "handwritten digits, 8 x 8 grey, 1,437 + 360 (comes with scikit-learn; no download)",
        **{name: f"{vision_set.title} (torchvision; data.root or data.download)" for name, vision_set in SETS.items()},
        "folder": "image folders <root>/<device>/<class>/ or <root>/<class>/, with data.classes",
        "synthetic": "generated from each device's seed on demand: any shape, any number of devices",
    }


def load(config: DataConfig, *, num_devices: int, seed: int) -> FederatedData:
    """Load the data of all devices. Equal configuration, number of devices and seed give equal samples in every process.

    Raises ``ValueError`` for an unknown name, missing files, or a partition that does not fit the data.
    """
    source = _load_source(config, num_devices=num_devices, seed=seed)
    if isinstance(source, SamplePool):
        return _partitioned(source, config, num_devices=num_devices, seed=seed)
    refuse_public(config)
    return source


def load_public(config: DataConfig, *, num_devices: int, seed: int) -> FederatedData:
    """Load the public share of the data (``data.public_share``) as the data of one device, with the server's test samples.

    Raises ``ValueError`` as ``load`` does, and for data without a public share.
    """
    pool = _load_source(config, num_devices=num_devices, seed=seed)
    if not isinstance(pool, SamplePool):
        refuse_public(config)
    if not isinstance(pool, SamplePool) or not config.public_share:
        raise ValueError("data.public_share is 0; it must be above 0 for a public share")
    public, _ = public_and_rest(len(pool.train), config)
    config = msgspec.structs.replace(config, test_share=0.0)
    return _device_data(PoolShares(pool, [public]), config, seed=seed, num_classes=_num_classes(pool), pool=pool)


def _load_source(config: DataConfig, *, num_devices: int, seed: int) -> SamplePool | FederatedData:
    """Load a pool of samples, or data that are partitioned already."""
    if config.classes is not None and config.name != "folder":
        raise ValueError(f"data.classes is for the image folders of 'folder', not for {config.name!r}; leave it out")
    if config.name == "synthetic":
        refuse_partition(config)
        options = _options(config, SyntheticOptions)
        generated = Synthetic(options=options, num_devices=num_devices, seed=seed)
        return _device_data(generated, config, seed=seed, num_classes=options.classes)
    if ":" in config.name:
        result = call_user_function(config, num_devices=num_devices, seed=seed)
        return result if isinstance(result, SamplePool) else configure(result, config, num_devices=num_devices)
    return _built_in(config, num_devices=num_devices)


def _built_in(config: DataConfig, *, num_devices: int) -> SamplePool:
    """The pool of a built-in data set."""
    if config.name == "folder":
        return load_folder(config, _options(config, FolderOptions), num_devices=num_devices)
    if config.name not in names():
        raise ValueError(f"data.name is {config.name!r}; allowed: {', '.join(names())}, or module:function")
    _options(config, _NoOptions)
    return load_digits() if config.name == "digits" else load_vision(config)


def _options(config: DataConfig, kind: type[Options]) -> Options:
    """Check the keyword arguments of a data set, and convert them."""
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


def _partitioned(pool: SamplePool, config: DataConfig, *, num_devices: int, seed: int) -> FederatedData:
    """Partition a pool, without its public share, over the devices."""
    _, private = public_and_rest(len(pool.train), config)
    if pool.owners is not None:
        owned = _by_owner(pool.owners, private, config, num_devices=num_devices)
    else:
        labels = _labels(pool.train)
        owned = split(
            config.partition,
            num_samples=len(private),
            num_devices=num_devices,
            seed=derive(seed, "partition"),
            labels=None if labels is None else labels[private],
            groups=None if pool.groups is None else pool.groups.numpy()[private],
        )
        owned = [private[positions] for positions in owned]
    return _device_data(PoolShares(pool, owned), config, seed=seed, num_classes=_num_classes(pool), pool=pool)


def _by_owner(owners: Indices, private: Indices, config: DataConfig, *, num_devices: int) -> Owned:
    """The samples of ``private`` that belong to each device, by the owners that the data declare."""
    refuse_partition(config)
    if set(np.unique(owners).tolist()) != set(range(num_devices)):
        raise ValueError(
            f"data.name: in {config.name!r} samples belong to {len(np.unique(owners))} devices, and the fleet has "
            f"{num_devices}; owners must be 0 to {num_devices - 1}, each of at least one sample"
        )
    owned = [private[owners[private] == device] for device in range(num_devices)]
    if empty := [device for device, positions in enumerate(owned) if not len(positions)]:
        raise ValueError(f"data.public_share is {config.public_share:g}, which leaves device {empty[0]} no sample")
    return owned


def _num_classes(pool: SamplePool) -> int | None:
    """The pool's number of classes, or else one more than its largest label."""
    if pool.num_classes is not None or _labels(pool.train) is None:
        return pool.num_classes
    highest = [int(labels.max()) for part in (pool.train, pool.test) if part and (labels := _labels(part)) is not None]
    return max(highest) + 1


def _device_data(
    shares: Shares, config: DataConfig, *, seed: int, num_classes: int | None, pool: SamplePool | None = None
) -> FederatedData:
    """Combine shares with the experiment's transforms and test share."""
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
    """The targets, if they are one integer for each sample; else None."""
    targets = source.targets()
    if not isinstance(targets, np.ndarray):
        raise ValueError(
            f"data: targets() of {type(source).__name__} is a {type(targets).__name__}; it must be a numpy.ndarray"
        )
    return targets if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer) else None
