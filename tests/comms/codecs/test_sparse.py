"""The sparse codec: any bits of any type come back, in the smallest form, within the bound, and any bytes are safe."""

import sys
import tracemalloc

import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, ArraySpec, chain, specs_of
from fedbonsai.comms.codecs.float16 import Float16
from fedbonsai.comms.codecs.places import BITMAP, GAPS
from fedbonsai.comms.codecs.sparse import SPARSE, Sparse
from fedbonsai.comms.codecs.sparse_parts import ALL, CODED
from fedbonsai.comms.codecs.sparsify import TopK
from fedbonsai.comms.codecs.uniform import Uniform
from fedbonsai.comms.entropy.codec import CODED as STREAM
from fedbonsai.comms.entropy.codec import Entropy
from fedbonsai.comms.entropy.coders import constriction_runs
from fedbonsai.comms.errors import CorruptPacket, PacketError, TruncatedPacket
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = ("<f4", "<f2", "<f8", "|i1", "|u1", "<i2", "<i4", "<i8", "|b1", "<c16")
HEAD = 2 + 8  # of a tensor, and of the streams
SHAPES = ((), (0,), (1,), (9,), (300,), (4, 256), (8, 6, 3, 3), (3, 0, 2))


def normal(shape, density, seed=0):
    generator = np.random.default_rng(seed)
    return np.where(generator.random(shape) < density, generator.standard_normal(shape), 0).astype("<f4")


def round_trip(array, coder="rans", nonzeros=None):
    """Encodes and decodes; returns the bytes: form, flags, ..."""
    codec = Sparse(coder)
    spec = ArraySpec("t", array.shape, array.dtype.str, role="weight", nonzeros=nonzeros)
    arrays, reconstruction = codec.encode({"t": array}, context=NO_CONTEXT)
    assert reconstruction["t"] is array
    (layout,) = codec.layout((spec,))
    assert arrays[SPARSE].size <= layout.items
    found = Sparse().decode(arrays, expected=(spec,), context=NO_CONTEXT)["t"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    return arrays[SPARSE]


@st.composite
def tensors(draw):
    """Any type, shape and density; any bits, or normal values."""
    dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(SHAPES))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items = int(np.prod(shape))
    if dtype.kind == "b":
        values = generator.integers(2, size=items).astype(bool)
    elif draw(st.booleans()):
        values = np.frombuffer(generator.bytes(items * dtype.itemsize), dtype).copy()
    else:
        values = (generator.standard_normal(items) * 9).astype(dtype)
    values[generator.random(items) >= draw(st.sampled_from([0, 0.02, 0.3, 0.9, 1]))] = 0
    return values.reshape(shape)


@given(tensors(), st.sampled_from(["rans", "none"]), st.booleans())
def test_any_bits_are_restored_within_the_bound(array, coder, bounded):
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)
    count = int(np.count_nonzero(raw.any(1)))
    data = round_trip(array, coder, nonzeros=count if bounded else None)
    assert data.size <= HEAD + min(array.nbytes, -(-array.size // 8) + count * array.itemsize)


@pytest.mark.skipif(not constriction_runs(), reason="constriction is not installed")
def test_the_fast_coder():
    array = normal((100, 300), 0.1)
    assert round_trip(array, "ans").size < round_trip(array, "rans").size < round_trip(array, "none").size


def test_minus_zero_and_nan_are_entries():
    array = np.zeros(100, "<f4")
    array[[3, 50, 99]] = [-0.0, np.nan, -np.inf]
    data = round_trip(array, nonzeros=3)
    assert (
        data.size == HEAD + (9 + 1 + 2) + 3 * 4
    )  # gaps 3, 46 and 48: quotients by 16 in a byte, remainders in 12 bits


def test_each_form_is_taken_where_it_is_the_smallest():
    dense, half = normal((40, 40), 1), normal((8, 8), 0.5)
    assert round_trip(dense, "none")[0] == ALL
    assert round_trip(dense, "none").size == HEAD + dense.nbytes
    assert round_trip(half, "none")[0] == BITMAP
    assert round_trip(half, "none").size == HEAD + 8 + 4 * np.count_nonzero(half)
    assert round_trip(normal((40, 40), 0.1), "none")[0] == GAPS
    rows = np.where(np.arange(100)[:, None] % 10 == 0, normal((100, 500), 0.8), normal((100, 500), 0.01))
    assert round_trip(rows)[0] == CODED
    assert round_trip(rows).size < round_trip(rows, "none").size
    assert round_trip(np.zeros((512, 512), "<f4")).size == HEAD + 9


def test_a_few_zeros_do_not_pay_for_a_bitmap():
    array = normal((40, 40), 1)
    array[3, 4] = array[5, 6] = 0
    assert round_trip(array, "none")[0] == ALL
    array[7:9] = 0
    assert round_trip(array, "none")[0] == BITMAP


def test_bytes_of_values_that_repeat_are_entropy_coded():
    """Of a float the highest byte, with sign and exponent; of a rounded one the lowest too."""
    array = normal((100, 400), 0.2)
    half, rounded = array.astype("<f2"), array.astype("<f2").astype("<f4")
    assert round_trip(array)[1] & 0b1000
    assert round_trip(half)[1] == 0b10
    assert round_trip(half).size < 0.9 * round_trip(half, "none").size
    assert round_trip(rounded)[1] & 0b1001 == 0b1001
    assert round_trip(rounded).size < 0.6 * round_trip(rounded, "none").size


def test_symbols_take_at_most_the_bytes_of_the_entropy_codec():
    generator = np.random.default_rng(0)
    symbols = (generator.integers(-3, 4, (60, 500)) * (generator.random((60, 500)) < 0.1)).astype("|i1")
    stream = Entropy("rans").encode({"t": symbols}, context=NO_CONTEXT)[0][STREAM]
    assert round_trip(symbols).size == HEAD + stream.size
    assert round_trip(symbols, "none").size > stream.size


def test_a_top_k_bounds_the_bytes():
    codec = chain(TopK(0.1, scope="tensor"), Float16(), Sparse())
    array = normal((100, 100), 1)
    (spec,) = codec.layout(specs_of({"w": array}))
    assert spec.items == HEAD + 1250 + 1000 * 2
    assert codec.encode({"w": array}, context=NO_CONTEXT)[0][SPARSE].size < HEAD + 590 + 1000 * 2


def test_arrays_that_a_codec_added_pass():
    tensors = {"w": normal((10, 10), 0.2)}
    codec = chain(Uniform(granularity="channel"), Sparse())
    arrays, _ = codec.encode(tensors, context=NO_CONTEXT)
    assert arrays["w#scale"].dtype == np.float32
    assert [(spec.name, spec.exact) for spec in codec.layout(specs_of(tensors))] == [("w#scale", True), (SPARSE, False)]


def test_the_coder_is_checked(monkeypatch):
    with pytest.raises(ValueError, match="coder is 'zip'; it must be auto, rans, ans or none"):
        Sparse("zip")
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ValueError, match="coder is 'ans', which needs the package constriction"):
        Sparse("ans")


NO_STREAM = [0, 0, 0, 0]


def decoded(data, spec):
    return Sparse().decode({SPARSE: np.array(data, np.uint8)}, expected=(spec,), context=NO_CONTEXT)[spec.name]


@pytest.mark.parametrize(
    ("data", "dtype", "error", "words"),
    [
        ([], "<f4", TruncatedPacket, "'#sparse' ends after 0 bytes; 2 more"),
        ([4, 0], "<f4", CorruptPacket, "form 4 with flags 0, which no sender writes"),
        ([0, 16], "<f4", CorruptPacket, "form 0 with flags 16"),
        ([0, 1], "|i1", CorruptPacket, "form 0 with flags 1"),
        ([0, 0, *NO_STREAM, *NO_STREAM, *[0] * 9], "<f4", TruncatedPacket, "36 more are expected"),
        ([0, 0, *NO_STREAM, *NO_STREAM, *[0] * 37], "<f4", CorruptPacket, "1 bytes too many"),
        ([0, 0, *NO_STREAM, *NO_STREAM, *[1] * 36], "<f4", CorruptPacket, "more nonzero entries than the 3 expected"),
        ([0, 0, *NO_STREAM, *NO_STREAM, *[1] * 9], "|i1", CorruptPacket, "more nonzero entries than the 3 expected"),
        ([0, 0, 1, 0, 0, 0, 7], "<f4", CorruptPacket, "a stream of 1 bytes that stands for nothing"),
        ([0, 1, *NO_STREAM, *[255] * 4], "<f4", TruncatedPacket, "4294967295 more are expected"),
        ([1, 0, *NO_STREAM, 128, 0, *NO_STREAM, 1, 2, 3], "<f4", TruncatedPacket, "4 more are expected"),
        ([3, 0, *NO_STREAM], "|i1", TruncatedPacket, "empty"),
        ([3, 0, *NO_STREAM], "<f4", TruncatedPacket, "empty"),
    ],
)
def test_malformed_bytes(data, dtype, error, words):
    with pytest.raises(error, match=words):
        decoded(data, ArraySpec("w", (9,), dtype, nonzeros=3))


@settings(deadline=None)
@given(st.data(), tensors())
def test_damaged_bytes_raise_packet_errors_or_decode(data, array):
    spec = ArraySpec("w", array.shape, array.dtype.str)
    coded = Sparse().encode({"w": array}, context=NO_CONTEXT)[0][SPARSE]
    cut = data.draw(st.integers(0, len(coded)))
    noise = np.frombuffer(data.draw(st.binary(max_size=40)), np.uint8)
    flipped = coded.copy()
    flipped[data.draw(st.integers(0, len(coded) - 1))] ^= data.draw(st.integers(1, 255))
    for damaged in (flipped, coded[:cut], np.concatenate([coded[:cut], noise]), np.concatenate([coded[:2], noise])):
        try:
            found = decoded(damaged, spec)
        except PacketError:
            continue
        assert (found.dtype, found.shape) == (array.dtype, array.shape)


def test_a_hostile_head_allocates_little():
    """Numbers of entries and bytes are compared with the expected ones before anything is allocated for them."""
    spec = ArraySpec("w", (1000, 1000), "<f4", nonzeros=100)
    most = [255, 255, 255, 255]
    for data in (
        ([GAPS, 0, *NO_STREAM, *most, 0, *most]),
        [GAPS, 0, *NO_STREAM, 100, 0, 0, 0, 20, *most],
        [CODED, 0, *most],
        [BITMAP, 2, *NO_STREAM, 0],
    ):
        tracemalloc.start()
        try:
            with pytest.raises(PacketError):
                decoded(data, spec)
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


def test_a_stream_of_many_tensors():
    """Dense, sparse, empty and of symbols, in any order, each with its own form and values."""
    rows = np.where(np.arange(64)[:, None] % 8 == 0, normal((64, 200), 0.8, 3), 0).astype("<f2")
    symbols = (10 * normal((50, 90), 0.1, 2)).astype("|i1")
    tensors = {
        "rows": rows,
        "n": np.zeros(0, "<f4"),
        "s": symbols,
        "dense": normal((900,), 1, 4),
        "more": rows[::-1].copy(),
    }
    arrays, _ = Sparse().encode(tensors, context=NO_CONTEXT)
    found = Sparse().decode(arrays, expected=specs_of(tensors), context=NO_CONTEXT)
    assert [(name, array.tobytes()) for name, array in found.items()] == [(n, a.tobytes()) for n, a in tensors.items()]
    apart = sum(Sparse().encode({n: a}, context=NO_CONTEXT)[0][SPARSE].size for n, a in tensors.items())
    assert arrays[SPARSE].size < apart


def test_a_mask_of_other_symbols_than_one_is_a_mask():
    """A hostile stream may hold them; any is an entry."""
    mask = np.zeros((4, 50), np.uint8)
    mask[1, 3], mask[2, 7] = 7, 200
    stream = Entropy("rans").encode({"": mask}, context=NO_CONTEXT)[0][STREAM]
    data = [CODED, 0, stream.size, 0, 0, 0, *stream, *NO_STREAM, *np.array([1.5, -2], "<f4").tobytes()]
    found = decoded(data, ArraySpec("w", (4, 50), "<f4", nonzeros=2))
    assert (found[1, 3], found[2, 7], np.count_nonzero(found)) == (1.5, -2, 2)
