"""Bytes of live tensors, computed by hand: a float32 takes 4."""

import pytest
import torch
from fedbonsai.learning.costs.memory import Allocations, peak_of_batch


def test_made_freed_and_peak():
    with Allocations() as memory:
        a = torch.zeros(10)
        b = a + 1
        assert memory.live_bytes == 80
        del a
        assert memory.live_bytes == 40
        b = b * 2  # both tensors are live until the old one is freed
    assert (memory.live_bytes, memory.peak_bytes) == (40, 80)
    del b
    assert memory.live_bytes == 0


def test_views_and_in_place_operations_take_nothing():
    with Allocations() as memory:
        a = torch.zeros(2, 5)
        b = a.view(10)[3:].add_(1)
        assert memory.live_bytes == memory.peak_bytes == 40
        del a
        assert memory.live_bytes == 40  # the view keeps the whole storage
        del b
    assert memory.live_bytes == 0


def test_added_tensors_count_once():
    a = torch.zeros(10)
    with Allocations() as memory:
        memory.add([a, a, a.view(2, 5), None, 3])
        assert memory.live_bytes == 40
        b = a.view(5, 2)
    assert memory.peak_bytes == 40
    del b


def test_what_autograd_saves_stays_live():
    weight = torch.ones(10, requires_grad=True)
    with Allocations() as memory:
        memory.add([weight])
        result = (weight * 2).exp().sum()  # exp saves its result; the product is freed
        assert memory.live_bytes == 40 + 40 + 4
        result.backward()
        del result
    assert memory.live_bytes == 80  # weight and gradient


def test_what_is_reserved_counts_until_it_is_released():
    with Allocations() as memory:
        number = memory.reserve(100)
        a = torch.zeros(10)
        memory.release(number)
    assert (memory.live_bytes, memory.peak_bytes) == (40, 140)
    del a


def step(samples, width=7):
    """Storages that grow in all supported ways: constant, in proportion, with all pairs of samples, and a mixture."""
    weight = torch.ones(width)
    with Allocations() as memory:
        memory.add([weight])
        x = torch.ones(samples, width) * weight
        pairs = x @ x.t()
        mixed = torch.cat([x, weight[None]])
        del x
        total = (pairs.sum() + mixed.sum()).reshape(1)
        del pairs, mixed, total
    return memory


@pytest.mark.parametrize("batch", [2, 3, 4, 5, 32, 1000])
def test_the_peak_of_any_batch_follows_from_two_small_ones(batch):
    assert peak_of_batch(step(2), step(4), batch) == step(batch).peak_bytes


def test_steps_that_differ_with_the_number_of_samples_are_extrapolated_linearly():
    small, large = Allocations(), Allocations()
    small.reserve(100)
    large.reserve(150)
    large.reserve(10)
    assert [peak_of_batch(small, large, batch) for batch in (2, 4, 10)] == [100, 160, 340]
