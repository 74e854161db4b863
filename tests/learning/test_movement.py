"""Effective movement in the form of running means: its value for steady, alternating and random changes."""

import math

import pytest
import torch
from fedbonsai.learning.movement import move, noise_floor


def movements(changes, window):
    """The movement after each of these changes of one tensor."""
    means: dict[str, torch.Tensor] = {}
    return [move(means, [("w", change)], window=window) for change in changes]


@pytest.mark.parametrize("window", [2, 5, 10])
def test_changes_that_keep_their_signs_move_all_the_way(window):
    steps = [torch.tensor([1.0, -2.0, 0.5]) * size for size in (1.0, 0.1, 3.0, 0.01)]
    assert movements(steps, window) == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("window", [5, 10, 20])
def test_independent_noise_moves_at_the_noise_floor(window):
    generator = torch.Generator().manual_seed(1)
    means, found = {}, []
    for version in range(40 * window):
        found.append(move(means, [("w", torch.randn(4000, generator=generator))], window=window))
        if version < 10 * window:
            found.clear()
    assert sum(found) / len(found) == pytest.approx(noise_floor(window), rel=0.02)
    assert noise_floor(window) == 1 / math.sqrt(window)


@pytest.mark.parametrize("window", [5, 10, 20])
def test_alternating_changes_move_by_one_in_a_window(window):
    steps = [torch.full((3,), (-1.0) ** number) for number in range(40 * window)]
    assert movements(steps, window)[-1] == pytest.approx(1 / window, rel=1e-3)


def test_two_changes_by_hand():
    # Window 3: decay 1/2. Scalar 0 goes +4, then -2; scalar 1 goes +2, then +2.
    #   E: 2, 1       then 1 - 1 = 0 and 0.5 + 1 = 1.5
    #   A: 2, 1       then 1 + 1 = 2 and 0.5 + 1 = 1.5
    means: dict[str, torch.Tensor] = {}
    assert move(means, [("w", torch.tensor([4.0, 2.0]))], window=3) == 1.0
    assert move(means, [("w", torch.tensor([-2.0, 2.0]))], window=3) == pytest.approx(1.5 / 3.5)
    assert {name: tensor.tolist() for name, tensor in means.items()} == {"net/w": [0.0, 1.5], "path/w": [2.0, 1.5]}


def test_all_tensors_of_a_block_count_by_their_scalars():
    means: dict[str, torch.Tensor] = {}
    move(means, [("a", torch.tensor([4.0])), ("b", torch.tensor([[2.0]]))], window=3)
    assert move(means, [("a", torch.tensor([-2.0])), ("b", torch.tensor([[2.0]]))], window=3) == pytest.approx(
        1.5 / 3.5
    )
    assert set(means) == {"net/a", "path/a", "net/b", "path/b"}


def test_nothing_that_moved_has_no_movement():
    means: dict[str, torch.Tensor] = {}
    assert move(means, [], window=5) is None
    assert move(means, [("w", torch.zeros(3))], window=5) is None
    assert move(means, [("w", torch.ones(3))], window=5) == pytest.approx(1.0)
    assert move(means, [("w", torch.zeros(3))], window=5) == pytest.approx(1.0)  # it stands still where it went


def test_with_a_window_of_one_only_the_last_change_counts():
    assert movements([torch.tensor([1.0]), torch.tensor([-5.0])], 1) == [1.0, 1.0]


def test_the_changes_are_not_changed():
    change = torch.tensor([1.0, -1.0])
    movements([change, change], 4)
    assert change.tolist() == [1.0, -1.0]
