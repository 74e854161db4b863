"""When a block is calm: its movement near the noise floor, and flat."""

import pytest
from fedbonsai.policies.progressive.freezing import LEVEL, is_calm, slope


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),
        ([3.0], 0.0),
        ([1.0, 3.0], 2.0),
        ([1.0, 2.0, 3.0, 4.0], 1.0),
        ([4.0, 2.0, 0.0], -2.0),
        ([5.0, 5.0, 5.0], 0.0),
        ([0.0, 1.0, 0.0], 0.0),
        # mean 2; the line through (-1, 1), (0, 1), (1, 4): (1 * 1 + 1 * 2) / 2
        ([1.0, 1.0, 4.0], 1.5),
    ],
)
def test_the_slope_of_the_line_of_least_squares_by_hand(values, expected):
    assert slope(values) == pytest.approx(expected)


def calm(movement, **changes):
    return is_calm(movement, **{"window": 4, "fitted": 3, "most_slope": 0.01} | changes)


def test_a_flat_movement_is_calm_only_near_the_noise_floor():
    # 1.5 / sqrt(4) = 0.75
    assert LEVEL == 1.5
    assert calm([0.5, 0.5, 0.5])
    assert calm([0.74, 0.74, 0.74])
    assert not calm([0.76, 0.76, 0.76])
    assert not calm([1.0, 1.0, 1.0])  # as at the very start
    assert calm([0.76, 0.76, 0.76], window=3)  # 0.87


def test_a_movement_that_falls_or_rises_is_not_calm():
    assert not calm([0.52, 0.50, 0.48])
    assert not calm([0.48, 0.50, 0.52])
    assert calm([0.505, 0.5, 0.495])
    assert calm([0.52, 0.50, 0.48], most_slope=0.03)


def test_the_line_goes_through_the_last_values_and_there_must_be_as_many():
    assert calm([0.9, 0.5, 0.5, 0.5])
    assert not calm([0.5, 0.5])
    assert not calm([0.9, 0.5, 0.5, 0.5], fitted=4)
    assert not calm([], fitted=1)
    assert calm([0.5], fitted=1)
