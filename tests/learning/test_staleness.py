"""Weights of late updates, by hand."""

import msgspec
import pytest
from fedbonsai.learning.staleness import Staleness


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Staleness(rule="constant"), [1, 1, 1, 1]),
        (Staleness(), [1, 2**-0.5, 3**-0.5, 0.5]),
        (Staleness(a=1.0), [1, 1 / 2, 1 / 3, 1 / 4]),
        (Staleness(rule="hinge", a=2.0, b=1), [1, 1, 1 / 3, 1 / 5]),
        (Staleness(rule="hinge", a=10.0, b=4), [1, 1, 1, 1]),
    ],
    ids=repr,
)
def test_by_hand(rule, expected):
    assert [rule.scale(versions) for versions in range(4)] == pytest.approx(expected)


def test_what_is_too_old_does_not_count():
    assert [Staleness(most=1).counts(versions) for versions in range(3)] == [True, True, False]
    assert Staleness().counts(10**6)


@pytest.mark.parametrize("wrong", [{"rule": "linear"}, {"a": -1}, {"b": -1}, {"most": -1}, {"alpha": 1}], ids=str)
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, Staleness)
