import struct
import tracemalloc

import hypothesis.extra.numpy as hnp
import msgspec
import numpy as np
import pytest
import xxhash
from fedbonsai.comms.codec import NO_CONTEXT, Array, Arrays, ArraySpec, Codec, IdentityCodec, chain, specs_of
from fedbonsai.comms.codecs.lz4_codec import Lz4
from fedbonsai.comms.errors import (
    CorruptPacket,
    MismatchedPacket,
    PacketError,
    TruncatedPacket,
    UnfitPacket,
    UnsupportedPacket,
)
from fedbonsai.comms.packet import PacketKind, Stamp, read_stamp, seal, sealed_bytes, unseal
from hypothesis import given
from hypothesis import strategies as st

from .fakes import Double, Drop, Halve, Liar

STAMP = Stamp(kind=PacketKind.UPDATE, version=3, state_hash=2**63 + 5, plan=17, attempt=2, sequence=9, axes=3)
EXACT: tuple[Codec, ...] = (IdentityCodec(), Halve())
BOUNDED: tuple[Codec, ...] = (Lz4(), chain(Halve(), Lz4()), Drop(), chain(Drop(), Lz4()))
DTYPES = ("<f4", "<f8", "<f2", "|i1", "|u1", "<i4", "<i8", "|b1")
WEIGHTS: dict[str, Array] = {
    "conv.weight": np.arange(12, dtype="<f4").reshape(3, 4) / 4,
    "steps": np.array(5, "<i8"),
    "mask": np.array([True, False, True]),
    "none": np.zeros((0, 2), "<f4"),
}

arrays = st.dictionaries(
    st.text(max_size=8),
    st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))),
    max_size=4,
)
numbers = st.dictionaries(
    st.text(min_size=1, max_size=8),
    hnp.arrays(
        "<f4",
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
        elements=st.floats(-4, 4, width=16),
    ),
    max_size=4,
)


def sealed(tensors: Arrays = WEIGHTS, codec: Codec | None = None) -> Array:
    return seal(tensors, codec=codec or IdentityCodec(), context=NO_CONTEXT, stamp=STAMP)[0]


def opened(packet: Array, tensors: Arrays = WEIGHTS, codec: Codec | None = None, **options: object) -> Arrays:
    return unseal(packet, codec=codec or IdentityCodec(), expected=specs_of(tensors), context=NO_CONTEXT, **options)


def resigned(packet: Array) -> Array:
    """The packet with a correct checksum, as a hostile sender makes it."""
    packet[-8:] = np.frombuffer(xxhash.xxh3_64_digest(packet[:-8].data), np.uint8)
    return packet


def framed(header: bytes, payload: bytes = b"") -> Array:
    """A packet of any header and payload, otherwise well-formed."""
    fixed = struct.pack("<4sBBHIIIIQQQ", b"FBZ1", 2, 2, 0, len(header), 0, 0, 0, 0, 0, len(payload))
    body = fixed + header + bytes(-len(header) % 8) + payload
    return np.frombuffer(body + xxhash.xxh3_64_digest(body), np.uint8)


def assert_same_bits(found: Arrays, wanted: Arrays) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@given(arrays, st.sampled_from([IdentityCodec(), Lz4(), chain(Lz4(level=2), Lz4())]))
def test_round_trip(tensors: Arrays, codec: Codec) -> None:
    packet = sealed(tensors, codec)
    assert packet.dtype == np.uint8
    assert packet.ndim == 1
    assert_same_bits(opened(packet, tensors, codec, stamp=STAMP), tensors)
    assert read_stamp(packet) == STAMP


@given(numbers, st.sampled_from(EXACT + BOUNDED))
def test_the_receiver_gets_the_reconstruction_and_sizes_are_as_predicted(tensors: Arrays, codec: Codec) -> None:
    packet, reconstruction = seal(tensors, codec=codec, context=NO_CONTEXT, stamp=STAMP)
    found = opened(packet, tensors, codec, finite=True)
    assert_same_bits({n: found[n] for n in tensors}, {n: reconstruction[n] for n in tensors})
    size, exact = sealed_bytes(codec, specs_of(tensors))
    assert exact == (codec in EXACT or not tensors)
    assert packet.nbytes == size if exact else packet.nbytes <= size


def test_size_by_hand() -> None:
    # 48 fixed, 8 for the empty list of lengths, two float32 of which the second is aligned after 3 bytes, 8 of checksum
    tensors = {"a": np.zeros(3, np.uint8), "b": np.zeros((), "<f4")}
    assert sealed(tensors).nbytes == 48 + 8 + (3 + 1 + 4) + 8 == 72
    assert sealed_bytes(IdentityCodec(), specs_of(tensors)) == (72, True)


def test_arrays_are_aligned_views_of_the_packet() -> None:
    tensors = {"odd": np.ones(3, np.uint8), "w": np.ones((2, 2), "<f8"), "h": np.ones(1, "<f2"), "v": np.ones(5, "<f4")}
    packet = sealed(tensors)
    packet.flags.writeable = False
    for array in opened(packet, tensors).values():
        assert np.shares_memory(array, packet)
        assert array.flags.aligned
        assert not array.flags.writeable


def test_equal_input_gives_equal_bytes() -> None:
    assert [sealed().tobytes() for _ in range(20)] == [sealed().tobytes()] * 20


@pytest.mark.parametrize("codec", [IdentityCodec(), Lz4()], ids=["identity", "lz4"])
def test_every_truncation_is_refused(codec: Codec) -> None:
    packet = sealed(codec=codec)
    for length in range(packet.nbytes):
        with pytest.raises(PacketError):
            opened(packet[:length], codec=codec)
    with pytest.raises(TruncatedPacket, match="shorter than its fixed part"):
        opened(packet[:55], codec=codec)
    with pytest.raises(TruncatedPacket, match=f"says {packet.nbytes} bytes and has {packet.nbytes - 1}"):
        opened(packet[:-1], codec=codec)
    with pytest.raises(TruncatedPacket):
        opened(np.append(packet, np.uint8(0)), codec=codec)


@pytest.mark.parametrize("codec", [IdentityCodec(), Lz4()], ids=["identity", "lz4"])
def test_every_flipped_byte_is_refused(codec: Codec) -> None:
    packet = sealed(codec=codec)
    for position in range(packet.nbytes):
        for mask in (1, 128, 255):
            damaged = packet.copy()
            damaged[position] ^= mask
            with pytest.raises(PacketError):
                opened(damaged, codec=codec)


@pytest.mark.parametrize("codec", [IdentityCodec(), Lz4()], ids=["identity", "lz4"])
def test_a_flipped_byte_with_a_correct_checksum_raises_packet_errors_only(codec: Codec) -> None:
    packet = sealed(codec=codec)
    for position in range(packet.nbytes - 8):
        for mask in (1, 128, 255):
            damaged = packet.copy()
            damaged[position] ^= mask
            try:
                found = opened(resigned(damaged), codec=codec)
            except PacketError:
                continue
            assert {n: (a.dtype, a.shape) for n, a in found.items()} == {
                n: (a.dtype, a.shape) for n, a in WEIGHTS.items()
            }


@given(st.binary(max_size=300), st.sampled_from([IdentityCodec(), Lz4(), chain(Lz4(), Lz4())]))
def test_noise_is_refused(data: bytes, codec: Codec) -> None:
    with pytest.raises(PacketError):
        opened(np.frombuffer(data, np.uint8), codec=codec)


@given(st.binary(max_size=60), st.binary(max_size=60), st.sampled_from([IdentityCodec(), Lz4(), chain(Lz4(), Lz4())]))
def test_noise_in_a_valid_frame_is_refused(header: bytes, payload: bytes, codec: Codec) -> None:
    with pytest.raises(PacketError):
        opened(framed(header, payload), codec=codec)


@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=3), st.binary(max_size=60))
def test_arbitrary_lengths_are_refused(lengths: list[int], payload: bytes) -> None:
    with pytest.raises(PacketError):
        opened(framed(msgspec.msgpack.encode(lengths), payload), {"w": np.zeros(64, "<f4")}, Lz4())


@pytest.mark.parametrize(
    "header",
    [
        msgspec.msgpack.encode([2**62]),
        msgspec.msgpack.encode([4 * 2**30]),
        msgspec.msgpack.encode([-1]),
        b"\xdd\xff\xff\xff\xff",  # a list of 4 billion, and then nothing
        b"\xdd\x00\x10\x00\x00" + bytes(2**20),  # a list of a million zeros: as objects, 8 MB
    ],
    ids=["2**62 bytes", "4 GiB", "-1 bytes", "4 billion lengths", "a million lengths"],
)
def test_a_header_with_large_claims_is_refused_without_allocating(header: bytes) -> None:
    packet = framed(header, bytes(16))
    tracemalloc.start()
    try:
        with pytest.raises(PacketError):
            opened(packet, {"w": np.zeros(4, "<f4")}, Lz4())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000 + len(header)


def test_a_fixed_part_with_large_claims_is_refused() -> None:
    packet = sealed()
    packet[8:12] = 255  # header length
    packet[40:48] = 255  # payload length
    with pytest.raises(TruncatedPacket, match="says 18446744078004518"):
        opened(resigned(packet))


def test_lengths_must_fit_types_and_bounds() -> None:
    one = {"w": np.array([1.0, 0.0], "<f4")}  # sealed as one position and one value, 4 bytes each
    assert opened(sealed(one, Drop()), one, Drop())["w"].tolist() == [1.0, 0.0]
    for lengths, size in (([4, 12], 16), ([4, 3], 7)):  # more values than elements; three quarters of a value
        with pytest.raises(MismatchedPacket, match=f"'w/values' claims {lengths[1]} bytes; at most 8 are expected"):
            opened(framed(msgspec.msgpack.encode(lengths), bytes(size)), one, Drop())
    with pytest.raises(MismatchedPacket, match="3 lengths, where 2 are expected"):
        opened(framed(msgspec.msgpack.encode([0, 0, 0])), one, Drop())


def test_tensors_of_another_model_are_refused() -> None:
    with pytest.raises(MismatchedPacket, match="are expected"):
        opened(sealed(), {"conv.weight": np.zeros((4, 4), "<f4")})


def test_the_wrong_fields_of_a_stamp_are_named() -> None:
    packet = sealed()
    wanted = msgspec.structs.replace(STAMP, plan=18, version=4)
    with pytest.raises(MismatchedPacket, match=r"version is 3, expected 4, plan is 17, expected 18$"):
        opened(packet, stamp=wanted)
    assert_same_bits(opened(packet, stamp=STAMP), WEIGHTS)
    assert_same_bits(opened(packet), WEIGHTS)


def test_a_stamp_holds_its_largest_numbers() -> None:
    large = Stamp(
        kind=PacketKind.LABELS,
        version=2**32 - 1,
        state_hash=2**64 - 1,
        plan=2**64 - 1,
        attempt=2**16 - 1,
        sequence=2**32 - 1,
        axes=2**32 - 1,
    )
    assert read_stamp(seal({}, codec=IdentityCodec(), context=NO_CONTEXT, stamp=large)[0]) == large


@pytest.mark.parametrize(
    ("position", "value", "error", "words"),
    [
        (0, 0, CorruptPacket, "first four bytes"),
        (4, 1, UnsupportedPacket, "format 1; this receiver reads format 2"),
        (5, 99, UnsupportedPacket, "unknown kind of packet 99"),
    ],
)
def test_packets_of_other_formats_and_kinds(position: int, value: int, error: type[PacketError], words: str) -> None:
    packet = sealed()
    packet[position] = value
    with pytest.raises(error, match=words):
        opened(resigned(packet))


def test_only_flat_bytes_are_a_packet() -> None:
    packet = np.append(sealed(), np.zeros(-sealed().nbytes % 8, np.uint8))
    for other in (packet.view("<f4"), packet.reshape(2, -1), packet[::2], packet.astype(object)):
        with pytest.raises(CorruptPacket, match="one flat array of bytes"):
            opened(other)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "<c8"])
def test_values_that_are_not_finite_are_refused_on_request(value: float, dtype: str) -> None:
    bad = {"good": np.ones(2, dtype), "bad": np.array([1, value, 2]).astype(dtype)}
    with pytest.raises(UnfitPacket, match="'bad' holds NaN or infinity"):
        opened(sealed(bad), bad, finite=True)
    assert_same_bits(opened(sealed(bad), bad), bad)


def test_opposite_infinities_do_not_cancel() -> None:
    bad = {"w": np.array([np.inf, -np.inf], "<f4")}
    with pytest.raises(UnfitPacket):
        opened(sealed(bad), bad, finite=True)


def test_large_but_finite_values_pass_though_their_sum_overflows() -> None:
    large = {"w": np.full(1000, 3e38, "<f4"), "i": np.full(3, 2**31 - 1, "<i4"), "empty": np.zeros(0, "<f4")}
    assert_same_bits(opened(sealed(large), large, finite=True), large)


@pytest.mark.parametrize("codec", [IdentityCodec(), Lz4(), chain(Halve(), Lz4()), Double()], ids=str)
def test_differences_formed_while_sealing_are_those_formed_before(codec: Codec) -> None:
    generator = np.random.default_rng(1)
    large = generator.standard_normal((300, 500)).astype("<f4")  # more than is written in one piece
    tensors = {
        "large": large,
        "strided": large[::2, ::3],
        "number": np.array(1.5, "<f4"),
        "none": np.zeros((0, 3), "<f4"),
    }
    minus = {name: generator.standard_normal(array.shape).astype("<f4") for name, array in tensors.items()}
    before = {name: array.tobytes() for name, array in tensors.items()}
    wanted, held = seal(
        {name: np.asarray(array - minus[name]) for name, array in tensors.items()},
        codec=codec,
        context=NO_CONTEXT,
        stamp=STAMP,
    )
    packet, reconstruction = seal(tensors, codec=codec, context=NO_CONTEXT, stamp=STAMP, minus=minus)
    assert packet.tobytes() == wanted.tobytes()
    assert_same_bits(reconstruction, held)
    assert {name: array.tobytes() for name, array in tensors.items()} == before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [("type", "'w' as <f4 of shape"), ("shape", r"'w' as <i4 of shape \(3,\)"), ("name", r"arrays \['w/more'\]")],
)
def test_a_codec_must_keep_its_layout(wrong: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sealed({"w": np.zeros(2, "<f4")}, Liar(wrong))


def test_items_and_bytes_of_specifications() -> None:
    assert [spec.num_bytes for spec in specs_of(WEIGHTS)] == [48, 8, 3, 0]
    assert ArraySpec("w", (2, 3), "<f8").items == 6
    assert ArraySpec("w", (), "<f8").items == 1
