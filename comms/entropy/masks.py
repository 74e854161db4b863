"""Positions alone, by the model of the entropy codec: those of the nonzero entries of one tensor of any type.

The stream is that of a tensor of zeros and ones, so the entropy codec reads it. The sender describes it without looking for
models of signs and magnitudes.
"""

import numpy as np

from ..codec import NO_CONTEXT, Array, ArraySpec
from . import density, stream
from .alphabets import Alphabet
from .codec import CODED, Entropy
from .coders import CoderName, SymbolWriter
from .signs import SignModel
from .tables import Integers
from .tensors import Sparse

_ONE = Alphabet(first=1, low_bits=0, levels=np.ones(1, np.int64))
_POSITIVE = SignModel(mode=0, negative=0, changed=0, rows=np.zeros(0, np.int64))


def describe_mask(flat: Integers, shape: tuple[int, ...]) -> tuple[Sparse, float]:
    """The description of at least one sorted flat position in a tensor of ``shape``, and its estimated cost in bits."""
    classes, bits, view = density.fit(flat, shape)
    ones, no_signs = np.ones(len(flat), np.uint8), np.zeros(len(flat), np.uint8)
    return Sparse(view, flat, ones, no_signs, classes, _ONE, _POSITIVE), bits


def put_mask(description: Sparse, coder: CoderName) -> Array:
    """The stream of a description."""
    writer = SymbolWriter(coder)
    stream.put(writer, [description], None)
    return writer.finish()


def take_mask(coded: Array, shape: tuple[int, ...], most: int) -> Integers:
    """The positions of a stream. Raises a ``PacketError``, also for more than ``most``. Allocates as ``Entropy.decode``."""
    expected = (ArraySpec("mask", shape, "|u1", nonzeros=most),)
    mask = Entropy().decode({CODED: coded}, expected=expected, context=NO_CONTEXT)["mask"]
    flat: Integers = np.flatnonzero(mask.view(np.bool_))
    return flat
