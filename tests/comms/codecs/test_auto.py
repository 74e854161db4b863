"""The auto codec: the smallest result of several codecs, lossless, and safe with any bytes."""

import sys

import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, ArraySpec, IdentityCodec, specs_of
from fedbonsai.comms.codecs.auto import AUTO, Auto
from fedbonsai.comms.codecs.lz4_codec import Lz4
from fedbonsai.comms.entropy.codec import Entropy
from fedbonsai.comms.errors import CorruptPacket, PacketError, TruncatedPacket, UnsupportedPacket
from hypothesis import given
from hypothesis import strategies as st

GENERATOR = np.random.default_rng(0)
NOISE = {"a": GENERATOR.integers(-(2**31), 2**31, (30, 30)).astype(np.int32)}
REPEATS = {"a": np.tile(np.arange(4, dtype=np.float32), 100)}
SYMBOLS = {"a": GENERATOR.integers(-1, 2, (40, 50)).astype(np.int8), "a#scale": np.ones(1, np.float32)}


def sent_bytes(codec, tensors):
    return sum(array.nbytes for array in codec.encode(tensors, context=NO_CONTEXT)[0].values())


@pytest.mark.parametrize(
    ("tensors", "number"), [(NOISE, 0), (REPEATS, 1), (SYMBOLS, 2)], ids=["identity", "lz4", "entropy"]
)
def test_the_smallest_is_sent(tensors, number):
    codec, specs = Auto(("identity", "lz4", "entropy")), specs_of(tensors)
    arrays, reconstruction = codec.encode(tensors, context=NO_CONTEXT)
    assert reconstruction is tensors
    assert list(arrays) == [AUTO]
    assert arrays[AUTO][0] == number
    assert arrays[AUTO].size <= 9 + min(sent_bytes(c, tensors) for c in (IdentityCodec(), Lz4(), Entropy()))
    (layout,) = codec.layout(specs)
    assert arrays[AUTO].size <= layout.items
    found = codec.decode(arrays, expected=specs, context=NO_CONTEXT)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_of_equal_results_the_first_named_codec_is_chosen():
    nothing = {"a": np.zeros(0, np.float32)}
    for among in (("identity", "entropy"), ("entropy", "identity")):
        arrays, _ = Auto(among).encode(nothing, context=NO_CONTEXT)
        assert arrays[AUTO].tolist() == [0 if among[0] == "identity" else 2]


def test_a_receiver_without_constriction_reads_the_default_codecs(monkeypatch):
    arrays, _ = Auto().encode(SYMBOLS, context=NO_CONTEXT)
    assert arrays[AUTO][0] == 3  # the portable coder, though this sender may have constriction
    monkeypatch.setitem(sys.modules, "constriction", None)
    found = Auto().decode(arrays, expected=specs_of(SYMBOLS), context=NO_CONTEXT)
    for name, array in SYMBOLS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_only_the_listed_codecs_are_read():
    arrays, _ = Auto(("lz4",)).encode(REPEATS, context=NO_CONTEXT)
    with pytest.raises(UnsupportedPacket, match="codec number 1, where one of entropy, identity"):
        Auto(("entropy", "identity")).decode(arrays, expected=specs_of(REPEATS), context=NO_CONTEXT)


@pytest.mark.parametrize(("among", "found"), [(("zip",), "'zip'"), ((), "empty")])
def test_names_are_checked(among, found):
    with pytest.raises(ValueError, match=f"among is {found}; it must hold names of: identity, lz4, entropy, rans"):
        Auto(among)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], TruncatedPacket, "empty"),
        ([7], UnsupportedPacket, "codec number 7"),
        ([0, 1, 2], TruncatedPacket, "ends within 'a'"),
        ([0, 1, 2, 3, 4, 5], CorruptPacket, "1 bytes too many"),
        ([1, 0, 0], TruncatedPacket, "before the size of 'a'"),
        ([1, 255, 255, 255, 255], CorruptPacket, "claims 4294967295 bytes"),
    ],
)
def test_malformed_bytes(data, error, words):
    with pytest.raises(error, match=words):
        Auto().decode({AUTO: np.array(data, np.uint8)}, expected=(ArraySpec("a", (1,), "<f4"),), context=NO_CONTEXT)


@given(data=st.binary(max_size=60))
def test_any_bytes_raise_packet_errors_or_decode(data):
    specs = (ArraySpec("a", (3, 4), "|i1"), ArraySpec("b", (), "<f4"))
    try:
        found = Auto(("entropy", "rans", "lz4", "identity")).decode(
            {AUTO: np.frombuffer(data, np.uint8)}, expected=specs, context=NO_CONTEXT
        )
    except PacketError:
        return
    assert specs_of(found) == specs
