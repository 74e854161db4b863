"""Forms of positions: each restores them, the smaller is taken, and hostile bytes are refused."""

import numpy as np
import pytest
from fedbonsai.comms.codec import ArraySpec
from fedbonsai.comms.codecs.places import BITMAP, GAPS, ByteReader, as_number, put_places, take_places
from fedbonsai.comms.errors import CorruptPacket, PacketError, TruncatedPacket
from hypothesis import given
from hypothesis import strategies as st


def spec_of(shape, nonzeros=None):
    return ArraySpec("w", shape, "<f4", nonzeros=nonzeros)


def packed(flat, shape):
    form, pieces = put_places(np.array(flat, np.int64), int(np.prod(shape)))
    return form, np.concatenate(pieces)


def taken(form, data, spec):
    reader = ByteReader(np.array(data, np.uint8), spec.name)
    flat = take_places(form, reader, spec)
    reader.finish()
    return flat.tolist()


def test_a_bitmap_by_hand():
    form, data = packed([0, 1, 3, 6, 8], (3, 3))
    assert (form, data.tolist()) == (BITMAP, [0b11010010, 0b10000000])
    assert taken(form, data, spec_of((3, 3))) == [0, 1, 3, 6, 8]


def test_gaps_by_hand():
    """Positions 100, 300, 399 of 400: gaps 100, 199, 98 are 3, 6 and 3 times 32, and 4, 7 and 2."""
    form, data = packed([100, 300, 399], (400,))
    assert form == GAPS
    assert data[:9].tolist() == [3, 0, 0, 0, 5, 2, 0, 0, 0]
    assert data[9:11].tolist() == [0b00010000, 0b00100010]  # 0001, 0000001, 0001
    remainders = np.unpackbits(data[11:])[:15].reshape(5, 3)  # [bit, gap], lowest bit first
    assert (remainders.T @ (1 << np.arange(5))).tolist() == [4, 7, 2]
    assert data.size == 4 + 1 + 4 + 2 + 2
    assert taken(form, data, spec_of((400,))) == [100, 300, 399]


def test_no_position_takes_a_head():
    form, data = packed([], (400,))
    assert (form, data.tolist()) == (GAPS, [0] * 9)
    assert taken(form, data, spec_of((400,))) == []


@pytest.mark.parametrize("density", [0.002, 0.02, 0.1, 0.3])
def test_even_gaps_cost_little_more_than_the_entropy_of_the_density(density):
    flat = np.flatnonzero(np.random.default_rng(0).random(200_000) < density)
    share = len(flat) / 200_000
    entropy_bytes = -200_000 * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    form, data = packed(flat, (200_000,))
    assert form == GAPS
    assert data.size < 1.02 * entropy_bytes + 16


@given(
    st.sampled_from([(1,), (7,), (300,), (4, 256), (8, 6, 3, 3), (3000,)]),
    st.sampled_from([0, 0.003, 0.05, 0.5, 0.97]),
    st.integers(0, 2**32 - 1),
)
def test_any_positions_are_restored_in_the_smaller_form(shape, density, seed):
    items = int(np.prod(shape))
    flat = np.flatnonzero(np.random.default_rng(seed).random(items) < density)
    form, data = packed(flat, shape)
    assert data.size <= -(-items // 8)
    assert taken(form, data, spec_of(shape, nonzeros=len(flat))) == flat.tolist()


def gaps(count, low_bits, unary, remainders=b""):
    data = np.array(unary, np.uint8)
    return [*as_number(count), low_bits, *as_number(data.size), *data, *remainders]


@pytest.mark.parametrize(
    ("form", "data", "error", "words"),
    [
        (BITMAP, [0], TruncatedPacket, "'w' ends after 1 bytes; 2 more are expected"),
        (BITMAP, [0xFF, 0], CorruptPacket, "8 nonzero entries, where at most 3 are expected"),
        (BITMAP, [0, 1], CorruptPacket, "entries beyond its end"),
        (GAPS, [1, 0], TruncatedPacket, "ends after 2 bytes"),
        (GAPS, gaps(4, 0, [0xF0]), CorruptPacket, "4 nonzero entries, where at most 3 are expected"),
        (GAPS, gaps(2**31, 0, []), CorruptPacket, "2147483648 nonzero entries"),
        (GAPS, gaps(1, 60, [0x80]), CorruptPacket, "gaps of 60 bits, more than its 9 entries need"),
        (GAPS, gaps(2, 0, [0x80]), CorruptPacket, "has 1 gaps, where 2 are expected"),
        (GAPS, gaps(1, 0, [0, 0x20]), CorruptPacket, "entries beyond its end"),
        (GAPS, gaps(1, 3, [0x80]), TruncatedPacket, "1 more are expected"),
    ],
)
def test_malformed_positions(form, data, error, words):
    with pytest.raises(error, match=words):
        taken(form, data, spec_of((9,), nonzeros=3))


@given(st.sampled_from([BITMAP, GAPS]), st.binary(max_size=60))
def test_any_bytes_raise_packet_errors_or_are_positions(form, data):
    try:
        flat = taken(form, np.frombuffer(data, np.uint8), spec_of((5, 40), nonzeros=20))
    except PacketError:
        return
    assert flat == sorted(set(flat))
    assert not flat or flat[-1] < 200
    assert len(flat) <= 20
