import pytest
from fedbonsai.learning.training.schedule import Schedule


def factors(schedule: Schedule, *, rounds: int, until: int | None = None) -> list[float]:
    return [schedule.factor(version, rounds=rounds) for version in range(until or rounds)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), [1, 1, 1, 1, 1]),
        (Schedule(name="exponential", final=0.0001), [1, 0.1, 0.01, 0.001, 0.0001]),
        (
            Schedule(name="cosine", final=0.2),
            [1, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.2 + 0.8 * (1 - 0.5**0.5) / 2, 0.2],
        ),
        (Schedule(name="step", gamma=0.5, milestones=(4, 1)), [1, 0.5, 0.5, 0.5, 0.25]),
        (Schedule(name="step"), [1, 1, 1, 1, 1]),
    ],
    ids=["constant", "exponential", "cosine", "step", "no milestones"],
)
def test_five_rounds_by_hand(schedule: Schedule, expected: list[float]) -> None:
    assert factors(schedule, rounds=5) == pytest.approx(expected)


def test_the_final_value_stays_beyond_the_horizon() -> None:
    assert factors(Schedule(name="exponential", final=0.25), rounds=2, until=4) == [1, 0.25, 0.25, 0.25]
    assert factors(Schedule(name="cosine", final=0.25, rounds=2), rounds=100, until=3) == pytest.approx([1, 0.25, 0.25])


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_of_one_round_or_none(rounds: int) -> None:
    assert Schedule(name="cosine").factor(0, rounds=rounds) == 1


def test_warm_up_is_a_straight_line_in_place_of_the_schedule() -> None:
    line = Schedule(name="step", gamma=0.5, milestones=(2,), warmup_rounds=3)
    assert factors(line, rounds=5) == [0.25, 0.5, 0.75, 0.5, 0.5]
    assert factors(Schedule(warmup_rounds=1, warmup_from=0.5), rounds=3) == [0.75, 1, 1]


@pytest.mark.parametrize(("name", "horizon"), [("cosine", 7), ("exponential", 7), ("constant", None), ("step", None)])
def test_the_horizon_is_spelled_out_where_there_is_one(name, horizon):
    schedule = Schedule(name=name)
    assert schedule.within(7).rounds == horizon
    assert [schedule.within(7).factor(version, rounds=100) for version in range(7)] == [
        schedule.factor(version, rounds=7) for version in range(7)
    ]
    assert Schedule(name=name, rounds=3).within(7).rounds == 3
