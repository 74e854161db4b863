"""Bits sent as they are, beside the coder: they are uniform, so a coder would take time and save nothing."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..codec import Array
from ..errors import CorruptPacket, TruncatedPacket

_LENGTH_BYTES = 5  # of seven bits each


class RawWriter:
    """Collects numbers of so many bits."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._planes: list[Array] = []

    def put(self, numbers: npt.NDArray[Any], bits: int) -> None:
        """All lowest bits, then all second ones, ..."""
        self._planes += [(numbers >> bit & 1).astype(np.uint8) for bit in range(bits)]

    def finish(self) -> Array:
        """Eight bits to a byte."""
        return np.packbits(np.concatenate(self._planes)) if self._planes else np.zeros(0, np.uint8)


class RawReader:
    """Reads what a ``RawWriter`` wrote."""

    def __init__(self, data: Array) -> None:
        """Takes eight bytes of memory for each byte."""
        self._bits = np.unpackbits(data)
        self._at = 0

    def take(self, count: int, bits: int) -> npt.NDArray[Any]:
        """``count`` numbers; uint8 up to 8 bits, else int64. Raises ``TruncatedPacket``."""
        end = self._at + count * bits
        if end > len(self._bits):
            raise TruncatedPacket("an entropy-coded stream has fewer raw bits than it needs")
        numbers: npt.NDArray[Any] = np.zeros(count, np.uint8 if bits <= 8 else np.int64)
        for bit in range(bits):
            start = self._at + bit * count
            numbers |= self._bits[start : start + count].astype(numbers.dtype) << bit
        self._at = end
        return numbers

    def finish(self) -> None:
        """Raises ``CorruptPacket`` where more than the last byte's padding is left, or that is not 0."""
        rest = self._bits[self._at :]
        if len(rest) >= 8 or rest.any():
            raise CorruptPacket("an entropy-coded stream has more raw bits than it needs")


def with_length(data: Array) -> Array:
    """The number of bytes, seven bits at a time, lowest first, then the bytes."""
    size, head = data.size, []
    while size >= 128:
        head.append(size & 127 | 128)
        size >>= 7
    return np.concatenate([np.array([*head, size], np.uint8), data])


def length_of(stream: Array, at: int) -> tuple[int, int]:
    """Where the bytes begin and end whose length stands at ``at``. Raises ``TruncatedPacket``."""
    size = 0
    for place in range(_LENGTH_BYTES):
        if at + place >= stream.size:
            break
        byte = int(stream[at + place])
        size |= (byte & 127) << 7 * place
        if byte < 128:
            start = at + place + 1
            if start + size > stream.size:
                break
            return start, start + size
    raise TruncatedPacket("an entropy-coded stream is shorter than its raw bits")
