"""Between arrays of packets and torch tensors, without copies."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def as_tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """Tensors that share memory with ``arrays``; those of a packet are read-only, and must only be read."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns at each; nobody writes to these.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Arrays that share memory with CPU ``tensors``."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def minus(arrays: Mapping[str, npt.NDArray[Any]], others: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """Differences of arrays by name, as tensors. (numpy would make plain numbers of arrays without dimensions.)"""
    subtrahends = as_tensors({name: others[name] for name in arrays})
    return {name: tensor - subtrahends[name] for name, tensor in as_tensors(arrays).items()}


def widened(tensor: Tensor) -> Tensor:
    """The tensor as it is, or in float32 where its type is narrower than that (float16): what sums are made of."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def dense(tensor: Tensor) -> Tensor:
    """The tensor as it is, or in dense form where it is sparse: few operations take both."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def numpy_name(dtype: torch.dtype) -> str:
    """numpy's name of a torch type, e.g. ``<f4``."""
    return np.dtype(torch.empty(0, dtype=dtype).numpy().dtype).str
