"""Weights of late updates and the learning rate over rounds, by hand."""

import msgspec
import pytest
from fedbonsai.learning.spec import LearningRateSchedule, Staleness


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


def factors(schedule: LearningRateSchedule, *, rounds: int, until: int | None = None) -> list[float]:
    return [schedule.factor(version, rounds=rounds) for version in range(until or rounds)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LearningRateSchedule(), [1, 1, 1, 1, 1]),
        (LearningRateSchedule(name="exponential", final=0.0001), [1, 0.1, 0.01, 0.001, 0.0001]),
        (
            LearningRateSchedule(name="cosine", final=0.2),
            [1, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.2 + 0.8 * (1 - 0.5**0.5) / 2, 0.2],
        ),
        (LearningRateSchedule(name="step", gamma=0.5, milestones=(4, 1)), [1, 0.5, 0.5, 0.5, 0.25]),
        (LearningRateSchedule(name="step"), [1, 1, 1, 1, 1]),
    ],
    ids=["constant", "exponential", "cosine", "step", "no milestones"],
)
def test_five_rounds_by_hand(schedule: LearningRateSchedule, expected: list[float]) -> None:
    assert factors(schedule, rounds=5) == pytest.approx(expected)


def test_the_final_value_stays_beyond_the_horizon() -> None:
    assert factors(LearningRateSchedule(name="exponential", final=0.25), rounds=2, until=4) == [1, 0.25, 0.25, 0.25]
    assert factors(LearningRateSchedule(name="cosine", final=0.25, rounds=2), rounds=100, until=3) == pytest.approx(
        [1, 0.25, 0.25]
    )


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_of_one_round_or_none(rounds: int) -> None:
    assert LearningRateSchedule(name="cosine").factor(0, rounds=rounds) == 1


def test_warm_up_is_a_straight_line_in_place_of_the_schedule() -> None:
    line = LearningRateSchedule(name="step", gamma=0.5, milestones=(2,), warmup_rounds=3)
    assert factors(line, rounds=5) == [0.25, 0.5, 0.75, 0.5, 0.5]
    assert factors(LearningRateSchedule(warmup_rounds=1, warmup_from=0.5), rounds=3) == [0.75, 1, 1]


@pytest.mark.parametrize(("name", "horizon"), [("cosine", 7), ("exponential", 7), ("constant", None), ("step", None)])
def test_the_horizon_is_spelled_out_where_there_is_one(name, horizon):
    schedule = LearningRateSchedule(name=name)
    assert schedule.within(7).rounds == horizon
    assert [schedule.within(7).factor(version, rounds=100) for version in range(7)] == [
        schedule.factor(version, rounds=7) for version in range(7)
    ]
    assert LearningRateSchedule(name=name, rounds=3).within(7).rounds == 3
