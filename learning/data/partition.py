"""Partitions of samples over devices: pure functions from labels and a seed to ascending indices for each device.

Unless a function says otherwise, every sample belongs to exactly one device and every device gets at least one.

iid                shuffled, in equal parts.
dirichlet, free    each class is dealt in proportions drawn from Dir(alpha): Li, Diao, Chen, He, ICDE 2022, arXiv
                   2102.02079, sec. 3 (and Yurochkin et al., ICML 2019). They draw again until every device has enough,
                   which may never end; here single samples are moved from the largest devices instead.
dirichlet, equal   each device has class proportions from Dir(alpha) and all have the same number of samples: Hsu, Qi,
                   Brown 2019, arXiv 1909.06335, with the symmetric alpha for each class of Acar et al., ICLR 2021, arXiv
                   2111.04263, in place of alpha times the prior. A class that is used up is not drawn any more.
shards             McMahan et al., AISTATS 2017, arXiv 1602.05629, sec. 3.
cyclic classes     the label skew of ResFed's code (Song et al., arXiv 2212.05602).
"""

import numpy as np
from numpy.typing import NDArray

from ..seeds import derive
from .config import CyclicClasses, DataConfig, Dirichlet, Groups, Iid, Partition, Shards

Owned = list[NDArray[np.intp]]
Integers = NDArray[np.integer]


def split(
    partition: Partition,
    *,
    num_samples: int,
    num_devices: int,
    seed: int,
    labels: Integers | None,
    groups: Integers | None,
) -> Owned:
    """Partition ``num_samples`` samples as configured.

    ``labels``: class of each sample, or None if there are none. ``groups``: natural group of each sample, or None.
    Raises ``ValueError`` if the data lack labels or groups that the partition needs, or have too few samples.
    """
    _check_enough(num_samples, num_devices, at_least=1)
    if isinstance(partition, Iid):
        return iid(num_samples, num_devices=num_devices, seed=seed)
    if isinstance(partition, Groups):
        if groups is None:
            raise ValueError(
                "data.partition.name is 'groups', but these data have no natural groups; use another partition"
            )
        return by_group(groups, num_devices=num_devices, seed=seed)
    if labels is None:
        name = type(partition).__struct_config__.tag
        raise ValueError(
            f"data.partition.name is {name!r}, which needs one class label for each sample; use 'iid' or 'groups' here"
        )
    if isinstance(partition, Shards):
        return shards(labels, num_devices=num_devices, shards_per_device=partition.shards_per_device, seed=seed)
    if isinstance(partition, CyclicClasses):
        return cyclic_classes(
            labels, num_devices=num_devices, classes_per_device=partition.classes_per_device, seed=seed
        )
    assert isinstance(partition, Dirichlet)
    dirichlet = dirichlet_equal if partition.sizes == "equal" else dirichlet_free
    return dirichlet(
        labels, num_devices=num_devices, alpha=partition.alpha, min_samples=partition.min_samples, seed=seed
    )


def iid(num_samples: int, *, num_devices: int, seed: int) -> Owned:
    """Shuffle, and split into equal parts; the first ``num_samples % num_devices`` devices get one sample more."""
    _check_enough(num_samples, num_devices, at_least=1)
    order = np.random.default_rng(seed).permutation(num_samples)
    return [np.sort(part) for part in np.array_split(order, num_devices)]


def dirichlet_free(labels: Integers, *, num_devices: int, alpha: float, min_samples: int, seed: int) -> Owned:
    """Distribute each class by its own draw of device proportions, so that sizes differ too."""
    _check_enough(len(labels), num_devices, at_least=min_samples)
    generator = np.random.default_rng(seed)
    owner = np.empty(len(labels), dtype=np.intp)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        edges = np.cumsum(generator.dirichlet(np.full(num_devices, alpha)))
        # The position of a sample's middle in the cumulated proportions, so that each device gets its share rounded.
        position = np.searchsorted(edges, (np.arange(len(members)) + 0.5) / len(members))
        owner[members] = np.minimum(position, num_devices - 1)
    sizes = np.bincount(owner, minlength=num_devices)
    while sizes.min() < min_samples:
        smallest, largest = int(sizes.argmin()), int(sizes.argmax())
        owner[generator.choice(np.flatnonzero(owner == largest))] = smallest
        sizes[smallest] += 1
        sizes[largest] -= 1
    return _by_owner(owner, num_devices)


def dirichlet_equal(labels: Integers, *, num_devices: int, alpha: float, min_samples: int, seed: int) -> Owned:
    """Each device draws its class proportions; all get the same number of samples, the first ``remainder`` devices one more.

    Devices are served in random order, since the last ones have to take the remaining samples.
    """
    _check_enough(len(labels), num_devices, at_least=min_samples)
    generator = np.random.default_rng(seed)
    classes = np.unique(labels)
    stock = [generator.permutation(np.flatnonzero(labels == label)) for label in classes]
    left = np.array([len(members) for members in stock])
    owned: Owned = [np.empty(0, dtype=np.intp)] * num_devices
    for device in generator.permutation(num_devices):
        size = len(labels) // num_devices + int(device < len(labels) % num_devices)
        taken = _draw_counts(size, left, generator.dirichlet(np.full(len(classes), alpha)), generator)
        pieces = [stock[c][left[c] - taken[c] : left[c]] for c in range(len(classes))]
        owned[device] = np.sort(np.concatenate(pieces))
        left = left - taken
    return owned


def shards(labels: Integers, *, num_devices: int, shards_per_device: int, seed: int) -> Owned:
    """Sort by label (shuffled within a label), cut into equal shards (sizes differ by at most one), assign them at random."""
    count = num_devices * shards_per_device
    if len(labels) < count:
        raise ValueError(
            f"data.partition.shards_per_device is {shards_per_device}: {count} shards for {num_devices} devices, "
            f"but there are only {len(labels)} samples"
        )
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    pieces = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], count)
    assigned = generator.permutation(count).reshape(num_devices, shards_per_device)
    return [np.sort(np.concatenate([pieces[shard] for shard in numbers])) for numbers in assigned]


def cyclic_classes(labels: Integers, *, num_devices: int, classes_per_device: int, seed: int) -> Owned:
    """Device i owns classes i, i+1, ... ; a class is shuffled and split equally, with the remainder for the last owner.

    A class without an owner (fewer devices than classes) is not used.
    """
    generator = np.random.default_rng(seed)
    classes = np.unique(labels)
    if classes_per_device > len(classes):
        raise ValueError(
            f"data.partition.classes_per_device is {classes_per_device}, but the data have only {len(classes)} classes"
        )
    owned: list[list[NDArray[np.intp]]] = [[] for _ in range(num_devices)]
    for index, label in enumerate(classes):
        members = generator.permutation(np.flatnonzero(labels == label))
        owners = [d for d in range(num_devices) if (index - d) % len(classes) < classes_per_device]
        if owners and len(members) < len(owners):
            raise ValueError(
                f"data.partition.classes_per_device is {classes_per_device}: class {label} has {len(members)} samples "
                f"for {len(owners)} devices; each needs at least one"
            )
        size = len(members) // max(len(owners), 1)
        for turn, device in enumerate(owners):
            stop = (turn + 1) * size if turn + 1 < len(owners) else len(members)
            owned[device].append(members[turn * size : stop])
    return [np.sort(np.concatenate(pieces)) for pieces in owned]


def by_group(groups: Integers, *, num_devices: int, seed: int) -> Owned:
    """Assign whole groups in random order, one to each device in turn. Raises ``ValueError`` for too few groups."""
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < num_devices:
        raise ValueError(
            f"data.partition.name is 'groups': {num_devices} devices cannot share {len(names)} groups; "
            "every device needs at least one"
        )
    turn = np.random.default_rng(seed).permutation(len(names))
    return _by_owner((turn % num_devices)[group], num_devices)


def _draw_counts(
    size: int, left: NDArray[np.intp], proportions: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.intp]:
    """Draw the number of samples of each class: multinomial, at most ``left``, ``size`` in total."""
    taken = np.zeros_like(left)
    while (missing := size - int(taken.sum())) > 0:
        weights = np.where(taken < left, proportions, 0.0)
        if weights.sum() < 1e-12:  # the classes that the device prefers are used up: draw from the others
            weights = (left - taken).astype(np.float64)
        taken = np.minimum(taken + generator.multinomial(missing, weights / weights.sum()), left)
    return taken


def _by_owner(owner: NDArray[np.intp], num_devices: int) -> Owned:
    """Ascending indices of each device, from the owner of each sample."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=num_devices))[:-1])


def _check_enough(num_samples: int, num_devices: int, *, at_least: int) -> None:
    """Raise ``ValueError`` if there are too few samples for the devices."""
    if num_samples < num_devices * at_least:
        need = "one sample" if at_least == 1 else f"data.partition.min_samples = {at_least} samples"
        raise ValueError(
            f"the fleet has {num_devices} devices and the data {num_samples} training samples; every device needs {need}"
        )


def public_and_rest(num_samples: int, config: DataConfig) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Positions of the public samples, and of all others, both ascending.

    Samples are put in an order drawn from ``data.public_seed`` and the number of samples alone, and the first ones are public.
    So a share of 0.1 is contained in one of 0.2, and it depends neither on the run's seed nor on the number of devices.

    Raises ``ValueError`` for a share that leaves one of the two empty.
    """
    if not config.public_share:
        return np.arange(0), np.arange(num_samples)
    count = int(num_samples * config.public_share + 0.5)
    if not 0 < count < num_samples:
        raise ValueError(
            f"data.public_share is {config.public_share:g}: {count} of {num_samples} samples; "
            "at least one must be public, and one must be left for the devices"
        )
    order = np.random.default_rng(derive(config.public_seed, "public")).permutation(num_samples)
    return np.sort(order[:count]), np.sort(order[count:])


def refuse_public(config: DataConfig) -> None:
    """Raise ``ValueError`` if a public share is configured: data that are not one pool have none."""
    if config.public_share:
        raise ValueError(
            f"data.public_share is {config.public_share:g}, but {config.name!r} defines the owner of each sample itself; "
            "leave it out, and pretrain on other data"
        )
