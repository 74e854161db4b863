import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, Array, Arrays, ArraySpec, chain, specs_of
from fedbonsai.comms.codecs.sparsify import TopK
from fedbonsai.comms.codecs.ternary import Ternary
from fedbonsai.comms.errors import CorruptPacket, MismatchedPacket, PacketError, UnfitPacket
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst


def coded(codec: Ternary, *tensors: Array) -> tuple[Arrays, list[list[float]]]:
    """The encoded arrays and the reconstruction, after checking that the receiver decodes the same bits."""
    named = {f"t{n}": t for n, t in enumerate(tensors)}
    arrays, held = codec.encode(named, context=NO_CONTEXT)
    for spec in codec.layout(specs_of(named)):
        assert (arrays[spec.name].shape, arrays[spec.name].dtype.str) == (spec.shape, spec.dtype)
    found = codec.decode(arrays, expected=specs_of(named), context=NO_CONTEXT)
    for name, tensor in named.items():
        assert found[name].tobytes() == held[name].tobytes()
        assert (held[name].dtype, held[name].shape) == (tensor.dtype, tensor.shape)
    return arrays, [held[name].reshape(-1).tolist() for name in named]


def row(*values: float) -> Array:
    return np.array([values], "<f4")


def test_one_level_is_the_mean_of_each_sign() -> None:
    arrays, held = coded(Ternary(), row(1, 0, 3, -4, -1, -1))
    assert arrays["t0"].tolist() == [[1, 0, 1, -1, -1, -1]]
    assert arrays["t0#levels"].tolist() == [2, -2]
    assert held == [[2, 0, 2, -2, -2, -2]]


def test_two_levels_split_each_sign_into_equal_halves() -> None:
    arrays, held = coded(Ternary(2), row(1, 2, 8, 9, -4, 0, -2))
    assert arrays["t0"].tolist() == [[1, 1, 2, 2, -2, 0, -1]]
    assert arrays["t0#levels"].tolist() == [1.5, 8.5, -4, -2]
    assert held == [[1.5, 1.5, 8.5, 8.5, -4, 0, -2]]


def test_equal_values_share_a_bin() -> None:
    arrays, held = coded(Ternary(2), row(1, 1, 1, 4))
    assert arrays["t0"].tolist() == [[1, 1, 1, 2]]
    assert held == [[1, 1, 1, 4]]
    assert coded(Ternary(3), row(5, 5, 5, 5))[1] == [[5, 5, 5, 5]]


def test_an_empty_bin_has_level_zero() -> None:
    arrays, held = coded(Ternary(2), row(3))
    assert (arrays["t0"].tolist(), arrays["t0#levels"].tolist(), held) == ([[2]], [0, 3, 0, 0], [[3]])
    assert coded(Ternary(), row(-1, -3))[0]["t0#levels"].tolist() == [0, -2]


def test_levels_of_scope_global_are_those_of_all_tensors() -> None:
    arrays, held = coded(Ternary(scope="global"), row(1, -2), row(3), row())
    assert arrays["#levels"].tolist() == [2, -2]
    assert held == [[2, -2], [2], []]
    names = [s.name for s in Ternary(scope="global").layout(specs_of({"a": row(1), "b": row(1)}))]
    assert names == ["a", "b", "#levels"]
    with pytest.raises(ValueError, match="a chain holds one ternary of scope 'global' at most"):
        chain(Ternary(scope="global"), Ternary(scope="global", roles=("vector",))).layout(
            specs_of({"w": row(1), "b": np.ones(1, "<f4")})
        )


def test_the_median_rule_drops_half() -> None:
    # |.| = 1 2 3 4 5 6 7: the median is 4; of 4 6 7 and of 5 the medians are 6 and 5.
    arrays, held = coded(Ternary(rule="median"), row(1, -2, 3, 4, -5, 6, 7))
    assert arrays["t0"].tolist() == [[0, 0, 0, 1, -1, 1, 1]]
    assert held == [[0, 0, 0, 6, -5, 6, 6]]


def test_the_median_rule_halves_again_for_more_levels() -> None:
    # 5 ... 9 remain; they are split into 5 6 7 and 8 9, then into 5 6, 7, 8, 9; the lower median of two is the smaller one.
    values = row(1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert coded(Ternary(2, rule="median"), values)[1] == [[0, 0, 0, 0, 6, 6, 6, 8, 8]]
    assert coded(Ternary(4, rule="median"), values)[1] == [[0, 0, 0, 0, 5, 5, 7, 8, 9]]
    assert coded(Ternary(4, rule="median"), row(2, 2, -2))[1] == [[2, 2, -2]]


@pytest.mark.parametrize(("sparsity", "remaining"), [(0.90, 51_079), (0.95, 25_540), (0.99, 5_108), (0.995, 2_554)])
def test_as_many_entries_remain_as_the_authors_count(sparsity: float, remaining: int) -> None:
    residual = np.random.default_rng(0).laplace(size=(1, 1_021_572)).astype("<f4")
    kept = int(1_021_572 * (1 - sparsity))  # rounded down, as theirs
    codec = chain(TopK(kept / 1_021_572), Ternary(rule="median", scope="global"))
    arrays, _ = codec.encode({"w": residual}, context=NO_CONTEXT)
    assert np.count_nonzero(arrays["w"]) == remaining


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("rule", ["centroid", "median"])
def test_empty_tensors_zeros_and_other_types(rule: str, scope: str) -> None:
    codec = Ternary(2, rule=rule, scope=scope, roles=("weight", "vector"))
    assert coded(codec, np.zeros((0, 3), "<f4"), np.zeros((2, 2), "<f4"))[1] == [[], [0, 0, 0, 0]]
    assert coded(codec, np.array(-0.0, "<f4"))[1] == [[0]]
    assert coded(codec, np.array(7.5))[1] == [[7.5]]
    assert coded(codec, np.array([[1, 0], [2, 0]], "<f2").T)[1] == [[1, 2, 0, 0]]
    with pytest.raises(ValueError, match="tensor 't0' holds NaN, infinity, or more than float32"):
        coded(codec, np.array([1e300, 1]))


FLOATS = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=2, max_dims=3, min_side=0, max_side=6),
    elements=st.one_of(st.just(0.0), st.floats(-(2.0**100), 2.0**100, width=32)),
)


@given(FLOATS, st.integers(1, 9), st.sampled_from(["tensor", "global"]))
def test_signs_stay_zeros_stay_and_levels_are_among_the_values(array: Array, levels: int, scope: str) -> None:
    arrays, (held,) = coded(Ternary(levels, scope=scope), array)
    found = np.array(held, np.float32).reshape(array.shape)
    assert np.array_equal(np.sign(arrays["t0"]), np.sign(array))
    assert (np.abs(found) <= np.abs(array).max(initial=0)).all()
    assert np.square(found - array, dtype=np.float64).sum() <= np.square(array, dtype=np.float64).sum() * (1 + 1e-6)


def test_the_centroids_have_the_smallest_squared_error() -> None:
    array = np.random.default_rng(2).laplace(size=(40, 40)).astype("<f4")
    _, (held,) = coded(Ternary(), array)
    best = np.square(held - array.reshape(-1)).sum()
    for factor in (0.97, 1.03):
        assert np.square(np.array(held) * factor - array.reshape(-1)).sum() > best


def test_dense_and_sparse_symbols_decode_alike() -> None:
    levels = np.array([0.1, -0.2], "<f4")
    for share in (0.01, 0.9):
        generator = np.random.default_rng(1)
        symbols = (generator.integers(-1, 2, (50, 50)) * (generator.random((50, 50)) < share)).astype("|i1")
        found = Ternary().decode(
            {"w": symbols, "w#levels": levels}, expected=(ArraySpec("w", (50, 50), "<f4"),), context=NO_CONTEXT
        )["w"]
        assert found.tobytes() == np.where(symbols > 0, levels[0], np.where(symbols < 0, levels[1], 0)).tobytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": 0}, "levels is 0; it must be between 1 and 127"),
        ({"levels": 128}, "levels is 128"),
        ({"levels": 6, "rule": "median"}, "levels is 6; with rule 'median' it must be a power of two"),
        ({"rule": "mean"}, "rule is 'mean'; it must be one of 'centroid', 'median'"),
        ({"scope": "channel"}, "scope is 'channel'; it must be one of 'tensor', 'global'"),
    ],
)
def test_wrong_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Ternary(**options)


SYMBOLS, LEVELS = np.array([[1, 0, -1]], "|i1"), np.array([2, -2], "<f4")


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        ({"t": SYMBOLS}, MismatchedPacket),
        ({"t#levels": LEVELS}, MismatchedPacket),
        ({"t": SYMBOLS[:, :2], "t#levels": LEVELS}, MismatchedPacket),
        ({"t": np.zeros((1, 4), "|i1"), "t#levels": LEVELS}, MismatchedPacket),
        ({"t": SYMBOLS.view("|u1"), "t#levels": LEVELS}, MismatchedPacket),
        ({"t": SYMBOLS, "t#levels": LEVELS[:1]}, MismatchedPacket),
        ({"t": SYMBOLS, "t#levels": LEVELS.view("<i4")}, MismatchedPacket),
        ({"t": 2 * SYMBOLS, "t#levels": LEVELS}, CorruptPacket),
        ({"t": np.array([[-128, 0, 0]], "|i1"), "t#levels": LEVELS}, CorruptPacket),
        ({"t": SYMBOLS, "t#levels": np.array([np.nan, 0], "<f4")}, UnfitPacket),
        ({"t": SYMBOLS, "t#levels": np.array([0, np.inf], "<f4")}, UnfitPacket),
    ],
)
def test_malformed_arrays(arrays: Arrays, error: type[PacketError]) -> None:
    with pytest.raises(error, match="'t"):
        Ternary().decode(arrays, expected=(ArraySpec("t", (1, 3), "<f4"),), context=NO_CONTEXT)
