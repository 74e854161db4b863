"""Hostile senders of entropy-coded streams: the memory of the receiver and the size of streams stay within their bounds."""

import contextlib
import tracemalloc

import msgspec
import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, ArraySpec, specs_of
from fedbonsai.comms.entropy import density
from fedbonsai.comms.entropy import stream as stream_stages
from fedbonsai.comms.entropy.alphabets import Alphabet
from fedbonsai.comms.entropy.bounds import plain_limit, stream_bound
from fedbonsai.comms.entropy.codec import CODED, Entropy
from fedbonsai.comms.entropy.coders import SymbolWriter
from fedbonsai.comms.entropy.signs import SignModel
from fedbonsai.comms.entropy.tensors import Dense, Sparse, describe_plainly
from fedbonsai.comms.errors import CorruptPacket, PacketError

from ..receivers import stated_bytes
from .test_codec import round_trip, sparse
from .test_coders import coders


def peak_of(stream, specs):
    """Peak of memory while decoding, whether the stream is refused or not."""
    tracemalloc.start()
    with contextlib.suppress(PacketError):
        Entropy().decode({CODED: stream}, expected=specs, context=NO_CONTEXT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def written(coder, *tensors):
    """The stream of a sender that describes tensors in any way."""
    writer = SymbolWriter(coder)
    stream_stages.put(writer, list(tensors), None)
    return writer.finish()


def one_entry(shape, axes):
    """A sparse tensor with a 1 at position 5, and with these classes of its axes."""
    classes = density.DensityClasses(
        density.shapes_of(shape)[0], 10, [None if a is None else np.array(a) for a in axes]
    )
    ones = Alphabet(1, 0, np.array([1]))
    return Sparse(0, np.array([5]), np.array([1]), np.array([0]), classes, ones, SignModel(0, 0, 0, np.zeros(0, int)))


@coders
def test_damaged_streams_stay_within_the_stated_memory(coder):
    generator = np.random.default_rng(6)
    tensors = {"a": sparse(generator, (256, 128, 3, 3), 0.3), "b": sparse(generator, (64, 256), 0.02)}
    stream = Entropy(coder).encode(tensors, context=NO_CONTEXT)[0][CODED]
    specs = tuple(
        msgspec.structs.replace(s, nonzeros=int(np.count_nonzero(tensors[s.name]))) for s in specs_of(tensors)
    )
    for _ in range(10):
        damaged = stream.copy()
        damaged[-200:] = generator.integers(1, 256, 200)
        assert peak_of(damaged, specs) < stated_bytes(specs)


@coders
@pytest.mark.parametrize("shape", [(300_000,), (300_000, 1)])
def test_long_vectors_with_few_entries_take_little_memory(coder, shape):
    vector = np.zeros(shape, np.int8)
    vector[::3000] = 1
    stream = Entropy(coder).encode({"a": vector}, context=NO_CONTEXT)[0][CODED]
    assert peak_of(stream, (ArraySpec("a", shape, "|i1", nonzeros=100),)) < 5 * 300_000


@coders
def test_dense_coding_of_a_tensor_with_few_nonzero_entries_is_refused(coder):
    few, some = (ArraySpec("a", (1000, 160), "|i1", nonzeros=count) for count in (10_000, 10_001))  # from 1/16 on
    values = np.full(160_000, 128, np.uint8)
    forged = written(coder, Dense(values, np.bincount(values, minlength=256), Alphabet(128, 0, np.array([300, 1]))))
    assert Entropy().decode({CODED: forged}, expected=(some,), context=NO_CONTEXT)["a"].max() == 0
    assert peak_of(forged, (some,)) < stated_bytes([some])
    with pytest.raises(CorruptPacket, match="holds all symbols of 'a', which has at most 10000 nonzero entries"):
        Entropy().decode({CODED: forged}, expected=(few,), context=NO_CONTEXT)


@coders
def test_classes_for_more_channels_than_the_entries_can_pay_for_are_refused(coder):
    # 8 of 800 entries cost at most 8 x (7 + 2) bits, a class at least 0.8 bits: a sender has fewer than 90 classes.
    for rows, columns, refused in ((89, 9, False), (90, 9, True)):
        forged = written(coder, one_entry((rows, columns), [[0] * rows, None, None]))
        spec = ArraySpec("a", (rows, columns), "|i1", nonzeros=8)
        if not refused:
            assert Entropy().decode({CODED: forged}, expected=(spec,), context=NO_CONTEXT)["a"].sum() == 1
            continue
        with pytest.raises(CorruptPacket, match="has classes for 90 channels of 'a', too many"):
            Entropy().decode({CODED: forged}, expected=(spec,), context=NO_CONTEXT)
    forged = written(coder, one_entry((2, 9), [[0, 1], None, None]))
    with pytest.raises(CorruptPacket, match="classes for 2 channels"):  # no sender fits classes to fewer than 8 entries
        Entropy().decode({CODED: forged}, expected=(ArraySpec("a", (2, 9), "|i1", nonzeros=7),), context=NO_CONTEXT)


@coders
def test_the_largest_number_of_classes_stays_within_the_stated_memory(coder):
    """23 on each of three axes are 12,167 combinations in each tensor."""
    steps = np.arange(23) - 11
    forged = one_entry((23, 23, 7, 7), [steps, steps, np.arange(49) % 23 - 11])
    specs = tuple(ArraySpec(f"t{n}", (23, 23, 7, 7), "|i1", nonzeros=8) for n in range(10))
    stream = written(coder, *[forged] * 10)
    assert len(Entropy().decode({CODED: stream}, expected=specs, context=NO_CONTEXT)) == 10
    assert peak_of(stream, specs) < stated_bytes(specs)


@coders
def test_a_class_beyond_the_last_is_refused(coder):
    for step in (11, -11, 12, -12):
        forged = written(coder, one_entry((2, 9), [[0, step], None, None]))
        spec = ArraySpec("a", (2, 9), "|i1")
        if abs(step) == 11:
            assert Entropy().decode({CODED: forged}, expected=(spec,), context=NO_CONTEXT)["a"].sum() == 1
            continue
        with pytest.raises(CorruptPacket, match="a density class beyond 11"):
            Entropy().decode({CODED: forged}, expected=(spec,), context=NO_CONTEXT)


@coders
def test_plain_coding_keeps_its_limit_in_the_worst_case(coder):
    # One entry in 31 costs log2(31) + 1.4 bits for its gap; the limit allows five, and a reserve for the rest.
    tensor = np.zeros((1000, 124), np.int8)
    at = np.random.default_rng(8).permutation(tensor.size)[:4000]
    tensor.reshape(-1)[at] = np.random.default_rng(8).integers(1, 128, 4000)
    tensor.reshape(-1)[at.max()] = -128  # with constriction's coder, zeros at the end would cost nothing
    stream = written(coder, describe_plainly(tensor))
    assert stream.size > 4000 * 15 / 8
    assert (
        stream.size
        <= plain_limit([(tensor.size, 4000)])
        < stream_bound([ArraySpec("a", (1000, 124), "|i1", nonzeros=4000)])
    )


@coders
def test_plain_coding_is_used_if_the_model_costs_more(coder, monkeypatch):
    tensor = np.zeros((64, 64), np.int8)
    tensor[:, 5] = 1
    plain = written(coder, describe_plainly(tensor))
    wasteful = describe_plainly(tensor)._replace(alphabet=Alphabet(0, 0, np.array([1, 200] * 128)))
    assert written(coder, wasteful).size > stream_bound([ArraySpec("a", (64, 64), "|i1", nonzeros=64)])
    monkeypatch.setattr("fedbonsai.comms.entropy.codec.describe", lambda arrays: ([wasteful], None))
    np.testing.assert_array_equal(round_trip(coder, {"a": tensor}), plain)
