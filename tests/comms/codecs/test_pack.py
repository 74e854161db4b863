import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, Array, ArraySpec, chain, specs_of
from fedbonsai.comms.codecs.lz4_codec import Lz4
from fedbonsai.comms.codecs.pack import Pack
from fedbonsai.comms.errors import MismatchedPacket
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst


def packed(symbols: Array, bits: int) -> Array:
    tensors = {"s": symbols}
    codec, specs = Pack(bits), specs_of({"s": symbols})
    arrays, held = codec.encode(tensors, context=NO_CONTEXT)
    assert held is tensors
    (spec,) = codec.layout(specs)
    assert (spec.exact, spec.shape, spec.dtype) == (True, arrays["s"].shape, "|u1")
    found = codec.decode(arrays, expected=specs, context=NO_CONTEXT)["s"]
    assert (found.dtype, found.shape) == (symbols.dtype, symbols.shape)
    np.testing.assert_array_equal(found, symbols)
    return arrays["s"]


def test_packing_by_hand() -> None:
    assert packed(np.array([1, 2, 3], "|u1"), 4).tolist() == [0x21, 0x03]
    assert packed(np.array([-1, 1, 0, -8], "|i1"), 4).tolist() == [0x1F, 0x80]
    assert packed(np.array([1, -1, 0, 1, -1], "|i1"), 2).tolist() == [0b01_00_11_01, 0b11]
    assert packed(np.array([1, 2, 7], "|u1"), 3).tolist() == [0b11_010_001, 0b1]
    assert packed(np.array([200, 255, 0], "|u1"), 8).tolist() == [200, 255, 0]


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_width_and_shape_is_restored(bits: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.int8, np.uint8]))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype is np.int8 else (0, 2**bits - 1)
    shape = data.draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7))
    symbols = data.draw(npst.arrays(dtype, shape, elements=st.integers(low, high)))
    assert packed(symbols, bits).nbytes == (symbols.size * bits + 7) // 8
    assert packed(symbols.T, bits).nbytes == (symbols.size * bits + 7) // 8


def test_symbols_that_do_not_fit() -> None:
    for symbols, words in [
        (np.array([0, 8], "|i1"), "'s' holds symbols from 0 to 8; 4 bits hold -8 to 7"),
        (np.array([-9], "|i1"), "'s' holds symbols from -9 to -9; 4 bits hold -8 to 7"),
        (np.array([16], "|u1"), "'s' holds symbols from 16 to 16; 4 bits hold 0 to 15"),
    ]:
        with pytest.raises(ValueError, match=words):
            Pack(4).encode({"s": symbols}, context=NO_CONTEXT)


def test_only_symbols_are_packed() -> None:
    tensors = {"f": np.ones(3, "<f4"), "i": np.ones(3, "<i4"), "s#coded": np.ones(3, "|u1")}
    arrays, _ = Pack(4).encode(tensors, context=NO_CONTEXT)
    assert all(arrays[name] is tensors[name] for name in tensors)
    assert Pack(4).layout(specs_of(tensors)) == specs_of(tensors)


def test_wrong_options_and_inputs() -> None:
    with pytest.raises(ValueError, match="bits is 9; it must be between 1 and 8"):
        Pack(9)
    with pytest.raises(ValueError, match="'s' has no fixed shape; pack must come before"):
        chain(Lz4(), Pack(4)).layout((ArraySpec("s", (3,), "|i1"),))


@pytest.mark.parametrize("bad", [np.ones(1, "|u1"), np.ones(3, "|u1"), np.ones(2, "|i1"), np.ones((2, 1), "|u1")])
def test_unexpected_arrays(bad: Array) -> None:
    with pytest.raises(MismatchedPacket, match="'s'"):
        Pack(4).decode({"s": bad}, expected=(ArraySpec("s", (3,), "|i1"),), context=NO_CONTEXT)


def test_any_bytes_are_symbols_within_the_width() -> None:
    noise = np.frombuffer(np.random.default_rng(0).bytes(7), np.uint8)
    for dtype, low, high in (("|i1", -16, 15), ("|u1", 0, 31)):
        found = Pack(5).decode({"s": noise}, expected=(ArraySpec("s", (11,), dtype),), context=NO_CONTEXT)["s"]
        assert found.shape == (11,)
        assert found.min() >= low
        assert found.max() <= high
