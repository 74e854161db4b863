"""Bytes of live tensors, by pencil: a float32 takes 4."""

import torch
from fedbonsai.learning.memory import LiveTensors
from torch._subclasses.fake_tensor import FakeTensorMode


def test_made_freed_and_peak():
    with LiveTensors() as memory:
        a = torch.zeros(10)
        b = a + 1
        assert memory.live_bytes == 80
        del a
        assert memory.live_bytes == 40
        b = b * 2  # old and new are alive together for a moment
    assert (memory.live_bytes, memory.peak_bytes) == (40, 80)
    del b
    assert memory.live_bytes == 0


def test_views_and_in_place_operations_take_nothing():
    with LiveTensors() as memory:
        a = torch.zeros(2, 5)
        b = a.view(10)[3:].add_(1)
        assert memory.live_bytes == memory.peak_bytes == 40
        del a
        assert memory.live_bytes == 40  # the view keeps the whole storage
        del b
    assert memory.live_bytes == 0


def test_added_tensors_count_once():
    a = torch.zeros(10)
    with LiveTensors() as memory:
        memory.add([a, a, a.view(2, 5), None, 3])
        assert memory.live_bytes == 40
        b = a.view(5, 2)
    assert memory.peak_bytes == 40
    del b


def test_what_autograd_saves_stays_live():
    weight = torch.ones(10, requires_grad=True)
    with LiveTensors() as memory:
        memory.add([weight])
        result = (weight * 2).exp().sum()  # exp saves its result; the product is gone
        assert memory.live_bytes == 40 + 40 + 4
        result.backward()
        del result
    assert memory.live_bytes == 80  # weight and gradient


def test_fake_tensors_are_counted_without_allocating():
    with FakeTensorMode(), LiveTensors() as memory:
        a = torch.empty(2**40)  # 4 TiB
        b = a + a
        assert memory.live_bytes == 2**43
        del a, b
    assert memory.live_bytes == 0
