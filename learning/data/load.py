"""From a name in the configuration to every device's samples.

load(config, num_devices, seed)
    built-in name or module:function -> a Pool of samples -> partition -> shares -> FederatedData
    synthetic                        ------------------------------------> shares -> FederatedData
    a user's own FederatedData       ----------------------------------------------> FederatedData

load_public(config, num_devices, seed): the pool's public share, as the data of one device
"""

from typing import TypeVar

import msgspec
import numpy as np

from ..seeds import derive
from .config import DataConfig
from .devices import DeviceData, PoolShares, Shares
from .digits import load_digits
from .folder import FolderOptions, load_folder
from .partition import Integers, Owned, split
from .public import public_and_rest, refuse_public
from .synthetic import Synthetic, SyntheticOptions
from .transforms import build
from .types import FederatedData, Indices, SamplePool, Source
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
    found = _find(config, num_devices=num_devices, seed=seed)
    if isinstance(found, SamplePool):
        return _dealt(found, config, num_devices=num_devices, seed=seed)
    refuse_public(config)
    return found


def load_public(config: DataConfig, *, num_devices: int, seed: int) -> FederatedData:
    """The public share of the same data (``data.public_share``), as those of one device; the server's test samples as well.

    Raises ``ValueError`` as ``load`` does, and for data without such a share.
    """
    found = _find(config, num_devices=num_devices, seed=seed)
    if not isinstance(found, SamplePool):
        refuse_public(config)
    if not isinstance(found, SamplePool) or not config.public_share:
        raise ValueError("data.public_share is 0; it must be above 0 for a public share")
    public, _ = public_and_rest(len(found.train), config)
    config = msgspec.structs.replace(config, test_share=0.0)
    return _device_data(PoolShares(found, [public]), config, seed=seed, num_classes=_num_classes(found), pool=found)


def _find(config: DataConfig, *, num_devices: int, seed: int) -> SamplePool | FederatedData:
    """The samples, or the data of those who know themselves which device owns what."""
    if config.classes is not None and config.name != "folder":
        raise ValueError(f"data.classes is for the image folders of 'folder', not for {config.name!r}; leave it out")
    if config.name == "synthetic":
        refuse_partition(config)
        options = _options(config, SyntheticOptions)
        generated = Synthetic(options=options, num_devices=num_devices, seed=seed)
        return _device_data(generated, config, seed=seed, num_classes=options.classes)
    if ":" in config.name:
        result = call_users(config, num_devices=num_devices, seed=seed)
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


def _dealt(pool: SamplePool, config: DataConfig, *, num_devices: int, seed: int) -> FederatedData:
    """A pool, without its public share, dealt to the devices."""
    _, mine = public_and_rest(len(pool.train), config)
    if pool.owners is not None:
        owned = _by_owner(pool.owners, mine, config, num_devices=num_devices)
    else:
        labels = _labels(pool.train)
        owned = split(
            config.partition,
            num_samples=len(mine),
            num_devices=num_devices,
            seed=derive(seed, "partition"),
            labels=None if labels is None else labels[mine],
            groups=None if pool.groups is None else pool.groups.numpy()[mine],
        )
        owned = [mine[positions] for positions in owned]
    return _device_data(PoolShares(pool, owned), config, seed=seed, num_classes=_num_classes(pool), pool=pool)


def _by_owner(owners: Indices, mine: Indices, config: DataConfig, *, num_devices: int) -> Owned:
    """Those samples of ``mine`` that belong to each device."""
    refuse_partition(config)
    if set(np.unique(owners).tolist()) != set(range(num_devices)):
        raise ValueError(
            f"data.name: in {config.name!r} samples belong to {len(np.unique(owners))} devices, and the fleet has "
            f"{num_devices}; owners must be 0 to {num_devices - 1}, each of at least one sample"
        )
    owned = [mine[owners[mine] == device] for device in range(num_devices)]
    if empty := [device for device, positions in enumerate(owned) if not len(positions)]:
        raise ValueError(f"data.public_share is {config.public_share:g}, which leaves device {empty[0]} no sample")
    return owned


def _num_classes(pool: SamplePool) -> int | None:
    """As the pool says, else one more than its largest label."""
    if pool.num_classes is not None or _labels(pool.train) is None:
        return pool.num_classes
    highest = [int(found.max()) for part in (pool.train, pool.test) if part and (found := _labels(part)) is not None]
    return max(highest) + 1


def _device_data(
    shares: Shares, config: DataConfig, *, seed: int, num_classes: int | None, pool: SamplePool | None = None
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
    if not isinstance(targets, np.ndarray):
        raise ValueError(
            f"data: targets() of {type(source).__name__} is a {type(targets).__name__}; it must be a numpy.ndarray"
        )
    return targets if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer) else None
