"""Slices of tensors and arrays, against plain indexing and on any shapes."""

import numpy as np
import pytest
import torch
from fedbonsai.learning.parts.slices import gather, gather_array, move_array, put, sliced_shape, slices
from hypothesis import given
from hypothesis import strategies as st

from .test_channels import GROUPS


def ints(*numbers):
    return np.array(numbers, dtype=np.int64)


def test_slices_of_narrowed_tensors_by_hand():
    kept = np.array([True, False, True, True, True])
    found = {name: [None if i is None else i.tolist() for i in part] for name, part in slices(GROUPS, kept).items()}
    assert found == {
        "a.weight": [[0, 2]],
        "norm.weight": [[0, 2]],
        "b.weight": [[0, 2]],
        "c.weight": [None, [0, 1, 4, 5, 6]],
    }
    assert slices(GROUPS, np.ones(5, np.bool_)) == {}
    with pytest.raises(ValueError, match="keeps none of 'a'"):
        slices(GROUPS, np.array([False, False, False, True, True]))


SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def parts(draw, shape):
    """Any slice of a shape: each entry all, a range or scattered; it may leave trailing dimensions out."""
    indices = [
        draw(st.none() | st.lists(st.sampled_from(range(size)), unique=True).map(sorted).map(lambda i: ints(*i)))
        for size in shape
    ]
    return tuple(indices[: draw(st.integers(0, len(shape)))])


def numbered(shape):
    return np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.float32).reshape(shape)


def mask(shape, part):
    held = np.zeros(shape, np.bool_)
    full = [np.arange(n) if d >= len(part) or part[d] is None else part[d] for d, n in enumerate(shape)]
    held[np.ix_(*full) if shape else ()] = True
    return held


@given(st.data(), SHAPES)
def test_gather_takes_the_elements_and_put_puts_them_back(data, shape):
    part = data.draw(parts(shape))
    full = torch.from_numpy(numbered(shape))
    taken, held = gather(full, part), torch.from_numpy(mask(shape, part))
    assert taken.flatten().tolist() == full[held].tolist()
    assert taken.shape == sliced_shape(shape, part)
    assert taken.is_contiguous()
    assert taken.numel() == 0 or taken.untyped_storage().data_ptr() != full.untyped_storage().data_ptr()
    assert np.array_equal(gather_array(full.numpy(), part), taken.numpy())
    target = torch.zeros(shape)
    put(target, part, taken)
    assert torch.equal(target, torch.where(held, full, 0.0))
    put(target, part, -taken)
    assert torch.equal(target, torch.where(held, -full, 0.0))


@given(st.data(), SHAPES)
def test_moving_keeps_what_both_hold(data, shape):
    old, new = data.draw(parts(shape)), data.draw(parts(shape))
    full = numbered(shape)
    moved = move_array(gather_array(full, old), old, new, shape=shape)
    expected = gather_array(np.where(mask(shape, old), full, np.float32(0)), new)
    assert np.array_equal(moved, expected)
    assert moved.dtype == np.float32


def test_gather_has_no_gradient_and_runs_on_meta():
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    assert not gather(parameter, (ints(0, 2),)).requires_grad
    put(parameter, (ints(0, 2), ints(0, 2)), torch.zeros(2, 2))
    assert parameter.sum() == 8
    assert gather(torch.empty(4, 3, device="meta"), (ints(0, 2), ints(1, 2))).shape == (2, 2)


def test_slices_and_values_that_do_not_fit():
    full = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="a slice of 3 dimensions does not fit a tensor of 2"):
        gather(full, (None, None, None))
    with pytest.raises(ValueError, match="the indices 0 to 3 of dimension 1, which has 3"):
        gather_array(full.numpy(), (None, ints(0, 3)))
    with pytest.raises(ValueError, match=r"values of shape \(2, 3\) do not fit a slice of shape \(2, 2\)"):
        put(full, (None, ints(0, 2)), full)
    with pytest.raises(ValueError, match=r"values of shape \(2, 3\) do not fit a slice of shape \(1, 3\)"):
        move_array(full.numpy(), (ints(0),), (), shape=(2, 3))
