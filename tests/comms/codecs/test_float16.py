import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, Array, Context, specs_of
from fedbonsai.comms.codecs.float16 import Float16
from fedbonsai.comms.errors import MismatchedPacket


def held(array: Array) -> Array:
    tensors = {"t": array}
    arrays, kept = Float16().encode(tensors, context=NO_CONTEXT)
    assert arrays["t"].dtype == "<f2"
    restored = Float16().decode(arrays, expected=specs_of(tensors), context=NO_CONTEXT)
    assert restored["t"].tobytes() == kept["t"].tobytes()
    assert (kept["t"].dtype, kept["t"].shape) == (array.dtype, array.shape)
    return kept["t"]


def test_rounding_by_hand() -> None:
    assert held(np.array([1.0, -0.5, 1 + 1 / 4096, 2049.0], "<f4")).tolist() == [1.0, -0.5, 1.0, 2048.0]
    assert held(np.array([1e-9, -1e-9], "<f4")).tolist() == [0.0, 0.0]


def test_large_values_are_clipped() -> None:
    assert held(np.array([65504, 65520, -3e38], "<f4")).tolist() == [65504, 65504, -65504]


def test_odd_shapes_and_types() -> None:
    assert held(np.zeros((0, 2), "<f4")).shape == (0, 2)
    assert held(np.array(0.25, "<f4")).item() == 0.25
    assert held(np.arange(6, dtype="<f4").reshape(2, 3).T).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert held(np.array([0.1])).tolist() == [float(np.float16(0.1))]
    assert held(np.array([0.1], "<f2")).tolist() == [float(np.float16(0.1))]
    with pytest.raises(ValueError, match="tensor 't' holds NaN, infinity, or more than float32 can hold"):
        held(np.array([1e300]))


def test_roles_and_bounds_stay() -> None:
    tensors = {"w": np.ones((1, 2), "<f4"), "b": np.ones(2, "<f4")}
    codec = Float16(roles=("weight",))
    assert codec.encode(tensors, context=NO_CONTEXT)[0]["b"] is tensors["b"]
    spec = specs_of(tensors, {"w": "weight"})[0]
    (found,) = codec.layout((type(spec)("w", (1, 2), "<f4", role="weight", nonzeros=1),))
    assert (found.dtype, found.role, found.nonzeros) == ("<f2", "weight", 1)
    vectors = Context(roles={"w": "vector", "b": "vector"})
    assert codec.encode(tensors, context=vectors) == (tensors, tensors)


@pytest.mark.parametrize("bad", [np.ones(2, "<f2"), np.ones(4, "<f2"), np.ones(3, "<f4"), np.ones((3, 1), "<f2")])
def test_unexpected_arrays(bad: Array) -> None:
    with pytest.raises(MismatchedPacket, match="'t'"):
        Float16().decode({"t": bad}, expected=specs_of({"t": np.ones(3, "<f4")}), context=NO_CONTEXT)


def test_received_nan_is_left_to_the_check_of_the_packet() -> None:
    bad = np.array([np.nan, np.inf, 1], "<f2")
    found = Float16().decode({"t": bad}, expected=specs_of({"t": np.ones(3, "<f4")}), context=NO_CONTEXT)
    assert np.isfinite(found["t"]).tolist() == [False, False, True]
