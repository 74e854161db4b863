"""The public share: training samples that belong to no device, for pretraining.

Samples are put in an order drawn from ``data.public_seed`` and the number of samples alone; the first of them are public. So
a share of 0.1 lies within one of 0.2, and neither the run's seed nor the number of devices moves it.
"""

import numpy as np

from ..seeds import derive
from .config import DataConfig
from .types import Indices


def public_and_rest(num_samples: int, config: DataConfig) -> tuple[Indices, Indices]:
    """Positions of the public samples, and of the devices'; both ascending.

    Raises ``ValueError`` for a share that leaves one of them without any.
    """
    if not config.public_share:
        return np.arange(0), np.arange(num_samples)
    count = int(num_samples * config.public_share + 0.5)
    if not 0 < count < num_samples:
        raise ValueError(
            f"data.public_share is {config.public_share:g}: {count} of {num_samples} samples; "
            "at least one must be public, and one a device's"
        )
    order = np.random.default_rng(derive(config.public_seed, "public")).permutation(num_samples)
    return np.sort(order[:count]), np.sort(order[count:])


def refuse_public(config: DataConfig) -> None:
    """Data that are not one pool have no public share. Raises ``ValueError`` when one is asked for."""
    if config.public_share:
        raise ValueError(
            f"data.public_share is {config.public_share:g}, but {config.name!r} says itself which device owns what; "
            "leave it out, and pretrain on other data"
        )
