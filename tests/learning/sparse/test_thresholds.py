"""SparseTraining by magnitude: exact, with ties kept, never 0."""

import pytest
import torch
from fedbonsai.learning.sparse.thresholds import evaluated, masked, num_kept, threshold
from hypothesis import given
from hypothesis import strategies as st


def kept(x, sparsity):
    return masked(x, threshold(x, sparsity)).tolist()


@pytest.mark.parametrize(
    ("values", "sparsity", "result"),
    [
        ([1.0, -4.0, 2.0, -3.0, 0.0], 0.6, [0.0, -4.0, 0.0, -3.0, 0.0]),
        ([1.0, -4.0, 2.0, -3.0, 0.0], 0.5, [0.0, -4.0, 2.0, -3.0, 0.0]),  # 2.5 entries left out are 2
        ([1.0, -1.0, 1.0, 0.5], 0.5, [1.0, -1.0, 1.0, 0.0]),  # of equal entries all are kept
        ([1.0, 0.5, 0.0, 0.0, 0.0], 0.2, [1.0, 0.5, 0.0, 0.0, 0.0]),
        ([7.0], 0.99, [7.0]),
    ],
)
def test_the_largest_entries_are_kept(values, sparsity, result):
    assert kept(torch.tensor(values), sparsity) == result


def test_a_tensor_of_zeros_does_not_become_dense():
    x = torch.zeros(100)
    least = threshold(x, 0.9)
    assert least > 0
    assert not (x.abs() >= least).any()


def test_entries_that_are_not_zero_are_kept_where_there_are_too_few():
    x = torch.zeros(100)
    x[3] = 1e-30
    assert masked(x, threshold(x, 0.5)).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(("items", "sparsity", "number"), [(1000, 0.95, 50), (1000, 0.9, 100), (3, 0.5, 2), (5, 0, 5)])
def test_numbers_of_entries_do_not_suffer_from_rounding(items, sparsity, number):
    assert num_kept(items, sparsity) == number


def test_without_sparsity_nothing_is_left_out():
    x = torch.tensor([1.0, 0.0])
    assert evaluated(x, 0.0) is x
    assert masked(x, None) is x


@given(st.integers(1, 10), st.floats(0.01, 0.99), st.sampled_from(["random", "sorted", "periodic", "few"]))
def test_thresholds_of_large_tensors_are_exact(seed, sparsity, kind):
    """Samples only narrow the candidates down, whatever the order of the entries is."""
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(seed))
    if kind == "sorted":
        x = x.sort().values
    elif kind == "periodic":
        x[::251] *= 1e-3  # what is sampled is not typical
    elif kind == "few":
        x[100:] = 0
    wanted = x.abs().sort(descending=True).values[num_kept(x.numel(), sparsity) - 1]
    assert threshold(x.reshape(200, 200), sparsity) == wanted.clamp_min(torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("size", [10, 40])  # 64,000 entries are sampled
def test_thresholds_of_other_types_and_formats_are_the_same(size):
    x = torch.randn(size, 16, 10, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = threshold(x.float(), 0.9)
    assert wanted.dtype == torch.float32
    assert threshold(x, 0.9) == wanted
    assert threshold(x.to(memory_format=torch.channels_last), 0.9) == wanted
    assert threshold(x[:, ::2], 0.0) == x[:, ::2].float().abs().min().clamp_min(torch.finfo(torch.float32).tiny)


def test_entries_that_are_not_numbers_are_the_largest():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    x[:20] = torch.nan
    assert threshold(x, 0.999) == x[20:].abs().sort(descending=True).values[19]
    assert threshold(x, 0.9999).isnan()
