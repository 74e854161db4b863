"""Random orders: drawing without replacement, as an order to walk through."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def weighted_order(rng: np.random.Generator, devices: Sequence[int], weights: npt.NDArray[np.float64]) -> list[int]:
    """``devices`` in the order of draws without replacement, each with probability proportional to its weight.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", Information Processing Letters 97(5), 2006, in
    its exponential form: the arrival times of independent Poisson processes with these rates. ``weights``: [device],
    none negative; those of weight 0 come last, in random order.
    """
    draws = rng.exponential(size=len(devices))
    with np.errstate(divide="ignore"):
        arrivals = draws / weights
    return [devices[index] for index in np.lexsort((draws, arrivals)).tolist()]


def uniform_order(rng: np.random.Generator, devices: Sequence[int]) -> list[int]:
    """``devices`` in random order, every order equally likely."""
    return [devices[index] for index in rng.permutation(len(devices)).tolist()]
