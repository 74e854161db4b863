"""The stop rules, and which evaluation is the best."""

import math

import pytest
from fedbonsai.runtime.configuration.config import Stop
from fedbonsai.runtime.engine.stopping import Stopping


def reason(rules, *, version=1, time_s=1.0, num_bytes=1, evaluation=None):
    return Stopping(rules).reason(version=version, time_s=time_s, num_bytes=num_bytes, evaluation=evaluation)


@pytest.mark.parametrize(
    ("rules", "now", "expected"),
    [
        (Stop(rounds=3), {"version": 2}, None),
        (Stop(rounds=3), {"version": 3}, "3 rounds"),
        (Stop(rounds=0), {"version": 0}, "0 rounds"),
        (Stop(accuracy=0.9), {"evaluation": {"accuracy": 0.89, "loss": 1.0}}, None),
        (Stop(accuracy=0.9), {"evaluation": {"accuracy": 0.9, "loss": 1.0}}, "accuracy 0.9000 reached the target 0.9"),
        (Stop(accuracy=0.9), {}, None),
        (Stop(loss=0.5), {"evaluation": {"loss": 0.51}}, None),
        (Stop(loss=0.5), {"evaluation": {"loss": 0.5}}, "loss 0.5000 reached the target 0.5"),
        (Stop(loss=0.5), {"evaluation": {"loss": math.nan}}, None),
        (Stop(virtual_s=10), {"time_s": 9.9}, None),
        (Stop(virtual_s=10), {"time_s": 10.0}, "10 virtual seconds"),
        (Stop(bytes=100), {"num_bytes": 99}, None),
        (Stop(bytes=100), {"num_bytes": 100}, "100 bytes"),
        (Stop(rounds=1, accuracy=0.5), {"evaluation": {"accuracy": 0.6}}, "accuracy 0.6000 reached the target 0.5"),
    ],
)  # fmt: skip
def test_each_rule(rules, now, expected):
    assert reason(rules, **now) == expected


def test_patience_counts_evaluations_without_a_better_one():
    stopping = Stopping(Stop(rounds=100, patience=2))
    results = []
    for version, accuracy in enumerate([0.5, 0.4, 0.6, 0.6, 0.5], start=1):
        figures = {"accuracy": accuracy, "loss": 1.0}
        best = stopping.note(figures)
        results.append((best, stopping.reason(version=version, time_s=0, num_bytes=0, evaluation=figures)))
    assert results == [(True, None), (False, None), (True, None), (False, None), (False, "no better evaluation in 2")]


def test_patience_is_checked_only_with_an_evaluation():
    stopping = Stopping(Stop(rounds=100, patience=1))
    for accuracy in (0.5, 0.4):
        stopping.note({"accuracy": accuracy, "loss": 1.0})
    assert stopping.reason(version=3, time_s=0, num_bytes=0, evaluation=None) is None


def test_without_accuracy_the_lowest_loss_is_the_best():
    stopping = Stopping(Stop())
    assert [stopping.note({"loss": loss}) for loss in (1.0, 0.5, 0.7)] == [True, True, False]


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    stopping = Stopping(Stop())
    assert [stopping.note({"loss": loss}) for loss in (math.nan, math.inf, 0.5, math.nan)] == [
        False,
        False,
        True,
        False,
    ]
    # With an accuracy, the loss may be infinite, for which one sample is enough. After a loss of NaN the model is unusable.
    by_accuracy = Stopping(Stop())
    found = [
        by_accuracy.note({"accuracy": a, "loss": loss}) for a, loss in ((0.1, math.nan), (0.5, 1.0), (0.9, math.inf))
    ]
    assert found == [False, True, True]
