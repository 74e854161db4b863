from dataclasses import replace

import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT, Array, ArraySpec, Context, chain, needs_reference, specs_of
from fedbonsai.comms.codecs.lz4_codec import Lz4
from fedbonsai.comms.codecs.sparsify import Threshold, TopK, largest, magnitude_bits
from fedbonsai.comms.errors import MismatchedPacket
from hypothesis import given
from hypothesis import strategies as st

W = np.array([[0.5, -3.0], [0.0, 1.0]], "<f4")
V = np.array([[-2.0, 0.25]], "<f4")


def sparse(codec: TopK | Threshold, *tensors: Array) -> list[list[float]]:
    """The sparsified tensors, flat."""
    arrays, held = codec.encode({f"t{n}": t for n, t in enumerate(tensors)}, context=NO_CONTEXT)
    assert held is arrays
    for found, tensor in zip(arrays.values(), tensors, strict=True):
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
    return [array.reshape(-1).tolist() for array in arrays.values()]


def bounds(codec: TopK | Threshold, *shapes: tuple[int, ...]) -> list[int | None]:
    return [s.nonzeros for s in codec.layout(tuple(ArraySpec(f"t{n}", s, "<f4") for n, s in enumerate(shapes)))]


def test_scope_global_compares_all_tensors() -> None:
    assert sparse(TopK(0.5), W, V) == [[0, -3, 0, 1], [-2, 0]]
    assert bounds(TopK(0.5), (2, 2), (1, 2)) == [3, 2]


def test_scope_tensor_keeps_a_share_of_each() -> None:
    assert sparse(TopK(0.25, scope="tensor"), W, V) == [[0, -3, 0, 0], [-2, 0]]
    assert bounds(TopK(0.25, scope="tensor"), (2, 2), (1, 2)) == [1, 1]


def test_scope_normalised_keeps_entries_of_small_tensors() -> None:
    small = V / 1000
    assert sparse(TopK(0.5), W, small) == [[0.5, -3, 0, 1], [0, 0]]
    # Over the root mean squares (1.601 and 0.001425): .31, 1.87, 0, .62 and 1.40, .18.
    assert sparse(TopK(0.34, scope="normalised"), W, small) == [[0, -3, 0, 0], [float(small[0, 0]), 0]]
    assert bounds(TopK(0.34, scope="normalised"), (2, 2), (1, 2)) == [2, 2]


def test_scope_normalised_keeps_a_floor_of_each_tensor() -> None:
    flat, peaked = np.full((2, 2), 0.5, "<f4"), np.array([[9, 1, 0.5, 0.25, 0.1, 9, 0.1, 0.1]], "<f4")
    assert sparse(TopK(0.2, scope="normalised"), flat, peaked) == [[0.5, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0]]
    assert sparse(TopK(0.2, scope="global"), flat, peaked) == [[0, 0, 0, 0], [9, 0, 0, 0, 0, 9, 0, 0]]
    kept = sparse(TopK(0.01, scope="normalised", floor=2), flat, peaked)
    assert kept == [[0.5, 0.5, 0, 0], [9, 0, 0, 0, 0, 9, 0, 0]]
    assert bounds(TopK(0.01, scope="normalised", floor=2), (2, 2), (1, 8)) == [4, 4]


def test_scope_normalised_loses_no_entry_to_underflow_or_overflow() -> None:
    extreme = np.array([[3e38, 1e-45, -3e38, 0]], "<f4")
    assert sparse(TopK(1.0, scope="normalised"), extreme) == [extreme.reshape(-1).tolist()]


@pytest.mark.parametrize(("density", "items", "kept"), [(0.001, 10, 1), (0.25, 10, 3), (0.24, 10, 2), (1.0, 10, 10)])
def test_a_share_is_rounded_half_up_to_at_least_one_entry(density: float, items: int, kept: int) -> None:
    values = np.arange(1, items + 1, dtype="<f4").reshape(1, -1)
    for scope in ("tensor", "global", "normalised"):
        codec = TopK(density, scope=scope)
        assert np.count_nonzero(sparse(codec, values)[0]) == kept
        assert bounds(codec, (1, items)) == [kept]


def test_at_least_floor_entries_are_kept() -> None:
    assert sparse(TopK(0.01, scope="tensor", floor=2), W) == [[0, -3, 0, 1]]
    assert sparse(TopK(0.01, floor=2), W, V) == [[0, -3, 0, 0], [-2, 0]]
    assert bounds(TopK(0.01, scope="tensor", floor=9), (2, 2)) == [4]


def test_zeros_do_not_count_as_kept() -> None:
    zeros = np.array([[0.0, -0.0, 0.0]], "<f4")
    for scope in ("tensor", "global", "normalised"):
        arrays, _ = TopK(0.9, scope=scope).encode({"z": zeros}, context=NO_CONTEXT)
        assert arrays["z"].tobytes() == bytes(12)  # not even minus zero
        assert sparse(TopK(0.9, scope=scope), zeros, W)[1] == [0.5, -3, 0, 1]


@pytest.mark.parametrize("scope", ["tensor", "global", "normalised"])
@pytest.mark.parametrize("by", ["sent", "reference"])
def test_density_one_selects_nothing(scope: str, by: str) -> None:
    tensors = {"w": np.array([[0.0, -0.0, 1e-45]], "<f4"), "empty": np.zeros((0, 3), "<f4")}
    codec = TopK(1.0, scope=scope, by=by)
    assert codec.encode(tensors, context=NO_CONTEXT) == (tensors, tensors)
    assert not codec.needs_reference
    assert bounds(codec, (1, 3), (0, 3)) == [3, 0]


def test_the_reference_decides_what_is_kept() -> None:
    context = Context(reference={"w": np.array([[1, 9], [-5, 0]], "<f4"), "v": np.array([[0.5, -7]], "<f4")})
    tensors = {"w": W, "v": V}
    for scope, wanted in (("tensor", [[[0, -3], [0, 0]], [[0, 0.25]]]), ("global", [[[0, -3], [0, 0]], [[0, 0.25]]])):
        arrays, held = TopK(1 / 3, scope=scope, by="reference").encode(tensors, context=context)
        assert held is arrays
        assert [array.tolist() for array in arrays.values()] == wanted
    arrays, _ = TopK(0.5, by="reference").encode(tensors, context=context)
    assert [array.tolist() for array in arrays.values()] == [[[0, -3], [0, 0]], [[0, 0.25]]]  # the third is a zero of w
    arrays, _ = TopK(0.75, scope="tensor", by="reference").encode({"w": W}, context=context)
    assert arrays["w"].tolist() == [[0.5, -3], [0, 0]]  # the zero of the reference is not among its largest
    assert bounds(TopK(0.5, by="reference"), (2, 2), (1, 2)) == [3, 2]


def test_a_reference_is_scaled_by_its_own_root_mean_square() -> None:
    context = Context(reference={"w": W, "v": V / 1000})
    ones = {"w": np.ones((2, 2), "<f4"), "v": np.ones((1, 2), "<f4")}
    arrays, _ = TopK(0.34, scope="normalised", by="reference").encode(ones, context=context)
    assert [array.tolist() for array in arrays.values()] == [[[0, 1], [0, 0]], [[1, 0]]]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ({}, r"topk by 'reference' found no reference for tensor 'w' of shape \(2, 2\); only an update has references"),
        ({"w": V}, r"found a reference of shape \(1, 2\) for tensor 'w'"),
        ({"w": np.full((2, 2), np.nan)}, "tensor 'w' holds NaN"),
    ],
)
def test_wrong_references(reference: dict[str, Array], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TopK(0.5, by="reference").encode({"w": W}, context=Context(reference=reference))


def test_an_entry_that_is_not_finite_is_found_where_the_reference_would_drop_it() -> None:
    damaged = np.array([[1, np.inf]], "<f4")
    with pytest.raises(ValueError, match="tensor 'w' holds NaN, infinity"):
        TopK(0.5, by="reference").encode({"w": damaged}, context=Context(reference={"w": np.array([[2.0, 1.0]])}))


def test_a_chain_needs_a_reference_if_a_stage_does() -> None:
    assert needs_reference(chain(TopK(0.1, by="reference"), Lz4()))
    assert not needs_reference(chain(TopK(0.1), Lz4()))
    assert not needs_reference(Lz4())


@pytest.mark.parametrize("scope", ["tensor", "global", "normalised"])
def test_odd_shapes_and_types(scope: str) -> None:
    codec = TopK(0.5, scope=scope, roles=("weight", "vector"))
    assert sparse(codec, np.zeros((0, 3), "<f4")) == [[]]
    assert sparse(codec, np.array(-4.0, "<f4")) == [[-4]]
    assert sparse(codec, W.T) == [[0, 0, -3, 1]]
    mixed = sparse(codec, W.astype("<f2"), np.array([1e300, 0.0, -1e299, 0.0]))
    # Over the root mean squares: .31, 1.87, .62 and 1.99, .20.
    relative = [[0.5, -3, 0, 1], [1e300, 0, 0, 0]]
    assert mixed == (relative if scope == "normalised" else [[0, -3, 0, 1], [1e300, 0, -1e299, 0]])


def test_only_tensors_of_the_roles_are_sparsified() -> None:
    tensors = {"w": W, "bias": np.array([99.0], "<f4"), "mean": np.full((1, 2), 99, "<f4"), "n": np.array([[9]])}
    context = Context(roles={"mean": "statistic"})
    arrays, _ = TopK(0.25).encode(tensors, context=context)
    assert arrays["w"].tolist() == [[0, -3], [0, 0]]
    assert all(arrays[name] is tensors[name] for name in ("bias", "mean", "n"))
    layout = TopK(0.25).layout(specs_of(tensors, context.roles))
    assert [spec.nonzeros for spec in layout] == [1, None, None, None]


def test_sampling_does_not_change_the_result() -> None:
    generator = np.random.default_rng(1)
    tensors = {f"t{n}": (generator.laplace(size=(200, 150)) * n).round(1).astype("<f4") for n in range(1, 4)}
    for scope in ("tensor", "global", "normalised"):
        codec = TopK(0.013, scope=scope)
        found = [c.encode(tensors, context=NO_CONTEXT)[0] for c in (codec, replace(codec, sampled=False))]
        for name in tensors:
            assert found[0][name].tobytes() == found[1][name].tobytes()
        assert sum(np.count_nonzero(array) for array in found[0].values()) == 1170


def test_threshold_keeps_entries_of_at_least_its_value() -> None:
    assert sparse(Threshold(1.0), W, V) == [[0, -3, 0, 1], [-2, 0]]
    assert sparse(Threshold(1.0, relative=True), W, V) == [[0, -3, 0, 0], [-2, 0]]
    assert sparse(Threshold(0.1), np.array([[0.1, 0.09]], "<f4")) == [[float(np.float32(0.1)), 0]]
    assert bounds(Threshold(1.0), (2, 2)) == [None]


def test_very_small_and_very_large_thresholds() -> None:
    assert sparse(Threshold(1e-300), np.array([[0.0, 1e-45]], "<f4")) == [[0, float(np.float32(1e-45))]]
    assert sparse(Threshold(1e300), W) == [[0, 0, 0, 0]]
    assert sparse(Threshold(1e299), np.array([[1e300, 1.0]])) == [[1e300, 0]]
    assert sparse(Threshold(1.0, relative=True), np.zeros((0, 2), "<f4"), np.zeros((1, 2), "<f4")) == [[], [0, 0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.0}, "density is 0.0; it must be above 0, and 1 at most"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": 0.1, "floor": 0}, "floor is 0; it must be 1 or more"),
        ({"density": 0.1, "by": "size"}, "by is 'size'; it must be one of 'sent', 'reference'"),
        ({"density": 0.1, "scope": "layer"}, "scope is 'layer'; it must be one of 'tensor', 'global', 'normalised'"),
    ],
)
def test_wrong_options_of_topk(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TopK(**options)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_wrong_thresholds(value: float) -> None:
    with pytest.raises(ValueError, match=f"value is {value}; it must be above 0 and finite"):
        Threshold(value)


def test_unexpected_arrays() -> None:
    for codec in (TopK(0.5), Threshold(1.0)):
        with pytest.raises(MismatchedPacket, match="'w'"):
            codec.decode({"w": W.astype("<f8")}, expected=specs_of({"w": W}), context=NO_CONTEXT)


def test_one_sparsifier_in_a_chain() -> None:
    with pytest.raises(
        ValueError, match="a chain holds one sparsifier at most; this one holds CodecChain and Threshold"
    ):
        chain(chain(TopK(0.1), Lz4()), Threshold(1.0))
    assert chain(Lz4(), TopK(0.1)).sparsifies
    assert not chain(Lz4(), Lz4()).sparsifies


def by_sorting(arrays: list[Array], count: int) -> list[list[int]]:
    """The positions of the largest entries by a full, stable sort."""
    whole = np.abs(np.concatenate(arrays).astype(np.float64))
    order = np.argsort(-whole, kind="stable")[:count]
    kept = np.zeros(whole.size, bool)
    kept[order[whole[order] > 0]] = True
    borders = np.cumsum([a.size for a in arrays])[:-1]
    return [np.flatnonzero(part).tolist() for part in np.split(kept, borders)]


def chosen(arrays: list[Array], count: int, *, sampled: bool = True) -> list[list[int]]:
    return [at.tolist() for at in largest([magnitude_bits(a) for a in arrays], count, sampled=sampled)]


def test_the_largest_by_hand() -> None:
    first, second = np.array([0.5, -3.0, 0.0, 1.0], "<f4"), np.array([-2.0, 0.25], "<f4")
    assert chosen([first, second], 1) == [[1], []]
    assert chosen([first, second], 3) == [[1, 3], [0]]
    assert chosen([first, second], 6) == [[0, 1, 3], [0, 1]]
    assert chosen([first, second], 0) == [[], []]


def test_of_equal_entries_the_earlier_are_chosen() -> None:
    ones = np.array([1.0, -1.0, 1.0], "<f4")
    assert chosen([ones, ones], 4) == [[0, 1, 2], [0]]
    assert chosen([np.zeros(0, "<f4"), ones, 2 * ones], 4) == [[], [0], [0, 1, 2]]


def test_zeros_are_never_chosen() -> None:
    assert chosen([np.array([0.0, -0.0, 1e-45], "<f4")], 3) == [[2]]
    assert chosen([np.zeros(40_000, "<f4")], 400) == [[]]
    assert largest([], 3) == []


def test_bits_order_like_magnitudes() -> None:
    values = np.array([-np.inf, 3.4e38, -1.0, 1e-45, -0.0], "<f4")
    bits = magnitude_bits(values)
    assert bits.dtype == np.int32
    assert (np.diff(bits) < 0).all()
    assert bits[-1] == 0
    assert magnitude_bits(np.array(-2.0), np.float64)[0] == np.float64(2.0).view(np.int64)
    assert magnitude_bits(np.array([[1, 2], [3, 4]], "<f2").T).view(np.float32).tolist() == [1, 3, 2, 4]


@given(
    st.lists(st.lists(st.integers(-4, 4), max_size=12), min_size=1, max_size=4).filter(any),
    st.integers(0, 30),
    st.booleans(),
)
def test_the_largest_are_those_of_a_full_sort(numbers: list[list[int]], count: int, sampled: bool) -> None:
    arrays = [np.array(some, "<f4") for some in numbers]
    assert chosen(arrays, count, sampled=sampled) == by_sorting(arrays, count)


@pytest.mark.parametrize("density", [0.0001, 0.0025, 0.1, 0.9])
@pytest.mark.parametrize("distribution", ["normal", "laplace", "few values", "mostly zero"])
def test_sampling_large_arrays_gives_the_same_result(distribution: str, density: float) -> None:
    generator = np.random.default_rng(5)
    large = {
        "normal": generator.standard_normal(60_000),
        "laplace": generator.laplace(size=60_000),
        "few values": generator.integers(-3, 4, 60_000),
        "mostly zero": generator.standard_normal(60_000) * (generator.random(60_000) < 0.002),
    }[distribution].astype("<f4")
    arrays = [large, 10 * large[:7], np.zeros(0, "<f4"), 0.1 * large[:9000]]
    count = int(density * sum(a.size for a in arrays))
    wanted = by_sorting(arrays, count)
    assert chosen(arrays, count) == wanted
    assert chosen(arrays, count, sampled=False) == wanted


def test_a_sample_with_a_too_high_threshold_is_detected() -> None:
    misleading = np.ones(61_000, "<f4")
    misleading[::61] = 2.0  # all entries of the sample
    misleading[1::2] *= 0.5
    assert chosen([misleading], 5_000) == by_sorting([misleading], 5_000)
