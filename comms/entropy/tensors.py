"""One tensor of symbols as its sender sees it: empty, sparse, or dense, whichever is cheapest for its data.

Sparse: positions of what is there, signs, magnitudes. Dense: all symbols. Dense tensors too small for an alphabet of their
own share one.
"""

from typing import NamedTuple

import numpy as np

from ..codec import Array
from . import alphabets, density, signs
from .alphabets import Alphabet
from .bounds import may_be_dense, sparse_is_smaller
from .coders import Symbols
from .density import Classes
from .signs import SignModel
from .tables import Integers

EMPTY, SPARSE, DENSE, SHARED = range(4)
_SMALL_ITEMS = 4096  # dense tensors below may share an alphabet
_FEW_SYMBOLS = 7
_GAIN = 0.02
_WORTH = 1.01  # times as many bits are accepted for speed
_ZERO = 128  # in the histogram of a dense tensor of signed symbols


class Sparse(NamedTuple):
    """What is there (flat, sorted), and the models of it. ``view``: which of ``density.shapes_of``."""

    view: int
    flat: Integers
    magnitudes: Symbols
    negative: Symbols
    classes: Classes
    alphabet: Alphabet
    signs: SignModel


class Dense(NamedTuple):
    """All symbols, shifted to 0..255; the alphabet is None where it is the shared one."""

    values: Symbols
    histogram: Integers
    alphabet: Alphabet | None


Tensor = Sparse | Dense | None  # None: empty


def look(arrays: list[Array]) -> tuple[list[Tensor], Alphabet | None]:
    """The cheapest description of each array (int8 or uint8), and the alphabet that some of them share, if any does."""
    found = [_cheapest(array) for array in arrays]
    small = {
        i: tensor
        for i, (tensor, _) in enumerate(found)
        if isinstance(tensor, Dense) and len(tensor.values) < _SMALL_ITEMS
    }
    tensors = [tensor for tensor, _ in found]
    if len(small) < 2:
        return tensors, None
    shared, bits = alphabets.fit(np.sum([tensor.histogram for tensor in small.values()], axis=0))
    if bits >= sum(found[i][1] for i in small):
        return tensors, None
    return [small[i]._replace(alphabet=None) if i in small else tensor for i, tensor in enumerate(tensors)], shared


def plainly(array: Array) -> Tensor:
    """The description of which the size can be bounded for any data: no classes, raw magnitudes and symbols."""
    flat = np.flatnonzero(array.reshape(-1))
    if not len(flat):
        return None
    raw = Alphabet(0, 7, np.ones(2, np.int64))
    if not sparse_is_smaller(array.size, len(flat)):
        values = _shifted(array)
        return Dense(values, np.bincount(values, minlength=alphabets.SIZE), raw)
    magnitudes, negative = _split(array, flat)
    shape = density.shapes_of(array.shape)[0]
    model = signs.SignModel(0, 31, 0, np.zeros(0, np.int64))
    return Sparse(0, flat, magnitudes, negative, density.plain(len(flat), shape), raw, model)


def _cheapest(array: Array) -> tuple[Tensor, float]:
    """The description and about its bits."""
    there = array.reshape(-1) != 0
    count = int(np.count_nonzero(there))
    if not count:
        return None, 0.0
    dense = _dense(array) if may_be_dense(array.size, count) else None
    # To look closely at much takes time; it pays where some channels hold much more than others.
    much = 4 * count > array.size > _SMALL_ITEMS
    many = dense is not None and np.count_nonzero(dense[0].histogram) > _FEW_SYMBOLS
    if dense and much and many and density.channel_gain_bits(there, array.shape) < _GAIN * dense[1]:
        return dense
    flat = np.flatnonzero(there)
    magnitudes, negative = _split(array, flat)
    alphabet, bits = alphabets.fit(np.bincount(magnitudes, minlength=alphabets.SIZE))
    classes, position_bits, view = density.fit(flat, array.shape)
    sign_model, sign_bits = signs.fit(negative, flat, classes.shape)
    sparse_bits = bits + position_bits + sign_bits + 24
    # Where a quarter or more is there, dense is the faster of the two, else sparse.
    if dense and dense[1] < sparse_bits * (_WORTH if 4 * count > array.size else 1 / _WORTH):
        return dense
    return Sparse(view, flat, magnitudes, negative, classes, alphabet, sign_model), sparse_bits


def _dense(array: Array) -> tuple[Dense, float]:
    """All symbols with an alphabet of their own."""
    values = _shifted(array)
    histogram = _histogram(values)
    alphabet, bits = alphabets.fit(histogram)
    return Dense(values, histogram, alphabet), bits


def _shifted(array: Array) -> Symbols:
    """Symbols as 0..255, in order."""
    flat = array.reshape(-1)
    return flat.view(np.uint8) ^ np.uint8(_ZERO) if array.dtype.kind == "i" else flat


def restored(values: Symbols, dtype: str) -> Array:
    """The reverse of ``_shifted``."""
    return (values ^ np.uint8(_ZERO)).view(np.int8) if np.dtype(dtype).kind == "i" else values


def _histogram(values: Symbols) -> Integers:
    """How often each of 0..255 occurs; two at a time, which is faster than one by one."""
    pairs = values[: values.size // 2 * 2].view(np.uint16)
    if pairs.size < 1 << 16:
        return np.bincount(values, minlength=alphabets.SIZE)
    both = np.bincount(pairs, minlength=1 << 16).reshape(alphabets.SIZE, alphabets.SIZE)
    histogram: Integers = both.sum(0) + both.sum(1)
    if values.size % 2:
        histogram[values[-1]] += 1
    return histogram


def _split(array: Array, flat: Integers) -> tuple[Symbols, Symbols]:
    """Magnitudes (1..255) and signs (1: negative) of what is there."""
    values = array.reshape(-1)[flat].astype(np.int64)
    return np.abs(values), (values < 0).astype(np.int64)
