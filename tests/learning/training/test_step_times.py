"""Which precision and layout are taken, by fake timings: alternatives, turns, and the rule."""

import pytest
from fedbonsai.learning.spec import MeasuredForm, Training
from fedbonsai.learning.training.step_times import alternatives, choose, measured_form, step_times


def forms(layouts: bool = True, bf16: bool = True, **settings: str) -> list[str]:
    options = alternatives(Training(**settings), layouts=layouts, bf16=bf16)  # type: ignore[arg-type]
    return [f"{each.precision} {each.layout}" for each in options]


def test_the_alternatives_are_what_the_settings_leave_open_the_plainest_first() -> None:
    both = {"precision": "auto", "layout": "auto"}
    assert forms() == ["float32 contiguous"]
    assert forms(precision="bf16", layout="channels_last") == ["bf16 channels_last"]
    assert forms(layout="auto") == ["float32 contiguous", "float32 channels_last"]
    assert forms(precision="auto", layout="channels_last") == ["float32 channels_last", "bf16 channels_last"]
    assert forms(**both) == ["float32 contiguous", "float32 channels_last", "bf16 contiguous", "bf16 channels_last"]
    assert forms(layouts=False, bf16=False, **both) == ["float32 contiguous"]
    # What cannot be chosen may still be configured.
    assert forms(layouts=False, bf16=False, precision="bf16", layout="channels_last") == ["bf16 channels_last"]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0),
        ([1.0, 0.92, 0.95, 0.91], 0),  # nothing is a tenth faster
        ([1.0, 0.8, 0.95, 0.9], 1),
        ([1.0, 0.8, 0.7, 0.5], 3),
        ([1.0, 0.8, 0.9, 0.75], 1),  # bf16 is not worth its loss of accuracy for 7 % more
        ([1.0, 1.0, 0.5, 0.5], 2),
        ([0.1, 0.8, 0.9, 0.7], 0),
        ([1.0, None, None, 0.5], 3),
        ([1.0, 0.5, None, None], 1),
        ([None, 1.0, 1.0, 1.0], 1),
        ([None, None, None, None], 0),
        ([], 0),
    ],
)
def test_the_plainest_alternative_is_taken_than_which_none_is_a_tenth_faster(
    seconds: list[float | None], chosen: int
) -> None:
    assert choose(seconds) == chosen


class Steps:
    """Steps of given seconds on a clock of their own: the first one of each alternative, then the others in order."""

    def __init__(self, *seconds: list[float] | None) -> None:
        self.seconds = [None if each is None else list(each) for each in seconds]
        self.calls: list[tuple[int, int]] = []
        self.clock = 0.0

    def measured(self) -> list[float | None]:
        def steps(alternative: int, count: int) -> None:
            self.calls.append((alternative, count))
            own = self.seconds[alternative]
            if own is None or not own:
                raise RuntimeError("no such kernel")
            self.clock += count * (own.pop(0) if len(own) > 1 else own[0])

        runs = [lambda count, n=n: steps(n, count) for n in range(len(self.seconds))]
        return step_times(runs, now=lambda: self.clock)


def test_alternatives_take_turns_and_the_median_counts() -> None:
    """One second is a disturbance, in the first turn of one and the last of the other: neither counts, nor the warm-up."""
    steps = Steps([9.0, 0.3, 1.0, 0.32, 0.31], [9.0, 0.25, 0.25, 0.25])
    assert steps.measured() == pytest.approx([0.32, 0.25])
    assert [alternative for alternative, _ in steps.calls] == [0, 1] * 4  # long steps have three turns


def test_short_steps_have_more_turns_of_several_steps() -> None:
    steps = Steps([1 / 256], [1 / 512])
    assert steps.measured() == pytest.approx([1 / 256, 1 / 512])
    assert steps.calls[:2] == [(0, 1), (1, 1)]
    assert steps.calls[2:] == [(0, 5), (1, 5)] + [(1, 5)] * 6  # the other one is far behind after one turn


def test_what_is_far_behind_has_no_further_turn() -> None:
    """An emulated precision that takes forty times as long costs its warm-up."""
    steps = Steps([0.4, 0.3], [16.0], [0.3, 0.25])
    assert steps.measured() == pytest.approx([0.3, 16.0, 0.25])
    assert [alternative for alternative, _ in steps.calls] == [0, 1, 2] + [0, 2] * 3


def test_an_alternative_that_fails_has_no_time() -> None:
    assert Steps([0.5], None, [1.0, 0.4]).measured() == pytest.approx([0.5, None, 0.4])
    assert Steps(None, None).measured() == [None, None]
    assert Steps([0.5], []).measured() == pytest.approx([0.5, None])


def test_what_is_recorded() -> None:
    options = alternatives(Training(precision="bf16", layout="auto"), layouts=True, bf16=True)
    assert measured_form(options, [0.123456, 0.1]) == MeasuredForm(
        precision="bf16", layout="channels_last", step_s={"bf16, contiguous": 0.123, "bf16, channels_last": 0.1}
    )
    assert measured_form(options[:1], []) == MeasuredForm(precision="bf16", layout="contiguous")
