"""Counts, rules and bytes of maps, on groups written by hand."""

import math

import numpy as np
import pytest
import torch
from fedbonsai.learning.parts.channels import (
    ChannelGroups,
    channel_counts,
    check_map,
    choose_channels,
    map_bytes,
    map_hash,
    read_map,
    score_channels,
)
from hypothesis import given
from hypothesis import strategies as st


def owner(*numbers):
    return np.array(numbers, dtype=np.int32)


# Two layers with a batch normalisation, tied by a sum, of three channels; then one of two channels, which reads four positions.
GROUPS = ChannelGroups(
    names=("a", "c"),
    sizes=(3, 2),
    owners={
        "a.weight": {0: owner(0, 1, 2)},
        "norm.weight": {0: owner(0, 1, 2)},
        "b.weight": {0: owner(0, 1, 2)},
        "c.weight": {0: owner(3, 4), 1: owner(0, 0, 1, 1, 2, 2, -1)},
        "d.weight": {1: owner(3, 4)},
    },
    producers=(("a.weight", "b.weight"), ("c.weight",)),
    scales=(("norm.weight",), ()),
    whole={"d": "its channels are the model's outputs"},
)
TENSORS = {
    "a.weight": torch.tensor([[1.0, -1.0], [0.0, 4.0], [0.0, 0.0]]),  # norms 2, 4, 0: divided by their mean 1, 2, 0
    "norm.weight": torch.tensor([-9.0, 1.0, 2.0]),
    "b.weight": torch.tensor([[10.0], [-10.0], [70.0]]),  # 1/3, 1/3, 7/3
    "c.weight": torch.tensor([[1.0, 1, 0, 0, 0, 0, 0], [0, 0, 0, -1, 0, 0, -1]]),
}


def chosen(rule, width, *, min_channels=1, turn=0):
    scores = score_channels(GROUPS, TENSORS, rule=rule) if rule in ("l1", "batchnorm") else None
    kept = choose_channels(
        GROUPS, width=width, min_channels=min_channels, scores=scores, turn=turn if rule == "rolling" else None
    )
    assert kept.dtype == np.bool_
    return np.flatnonzero(kept).tolist()


def test_each_rule_by_hand():
    assert chosen("prefix", 0.5) == [0, 1, 3]
    assert chosen("l1", 0.3) == [1, 3]  # scores 4/3, 7/3, 7/3: a tie takes the lower number
    assert chosen("l1", 0.6) == [1, 2, 3, 4]
    assert chosen("batchnorm", 0.3) == [0, 3]  # |scale| 9, 1, 2; the second group has no scales
    assert chosen("batchnorm", 0.5) == [0, 2, 3]
    assert chosen("prefix", 0.1, min_channels=2) == [0, 1, 3, 4]
    assert chosen("l1", 1.0) == [0, 1, 2, 3, 4]


def test_a_rolling_window_moves_by_one_channel_and_comes_round():
    assert [chosen("rolling", 0.5, turn=turn) for turn in range(4)] == [[0, 1, 3], [1, 2, 4], [0, 2, 3], [0, 1, 4]]


def test_weights_of_zeros_are_ranked_by_number():
    zeros = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    for rule in ("l1", "batchnorm"):
        kept = choose_channels(GROUPS, width=0.5, min_channels=1, scores=score_channels(GROUPS, zeros, rule=rule))
        assert np.flatnonzero(kept).tolist() == [0, 1, 3]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.floats(0.001, 1), st.integers(1, 64))
def test_counts(sizes, width, min_channels):
    groups = ChannelGroups(("",) * len(sizes), tuple(sizes), {}, ((),) * len(sizes), ((),) * len(sizes), {})
    for size, count in zip(sizes, channel_counts(groups, width=width, min_channels=min_channels), strict=True):
        assert min(size, min_channels) <= count <= size
        assert count == size or count >= width * size - 1e-6
        assert count == min(size, min_channels) or count < width * size + 1
    assert channel_counts(groups, width=1.0, min_channels=1) == tuple(sizes)


def test_a_rounding_error_adds_no_channel():
    groups = ChannelGroups(("a",), (100,), {}, ((),), ((),), {})
    assert math.ceil(0.07 * 100) == 8
    assert channel_counts(groups, width=0.07, min_channels=1) == (7,)


@given(st.sampled_from(["prefix", "l1", "batchnorm"]), st.floats(0.01, 1), st.floats(0.01, 1))
def test_smaller_widths_are_inside_larger_ones(rule, one, other):
    assert set(chosen(rule, min(one, other))) <= set(chosen(rule, max(one, other)))


def groups_of(sizes):
    return ChannelGroups(("layer",) * len(sizes), tuple(sizes), {}, ((),) * len(sizes), ((),) * len(sizes), {})


@given(st.data(), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_a_map_goes_through_bytes(data, sizes):
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes))))
    groups = groups_of(sizes)
    kept[list(groups.starts)] = True
    for form in (map_bytes(kept), map_bytes(kept).tobytes()):
        assert np.array_equal(read_map(form, groups), kept)
    assert map_bytes(kept).nbytes == -(-sum(sizes) // 8)


@given(st.binary(max_size=4), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_any_bytes_are_a_map_or_refused(data, sizes):
    groups = groups_of(sizes)
    try:
        kept = read_map(data, groups)
    except ValueError:
        return
    check_map(groups, kept)
    assert map_bytes(kept).tobytes() == data


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "the map of channels has 0 bytes; the model's 5 channels need 1"),
        (b"\xf8\x00", "the map of channels has 2 bytes"),
        (b"\xfc", "names more channels than the model's 5"),
        (b"\xe0", "keeps none of 'c'; it must keep at least one"),
    ],
)
def test_maps_that_do_not_fit(data, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_map(data, GROUPS)


def test_a_map_of_another_shape_or_type():
    for kept in (np.ones(4, np.bool_), np.ones(5, np.int8)):
        with pytest.raises(ValueError, match=r"it must be bool \(5,\)"):
            check_map(GROUPS, kept)


def test_hashes_tell_maps_apart():
    kept = np.ones(5, np.bool_)
    other = kept.copy()
    other[2] = False
    assert map_hash(kept) == map_hash(kept.copy()) != map_hash(other)
    assert len(map_hash(kept)) == 16
    assert int(map_hash(kept), 16) >= 0


def test_groups_without_some():
    left = GROUPS.without({0: "its width is fixed"})
    assert (left.names, left.sizes, left.starts, left.channels) == (("c",), (2,), (0,), 2)
    assert {name: {d: o.tolist() for d, o in dims.items()} for name, dims in left.owners.items()} == {
        "c.weight": {0: [0, 1]},
        "d.weight": {1: [0, 1]},
    }
    assert left.whole == {"d": "its channels are the model's outputs"} | dict.fromkeys("ab", "its width is fixed")
