"""Messages between a worker and its child: a length, a msgpack header, and the bytes of the arrays that it describes."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import msgspec
import numpy as np

from ...comms.codec import Array

_LENGTH = struct.Struct("<Q")
_ARRAYS = "arrays"


def write_frame(stream: BinaryIO, header: Mapping[str, Any], arrays: Sequence[Array] = ()) -> None:
    """Write one message. Raises ``OSError`` if the other end is gone."""
    shapes = [(array.dtype.str, list(array.shape)) for array in arrays]
    encoded = msgspec.msgpack.encode({**header, _ARRAYS: shapes})
    stream.write(_LENGTH.pack(len(encoded)))
    stream.write(encoded)
    for array in arrays:
        if array.size:
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], list[Array]]:
    """Read one message: header and arrays. Raises ``EOFError`` if the other end is gone."""
    (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
    header: dict[str, Any] = msgspec.msgpack.decode(_read(stream, length))
    arrays = []
    for dtype, shape in header.pop(_ARRAYS):
        array: Array = np.empty(shape, dtype=np.dtype(dtype))
        if array.size:
            _fill(stream, array.reshape(-1).view(np.uint8).data)
        arrays.append(array)
    return header, arrays


def _read(stream: BinaryIO, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    _fill(stream, memoryview(data))
    return data


def _fill(stream: BinaryIO, target: memoryview) -> None:
    while target:
        count = stream.readinto(target)  # type: ignore[attr-defined]  # every binary stream of the io module has it
        if not count:
            raise EOFError("the other end is gone")
        target = target[count:]
