import numpy as np
import pytest
from fedbonsai.comms.codec import Array
from fedbonsai.comms.codecs.selection import largest, magnitude_bits
from hypothesis import given, settings
from hypothesis import strategies as st


def by_sorting(arrays: list[Array], count: int) -> list[list[int]]:
    """The same set by a full, stable sort."""
    whole = np.abs(np.concatenate(arrays).astype(np.float64))
    order = np.argsort(-whole, kind="stable")[:count]
    kept = np.zeros(whole.size, bool)
    kept[order[whole[order] > 0]] = True
    borders = np.cumsum([a.size for a in arrays])[:-1]
    return [np.flatnonzero(part).tolist() for part in np.split(kept, borders)]


def chosen(arrays: list[Array], count: int, *, sampled: bool = True) -> list[list[int]]:
    return [at.tolist() for at in largest([magnitude_bits(a) for a in arrays], count, sampled=sampled)]


def test_with_a_pencil() -> None:
    first, second = np.array([0.5, -3.0, 0.0, 1.0], "<f4"), np.array([-2.0, 0.25], "<f4")
    assert chosen([first, second], 1) == [[1], []]
    assert chosen([first, second], 3) == [[1, 3], [0]]
    assert chosen([first, second], 6) == [[0, 1, 3], [0, 1]]
    assert chosen([first, second], 0) == [[], []]


def test_equals_go_by_array_and_position() -> None:
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


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(-4, 4), max_size=12), min_size=1, max_size=4).filter(any),
    st.integers(0, 30),
    st.booleans(),
)
def test_the_set_of_a_full_sort(numbers: list[list[int]], count: int, sampled: bool) -> None:
    arrays = [np.array(some, "<f4") for some in numbers]
    assert chosen(arrays, count, sampled=sampled) == by_sorting(arrays, count)


@pytest.mark.parametrize("density", [0.0001, 0.0025, 0.1, 0.9])
@pytest.mark.parametrize("kind", ["normal", "laplace", "few values", "mostly zero"])
def test_large_arrays_go_through_a_sample_to_the_same_set(kind: str, density: float) -> None:
    generator = np.random.default_rng(5)
    large = {
        "normal": generator.standard_normal(60_000),
        "laplace": generator.laplace(size=60_000),
        "few values": generator.integers(-3, 4, 60_000),
        "mostly zero": generator.standard_normal(60_000) * (generator.random(60_000) < 0.002),
    }[kind].astype("<f4")
    arrays = [large, 10 * large[:7], np.zeros(0, "<f4"), 0.1 * large[:9000]]
    count = int(density * sum(a.size for a in arrays))
    wanted = by_sorting(arrays, count)
    assert chosen(arrays, count) == wanted
    assert chosen(arrays, count, sampled=False) == wanted


def test_a_sample_that_misleads_is_found_out() -> None:
    misleading = np.ones(61_000, "<f4")
    misleading[::61] = 2.0  # all that the sample sees
    misleading[1::2] *= 0.5
    assert chosen([misleading], 5_000) == by_sorting([misleading], 5_000)
