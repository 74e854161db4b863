import io

import numpy as np
import pytest
from fedbonsai.actors.enforcement.frames import read_frame, write_frame

ARRAYS = [
    np.arange(6, dtype="<f4").reshape(2, 3).T,  # not contiguous
    np.array(7, dtype="<i8"),
    np.zeros((3, 0), dtype=np.uint8),
    np.array([True, False]),
]


def test_a_message_with_arrays_of_all_kinds_comes_back_and_the_next_one_follows() -> None:
    stream = io.BytesIO()
    write_frame(stream, {"kind": "run", "plan": b"\x00\xff"}, ARRAYS)
    write_frame(stream, {"kind": "flush"})
    stream.seek(0)
    header, arrays = read_frame(stream)
    assert header == {"kind": "run", "plan": b"\x00\xff"}
    for found, sent in zip(arrays, ARRAYS, strict=True):
        assert (found.dtype, found.shape) == (sent.dtype, sent.shape)
        assert np.array_equal(found, sent)
    assert read_frame(stream) == ({"kind": "flush"}, [])


@pytest.mark.parametrize("left", [0, 5, 20, -1])
def test_a_stream_that_ends_in_the_middle_is_told_as_its_end(left: int) -> None:
    stream = io.BytesIO()
    write_frame(stream, {"kind": "done"}, ARRAYS[:1])
    with pytest.raises(EOFError, match="the other end is gone"):
        read_frame(io.BytesIO(stream.getvalue()[:left]))
