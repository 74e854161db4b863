"""The sender's description of a tensor of symbols: empty, sparse or dense, whichever is cheapest for its data.

Sparse: positions, signs and magnitudes of the nonzero entries. Dense: all symbols. Dense tensors that are too small for an
alphabet of their own may share one.
"""

from typing import NamedTuple

import numpy as np

from ..codec import Array
from . import alphabets, density, signs
from .alphabets import Alphabet
from .bounds import may_be_dense, sparse_is_smaller
from .density import DensityClasses
from .signs import SignModel
from .tables import Integers, Symbols

EMPTY, SPARSE, DENSE, SHARED = range(4)
_SMALL_ITEMS = 4096  # smaller dense tensors may share an alphabet
_FEW_SYMBOLS = 7
_GAIN = 0.02
_WORTH = 1.01  # the faster description is taken up to this factor of the cost
_ZERO = 128  # the symbol 0 of a dense tensor of signed symbols
_SPARSE_BITS = 24  # of a description
_ONE = Alphabet(first=1, low_bits=0, levels=np.ones(1, np.int64))
_POSITIVE = SignModel(mode=0, negative=0, changed=0, rows=np.zeros(0, np.int64))


class Sparse(NamedTuple):
    """The nonzero entries, and their models. ``flat``: sorted positions. ``view``: number among ``density.shapes_of``."""

    view: int
    flat: Integers
    magnitudes: Symbols
    negative: Symbols
    classes: DensityClasses
    alphabet: Alphabet
    signs: SignModel


class Dense(NamedTuple):
    """All symbols, shifted to 0..255. The alphabet is None if it is the shared one."""

    values: Symbols
    histogram: Integers
    alphabet: Alphabet | None


Tensor = Sparse | Dense | None  # None: empty


def describe(arrays: list[Array]) -> tuple[list[Tensor], Alphabet | None]:
    """The cheapest description of each array (int8 or uint8), and the alphabet that some share, or None."""
    described = [cheapest(array) for array in arrays]
    small = {
        i: tensor
        for i, (tensor, _) in enumerate(described)
        if isinstance(tensor, Dense) and len(tensor.values) < _SMALL_ITEMS
    }
    tensors = [tensor for tensor, _ in described]
    if len(small) < 2:
        return tensors, None
    shared, bits = alphabets.fit(np.sum([tensor.histogram for tensor in small.values()], axis=0))
    if bits >= sum(described[i][1] for i in small):
        return tensors, None
    return [small[i]._replace(alphabet=None) if i in small else tensor for i, tensor in enumerate(tensors)], shared


def describe_plainly(array: Array) -> Tensor:
    """The plain description, whose size is bounded for any data (``bounds``): no classes, raw magnitudes and symbols."""
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


def cheapest(array: Array) -> tuple[Tensor, float]:
    """The cheapest description of symbols (int8 or uint8), and its estimated cost in bits."""
    nonzero = array.reshape(-1) != 0
    count = int(np.count_nonzero(nonzero))
    if not count:
        return None, 0.0
    dense = _dense(array) if may_be_dense(array.size, count) else None
    # Fitting a sparse model to many entries is slow. It pays only if some channels hold many more of them than others.
    much = 4 * count > array.size > _SMALL_ITEMS
    many = dense is not None and np.count_nonzero(dense[0].histogram) > _FEW_SYMBOLS
    if dense and much and many and density.channel_gain_bits(nonzero, array.shape) < _GAIN * dense[1]:
        return dense
    flat = np.flatnonzero(nonzero)
    magnitudes, negative = _split(array, flat)
    alphabet, bits = alphabets.fit(np.bincount(magnitudes, minlength=alphabets.SIZE))
    classes, position_bits, view = density.fit(flat, array.shape)
    sign_model, sign_bits = signs.fit(negative, flat, classes.shape)
    sparse_bits = bits + position_bits + sign_bits + _SPARSE_BITS
    # With more than a quarter of nonzero entries, dense is the faster of the two, else sparse.
    if dense and dense[1] < sparse_bits * (_WORTH if 4 * count > array.size else 1 / _WORTH):
        return dense
    return Sparse(view, flat, magnitudes, negative, classes, alphabet, sign_model), sparse_bits


def describe_mask(flat: Integers, shape: tuple[int, ...]) -> tuple[Sparse, float]:
    """The description of a mask with ones at sorted flat positions (at least one), and its estimated cost in bits."""
    classes, bits, view = density.fit(flat, shape)
    ones, no_signs = np.ones(len(flat), np.uint8), np.zeros(len(flat), np.uint8)
    return Sparse(view, flat, ones, no_signs, classes, _ONE, _POSITIVE), bits + _SPARSE_BITS


def _dense(array: Array) -> tuple[Dense, float]:
    """The dense description, and its estimated cost in bits."""
    values = _shifted(array)
    histogram = _histogram(values)
    alphabet, bits = alphabets.fit(histogram)
    return Dense(values, histogram, alphabet), bits


def _shifted(array: Array) -> Symbols:
    """Symbols as 0..255, flat, in the order of their values."""
    flat = array.reshape(-1)
    return flat.view(np.uint8) ^ np.uint8(_ZERO) if array.dtype.kind == "i" else flat


def restored(values: Symbols, dtype: str) -> Array:
    """The inverse of ``_shifted``."""
    return (values ^ np.uint8(_ZERO)).view(np.int8) if np.dtype(dtype).kind == "i" else values


def _histogram(values: Symbols) -> Integers:
    """How often each of 0..255 occurs. Counts pairs of values, which is faster than single ones."""
    pairs = values[: values.size // 2 * 2].view(np.uint16)
    if pairs.size < 1 << 16:
        return np.bincount(values, minlength=alphabets.SIZE)
    both = np.bincount(pairs, minlength=1 << 16).reshape(alphabets.SIZE, alphabets.SIZE)
    histogram: Integers = both.sum(0) + both.sum(1)
    if values.size % 2:
        histogram[values[-1]] += 1
    return histogram


def _split(array: Array, flat: Integers) -> tuple[Symbols, Symbols]:
    """Magnitudes (1..255) and signs (1: negative) of the entries at ``flat``."""
    values = array.reshape(-1)[flat].astype(np.int64)
    return np.abs(values), (values < 0).astype(np.int64)
