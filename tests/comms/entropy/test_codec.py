"""The entropy codec: lossless for any symbols, close to their entropy, within its bound, safe with any bytes."""

import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, ArraySpec, specs_of
from fedbonsai.comms.entropy.codec import CODED, Entropy, Rans
from fedbonsai.comms.entropy.coders import constriction_runs
from fedbonsai.comms.errors import CorruptPacket, MismatchedPacket, PacketError, TruncatedPacket, UnsupportedPacket
from hypothesis import given, settings
from hypothesis import strategies as st

from .test_coders import coders

SHAPES = [(), (0,), (5,), (7, 3), (4, 256), (8, 6, 3, 3), (3, 0, 2), (300,), (2, 2, 2, 2, 2)]


@st.composite
def symbols(draw):
    """Named arrays of symbols: any shape, type and density."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = {}
    for number in range(draw(st.integers(1, 4))):
        shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([np.int8, np.uint8]))
        density, most = draw(st.sampled_from([0, 0.01, 0.1, 0.5, 1])), draw(st.sampled_from([1, 3, 127]))
        low = -most - (most == 127) if dtype is np.int8 else 0
        values = generator.integers(low, most + 1, shape).astype(dtype)
        found[f"t{number}"] = np.asarray(values * (generator.random(shape) < density), dtype)
    return found


def sparse(generator, shape, density):
    """Random signs at random positions."""
    signs = generator.choice(np.array([-1, 1], np.int8), shape)
    return np.where(generator.random(shape) < density, signs, 0).astype(np.int8)


def round_trip(coder, tensors):
    """Encodes and decodes; returns the stream."""
    codec, specs = Entropy(coder), specs_of(tensors)
    arrays, reconstruction = codec.encode(tensors, context=NO_CONTEXT)
    assert reconstruction is tensors
    assert arrays[CODED].size <= codec.layout(specs)[-1].items
    found = Entropy().decode(arrays, expected=specs, context=NO_CONTEXT)
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)
    return arrays[CODED]


@coders
@given(tensors=symbols())
def test_any_symbols_are_restored(coder, tensors):
    round_trip(coder, tensors)


@coders
@given(tensors=symbols(), data=st.data())
def test_damaged_streams_raise_packet_errors_or_decode(coder, tensors, data):
    stream = Entropy(coder).encode(tensors, context=NO_CONTEXT)[0][CODED]
    specs = specs_of(tensors)
    cut = data.draw(st.integers(0, len(stream)))
    noise = np.frombuffer(data.draw(st.binary(max_size=40)), np.uint8)
    flipped = stream.copy()
    flipped[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    for damaged in (flipped, stream[:cut], np.concatenate([stream[:cut], noise]), np.concatenate([stream[:1], noise])):
        try:
            found = Entropy().decode({CODED: damaged}, expected=specs, context=NO_CONTEXT)
        except PacketError:
            continue
        assert specs_of(found) == specs


@coders
@pytest.mark.parametrize(("density", "most"), [(0.1, {"ans": 1.02, "rans": 1.07}), (0.01, {"ans": 1.02, "rans": 1.07})])
def test_entries_of_equal_density_cost_their_entropy(coder, density, most):
    tensors = {"a": sparse(np.random.default_rng(1), (256, 128, 3, 3), density)}
    count, items = np.count_nonzero(tensors["a"]), tensors["a"].size
    share = count / items
    entropy = count - items * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert len(round_trip(coder, tensors)) < most[coder] * entropy / 8 + 16


@coders
def test_dense_symbols_cost_their_entropy(coder):
    values = np.rint(np.random.default_rng(2).standard_normal((64, 1000)) * 28).clip(-127, 127).astype(np.int8)
    shares = np.unique(values, return_counts=True)[1] / values.size
    entropy = -values.size * (shares * np.log2(shares)).sum()
    assert len(round_trip(coder, {"a": values})) < 1.02 * entropy / 8


@coders
def test_channels_of_different_density_cost_less_than_the_entropy_of_the_whole(coder):
    generator = np.random.default_rng(3)
    rows, columns = generator.choice([0.001, 0.03, 0.3], 128), generator.choice([0.1, 1.0], 64)
    there = generator.random((128, 64, 9)) < rows[:, None, None] * columns[:, None]
    signs = np.where(generator.random(128) < 0.5, -1, 1)  # each row one way
    tensor = (there * signs[:, None, None]).astype(np.int8)
    share = there.mean()
    entropy = there.sum() - there.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert len(round_trip(coder, {"a": tensor})) < 0.65 * entropy / 8


@coders
def test_small_tensors_share_an_alphabet(coder):
    generator = np.random.default_rng(4)
    tensors = {f"bias{n}": generator.integers(-100, 100, 32).astype(np.int8) for n in range(20)}
    assert len(round_trip(coder, tensors)) < 20 * 32 + 60


@coders
def test_noise_is_stored_within_one_byte(coder):
    noise = np.random.default_rng(5).integers(0, 256, 50).astype(np.uint8)
    assert len(round_trip(coder, {"a": noise})) <= 51


@coders
def test_zeros_cost_a_few_bytes(coder):
    assert len(round_trip(coder, {f"t{n}": np.zeros((64, 64), np.int8) for n in range(10)})) < 16


@coders
def test_one_entry_among_a_million(coder):
    tensor = np.zeros((100, 100, 100), np.int8)
    tensor[99, 99, 98] = -128
    assert len(round_trip(coder, {"a": tensor})) < 32


@coders
def test_entries_all_at_the_end_of_a_long_gap(coder):
    tensor = np.zeros(1 << 20, np.int8)
    tensor[-3000:] = 1
    round_trip(coder, {"a": tensor})


def test_arrays_that_are_not_symbols_pass_unchanged():
    tensors = {"w": np.ones((2, 2), np.float32), "w#scale": np.ones(1, np.float32), "w#flags": np.ones(3, np.int8)}
    arrays, _ = Entropy().encode(tensors, context=NO_CONTEXT)
    assert arrays is tensors
    both = {**tensors, "q": np.ones(4, np.int8)}
    arrays, _ = Entropy().encode(both, context=NO_CONTEXT)
    assert list(arrays) == ["w", "w#scale", "w#flags", CODED]
    assert arrays["w"] is tensors["w"]
    found = Entropy().decode(arrays, expected=specs_of(both), context=NO_CONTEXT)
    assert list(found) == list(both)


def test_the_bound_depends_on_the_number_of_nonzero_entries():
    plain = ArraySpec("a", (1000, 1000), "|i1")
    few = ArraySpec("a", (1000, 1000), "|i1", nonzeros=10_000)
    (wide,), (narrow,) = Entropy().layout((plain,)), Entropy().layout((few,))
    assert 1_000_000 < wide.items < 1_020_000
    assert narrow.items < 25_000


@coders
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 3000), more=st.integers(0, 500))
def test_streams_keep_the_bound_of_a_looser_specification(coder, seed, count, more):
    generator = np.random.default_rng(seed)
    tensor = np.zeros((30, 100), np.int8)
    tensor.reshape(-1)[generator.permutation(3000)[:count]] = generator.integers(-128, 128, count)
    tensors = {"a": tensor}
    spec = ArraySpec("a", tensor.shape, "|i1", nonzeros=count + more)
    codec = Entropy(coder)
    arrays, _ = codec.encode(tensors, context=NO_CONTEXT)
    assert arrays[CODED].size <= codec.layout((spec,))[0].items
    found = codec.decode(arrays, expected=(spec,), context=NO_CONTEXT)
    np.testing.assert_array_equal(found["a"], tensor)


@coders
def test_more_nonzero_entries_than_expected_are_refused(coder):
    tensors = {"a": np.ones((10, 10), np.int8)}
    arrays, _ = Entropy(coder).encode(tensors, context=NO_CONTEXT)
    with pytest.raises(CorruptPacket, match="more nonzero entries"):
        Entropy().decode(arrays, expected=(ArraySpec("a", (10, 10), "|i1", nonzeros=99),), context=NO_CONTEXT)


@pytest.mark.parametrize(
    ("stream", "error", "words"),
    [
        ([], TruncatedPacket, "empty"),
        ([0, 1, 2], MismatchedPacket, "stored symbols take 2 bytes, where 4"),
        ([9, 0], UnsupportedPacket, "unknown entropy coder 9"),
        ([2, 200], TruncatedPacket, "raw bits"),
        ([2, 0, 1], TruncatedPacket, "too short"),
    ],
)
def test_malformed_streams(stream, error, words):
    with pytest.raises(error, match=words):
        Entropy().decode(
            {CODED: np.array(stream, np.uint8)}, expected=(ArraySpec("a", (2, 2), "|i1"),), context=NO_CONTEXT
        )


def test_options_are_checked():
    with pytest.raises(ValueError, match="coder is 'huffman'; it must be auto, ans or rans"):
        Entropy("huffman")


def test_rans_is_the_portable_coder_by_name():
    tensors = {"a": np.arange(9, dtype=np.int8)}
    portable = Rans().encode(tensors, context=NO_CONTEXT)[0][CODED]
    np.testing.assert_array_equal(portable, Entropy("rans").encode(tensors, context=NO_CONTEXT)[0][CODED])


def test_without_constriction_the_portable_coder_is_used(monkeypatch):
    tensors = {"a": sparse(np.random.default_rng(7), (64, 64), 0.1)}
    specs = specs_of(tensors)
    ans = Entropy().encode(tensors, context=NO_CONTEXT)[0]
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    assert not constriction_runs()
    arrays, _ = Entropy().encode(tensors, context=NO_CONTEXT)
    assert arrays[CODED][0] == 2
    np.testing.assert_array_equal(Entropy().decode(arrays, expected=specs, context=NO_CONTEXT)["a"], tensors["a"])
    if ans[CODED][0] == 1:
        with pytest.raises(UnsupportedPacket, match="constriction"):
            Entropy().decode(ans, expected=specs, context=NO_CONTEXT)
    with pytest.raises(ValueError, match="needs the package constriction"):
        Entropy("ans")
