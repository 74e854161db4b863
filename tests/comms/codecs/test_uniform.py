import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, Array, Arrays, ArraySpec, Context, specs_of
from fedbonsai.comms.codecs.uniform import Uniform
from fedbonsai.comms.errors import CorruptPacket, MismatchedPacket, PacketError, UnfitPacket
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst


def coded(codec: Uniform, array: Array, *, seed: int = 0) -> tuple[Arrays, Array]:
    """The encoded arrays and the reconstruction, after checking that the receiver decodes the same bits."""
    tensors = {"t": array}
    arrays, held = codec.encode(tensors, context=Context(seed=seed))
    layout = codec.layout(specs_of(tensors))
    assert [(s.name, s.shape, s.dtype) for s in layout] == [(n, a.shape, a.dtype.str) for n, a in arrays.items()]
    found = codec.decode(arrays, expected=specs_of(tensors), context=NO_CONTEXT)
    assert found["t"].tobytes() == held["t"].tobytes()
    assert (held["t"].dtype, held["t"].shape) == (array.dtype, array.shape)
    return arrays, held["t"]


def test_the_signed_grid_by_hand() -> None:
    arrays, held = coded(Uniform(bits=4), np.array([7.0, -3.4, 0.4, -0.6], "<f4"))
    assert arrays["t"].tolist() == [7, -3, 0, -1]
    assert arrays["t#scale"].item() == 1.0
    assert held.tolist() == [7, -3, 0, -1]
    arrays, held = coded(Uniform(bits=2), np.array([2.0, -1.5, 0.9], "<f4"))
    assert (arrays["t"].tolist(), held.tolist()) == ([1, -1, 0], [2, -2, 0])


def test_the_unsigned_grid_by_hand() -> None:
    arrays, held = coded(Uniform(bits=4, signed=False), np.array([30.0, 0.0, 2.9, 3.1], "<f4"))
    assert arrays["t"].dtype == np.uint8
    assert arrays["t"].tolist() == [15, 0, 1, 2]
    assert held.tolist() == [30, 0, 2, 4]
    with pytest.raises(ValueError, match="tensor 't' holds -1; uniform with signed=False sends no negative entries"):
        coded(Uniform(signed=False), np.array([1.0, -1.0], "<f4"))


def test_auto_chooses_the_grid_of_each_tensor() -> None:
    arrays, held = coded(Uniform(bits=4, signed="auto"), np.array([30.0, 0.0, 2.9, 14.1], "<f4"))
    assert (arrays["t"].tolist(), arrays["t#scale"].item()) == ([-1, 0, 1, 7], -2.0)  # 15 is -1 in four bits
    assert held.tolist() == [30, 0, 2, 14]
    arrays, held = coded(Uniform(bits=8, signed="auto"), np.array([255.0, 128.0, 127.0], "<f4"))
    assert (arrays["t"].tolist(), held.tolist()) == ([-1, -128, 127], [255, 128, 127])
    arrays, held = coded(Uniform(bits=4, signed="auto"), np.array([7.0, -0.6], "<f4"))
    assert (arrays["t"].tolist(), arrays["t#scale"].item(), held.tolist()) == ([7, -1], 1.0, [7, -1])
    channels = Uniform(bits=2, signed="auto", granularity="channel")
    assert coded(channels, np.array([[0], [-1]], "<f4"))[1].tolist() == [
        [0],
        [-1],
    ]  # the grid is chosen for the whole tensor
    assert coded(channels, np.array([[0], [3]], "<f4"))[1].tolist() == [[0], [3]]


def test_a_step_size_for_each_channel() -> None:
    array = np.array([[7.0, 1.0], [0.7, 0.1], [0.0, 0.0]], "<f4")
    arrays, held = coded(Uniform(bits=4, granularity="channel"), array)
    assert arrays["t"].tolist() == [[7, 1], [7, 1], [0, 0]]
    assert arrays["t#scale"].tolist() == [1.0, pytest.approx(0.1), 0.0]
    np.testing.assert_allclose(held, array, rtol=1e-6)
    assert coded(Uniform(granularity="channel"), array[:, 0])[0]["t#scale"].shape == ()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("signed", [True, False, "auto"])
def test_empty_tensors_and_zeros(signed: bool | str, granularity: str) -> None:
    codec = Uniform(signed=signed, granularity=granularity, stochastic=True)
    for shape in ((0,), (0, 3), (3, 0, 2), (), (2, 2)):
        arrays, held = coded(codec, np.zeros(shape, "<f4"))
        assert not arrays["t"].any()
        assert not arrays["t#scale"].any()
        assert not held.any()


def test_other_types_and_orders() -> None:
    assert coded(Uniform(), np.array(-3.0, "<f4"))[1].item() == -3.0
    assert coded(Uniform(bits=4), np.array([[7, 1], [2, 3]], "<f8").T)[1].tolist() == [[7, 2], [1, 3]]
    assert coded(Uniform(), np.array([65504, -1], "<f2"))[1].tolist() == [65504, 0]
    with pytest.raises(ValueError, match="tensor 't' holds NaN, infinity, or more than float32"):
        coded(Uniform(), np.array([1e300]))


FLOATS = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(
    FLOATS, st.integers(2, 8), st.sampled_from([True, "auto"]), st.sampled_from(["tensor", "channel"]), st.booleans()
)
def test_the_error_is_at_most_half_a_step(
    array: Array, bits: int, signed: bool | str, granularity: str, stochastic: bool
) -> None:
    codec = Uniform(bits=bits, signed=signed, granularity=granularity, stochastic=stochastic)
    arrays, held = coded(codec, array, seed=3)
    step = np.abs(arrays["t#scale"].astype(np.float64)).reshape(arrays["t#scale"].shape + (1,) * (array.ndim - 1))
    error = np.abs(held.astype(np.float64) - array)
    assert (error <= step * (1.0 if stochastic else 0.5) * (1 + 1e-4)).all()
    assert np.isfinite(held).all()
    assert not held[array == 0].any()


def test_extremes_stay_on_the_grid() -> None:
    largest, smallest = np.finfo(np.float32).max, np.float32(1e-45)
    for value in (largest, np.nextafter(largest, np.float32(0)), smallest, 190 * smallest):
        for bits in range(2, 9):
            held = coded(Uniform(bits=bits), np.array([value, -value], "<f4"))[1]
            assert np.abs(held - [value, -value]).max() <= 1e-6 * value + 95 * smallest


def test_stochastic_rounding_is_unbiased() -> None:
    array = np.repeat(np.array([127.0, 0.25, -1.7, 3.5, 0.0], "<f4"), 20_000).reshape(5, -1)
    held = coded(Uniform(stochastic=True), array, seed=11)[1]
    # The variance of one is at most a quarter: five standard errors are 0.018.
    np.testing.assert_allclose(held.mean(axis=1, dtype=np.float64), [127.0, 0.25, -1.7, 3.5, 0.0], atol=0.018)
    assert set(np.unique(held[2]).tolist()) == {-2.0, -1.0}


def test_stochastic_rounding_repeats_by_seed_and_differs_by_tensor() -> None:
    array = np.full((1, 1000), 0.5, "<f4")
    array[0, 0] = 127
    codec = Uniform(stochastic=True)
    first, again, other = (coded(codec, array, seed=seed)[0]["t"].tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other
    arrays, _ = codec.encode({"t": array, "u": array}, context=Context(seed=1))
    assert arrays["t"].tolist() == first
    assert arrays["u"].tolist() != first


def test_roles_and_bounds_stay() -> None:
    layout = Uniform(roles=("weight",)).layout(
        (ArraySpec("w", (2, 2), "<f4", role="weight", nonzeros=3), ArraySpec("b", (2,), "<f4"))
    )
    assert layout == (
        ArraySpec("w", (2, 2), "|i1", role="weight", nonzeros=3),
        ArraySpec("w#scale", (), "<f4"),
        ArraySpec("b", (2,), "<f4"),
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1}, "bits is 1; it must be between 2 and 8"),
        ({"signed": "maybe"}, "signed is 'maybe'; it must be one of True, False, 'auto'"),
        ({"granularity": "row"}, "granularity is 'row'; it must be one of 'tensor', 'channel'"),
    ],
)
def test_wrong_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Uniform(**options)


SYMBOLS, SCALE = np.array([1, 0, -7], "|i1"), np.array(1.0, "<f4")


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        ({"t": SYMBOLS}, MismatchedPacket),
        ({"t#scale": SCALE}, MismatchedPacket),
        ({"t": SYMBOLS[:2], "t#scale": SCALE}, MismatchedPacket),
        ({"t": np.zeros(4, "|i1"), "t#scale": SCALE}, MismatchedPacket),
        ({"t": SYMBOLS.view("|u1"), "t#scale": SCALE}, MismatchedPacket),
        ({"t": SYMBOLS, "t#scale": SCALE.astype("<f8")}, MismatchedPacket),
        ({"t": SYMBOLS, "t#scale": np.ones(3, "<f4")}, MismatchedPacket),
        ({"t": np.array([0, 0, -8], "|i1"), "t#scale": SCALE}, CorruptPacket),
        ({"t": np.array([0, 0, 8], "|i1"), "t#scale": SCALE}, CorruptPacket),
        ({"t": SYMBOLS, "t#scale": np.array(np.nan, "<f4")}, UnfitPacket),
        ({"t": SYMBOLS, "t#scale": np.array(-np.inf, "<f4")}, UnfitPacket),
        ({"t": SYMBOLS, "t#scale": np.array(3e38, "<f4")}, UnfitPacket),
    ],
)
def test_malformed_arrays(arrays: Arrays, error: type[PacketError]) -> None:
    with pytest.raises(error, match="'t"):
        Uniform(bits=4).decode(arrays, expected=(ArraySpec("t", (3,), "<f4"),), context=NO_CONTEXT)


def test_symbols_beyond_an_unsigned_grid() -> None:
    for signed, symbol in (
        (False, np.array([16], "|u1")),
        ("auto", np.array([-9], "|i1")),
        ("auto", np.array([16], "|i1")),
    ):
        scale = np.array(-1.0 if signed == "auto" else 1.0, "<f4")
        with pytest.raises(CorruptPacket, match="'t' holds symbols that 4 bits do not"):
            Uniform(bits=4, signed=signed).decode(
                {"t": symbol, "t#scale": scale}, expected=(ArraySpec("t", (1,), "<f4"),), context=NO_CONTEXT
            )
