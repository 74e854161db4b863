import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, ArraySpec
from fedbonsai.comms.codecs.lz4_codec import Lz4, lz4_bound
from fedbonsai.comms.errors import CorruptPacket


def test_shuffled_bytes_compress_better() -> None:
    weights = {"w": (np.random.default_rng(0).standard_normal(20_000) * 0.05).astype("<f4")}
    sizes = [Lz4(shuffle=s).encode(weights, context=NO_CONTEXT)[0]["w"].nbytes for s in (True, False)]
    assert sizes[0] < 0.95 * 80_000 < sizes[1]


def test_lz4_bound_holds_for_noise() -> None:
    for size in (0, 1, 255, 256, 10_000):
        noise = {"n": np.frombuffer(np.random.default_rng(size).bytes(size), np.uint8)}
        assert Lz4().encode(noise, context=NO_CONTEXT)[0]["n"].nbytes <= lz4_bound(size)
    assert lz4_bound(510) == 510 + 2 + 16


@pytest.mark.parametrize("level", [-1, 13])
def test_a_level_that_lz4_does_not_have(level: int) -> None:
    with pytest.raises(ValueError, match=f"level is {level}; it must be between 0 and 12"):
        Lz4(level=level)


@pytest.mark.parametrize("bad", [b"", b"\xff" * 9, b"\x10a", b"\x00\x00"], ids=["empty", "noise", "short", "trailing"])
def test_bytes_that_lz4_did_not_make(bad: bytes) -> None:
    with pytest.raises(CorruptPacket, match="'w'"):
        Lz4().decode({"w": np.frombuffer(bad, np.uint8)}, expected=(ArraySpec("w", (2,), "<f4"),), context=NO_CONTEXT)


def test_lz4_refuses_more_than_was_expected() -> None:
    bomb, _ = Lz4().encode({"w": np.zeros(1_000_000, np.uint8)}, context=NO_CONTEXT)
    with pytest.raises(CorruptPacket):
        Lz4().decode(bomb, expected=(ArraySpec("w", (10,), "|u1"),), context=NO_CONTEXT)


def test_lz4_refuses_a_part_of_an_element() -> None:
    odd, _ = Lz4(shuffle=False).encode({"w": np.zeros(7, np.uint8)}, context=NO_CONTEXT)
    with pytest.raises(CorruptPacket, match="7 bytes, not 8"):
        Lz4().decode(odd, expected=(ArraySpec("w", (2,), "<f4", exact=False),), context=NO_CONTEXT)
