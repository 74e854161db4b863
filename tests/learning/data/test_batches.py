import numpy as np
import pytest
from fedbonsai.learning.data.batches import (
    batches,
    largest_micro_batch,
    micro_batches,
    num_batches,
    num_steps,
    processed_samples,
    until,
)
from fedbonsai.learning.spec import Training


def lengths(num_samples: int, **kwargs: int) -> list[int]:
    return [len(batch) for batch in batches(num_samples, seed=0, **kwargs)]


def test_each_epoch_is_a_fresh_permutation() -> None:
    first, second = (
        np.concatenate(epoch) for epoch in np.array_split(list(batches(6, batch_size=3, epochs=2, seed=5)), 2)
    )
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4, 5]
    assert list(first) != list(second)


def test_same_seed_same_order_and_another_seed_another() -> None:
    def order(seed: int) -> list[int]:
        return list(np.concatenate(list(batches(20, batch_size=7, seed=seed))))

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "expected"),
    [
        (6, 3, [3, 3]),
        (8, 3, [3, 3, 2]),
        (7, 3, [3, 4]),  # the last sample would be a batch of its own
        (4, 3, [4]),
        (3, 2, [3]),
        (2, 3, [2]),
        (1, 3, [1]),  # there is no batch to merge it with
        (3, 1, [1, 1, 1]),  # explicitly configured
        (0, 3, []),
    ],
)
def test_a_last_batch_of_one_sample_is_merged_into_the_one_before(
    num_samples: int, batch_size: int, expected: list[int]
) -> None:
    assert lengths(num_samples, batch_size=batch_size) == expected
    assert num_batches(num_samples, batch_size=batch_size) == len(expected)


@pytest.mark.parametrize(("steps", "expected"), [(0, []), (1, [3]), (2, [3, 4]), (3, [3, 4, 3]), (5, [3, 4, 3, 4, 3])])
def test_steps_count_batches_across_epochs(steps: int, expected: list[int]) -> None:
    assert lengths(7, batch_size=3, steps=steps, epochs=9) == expected


def test_no_epochs_no_batches() -> None:
    assert lengths(7, batch_size=3, epochs=0) == []


def test_steps_without_samples_would_never_end() -> None:
    with pytest.raises(ValueError, match=r"training\.steps is 2"):
        lengths(0, batch_size=3, steps=2)


def test_numpys_global_state_is_unchanged() -> None:
    before = np.random.get_state()[1].copy()
    list(batches(20, batch_size=7, seed=3))
    assert (np.random.get_state()[1] == before).all()


def test_until_stops_between_batches_and_takes_the_first_in_any_case() -> None:
    answers = iter([False, True])
    order = list(batches(10, batch_size=2, seed=1))
    assert [list(batch) for batch in until(order, lambda: next(answers))] == [list(batch) for batch in order[:2]]
    assert len(list(until(order, lambda: True))) == 1
    assert len(list(until(order, None))) == 5


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "accumulation", "expected"),
    [
        (32, 32, 4, [8, 8, 8, 8]),
        (33, 32, 4, [9, 8, 8, 8]),  # a last sample was merged; never more parts than configured
        (10, 10, 4, [3, 3, 2, 2]),
        (20, 32, 4, [7, 7, 6]),  # short: as few as hold at most 8 samples each
        (5, 32, 4, [5]),
        (2, 4, 3, [2]),  # two parts would have one sample
        (3, 4, 3, [3]),
        (5, 6, 3, [3, 2]),
        (9, 9, 8, [3, 2, 2, 2]),  # with 2 samples each, the fifth part would have one sample
        (1, 32, 4, [1]),
        (4, 4, 4, [1, 1, 1, 1]),  # explicitly configured
        (3, 4, 50, [1, 1, 1]),
        (1, 1, 1, [1]),
        (7, 8, 1, [7]),
    ],
)
def test_micro_batches_are_even_and_none_is_alone_unless_asked_for(
    num_samples: int, batch_size: int, accumulation: int, expected: list[int]
) -> None:
    indices = np.arange(num_samples)
    found = list(micro_batches(indices, batch_size=batch_size, accumulation=accumulation))
    assert [len(part) for part, _ in found] == expected
    assert np.concatenate([part for part, _ in found]).tolist() == indices.tolist()
    assert [share for _, share in found] == [len(part) / num_samples for part, _ in found]


def test_no_micro_batch_of_any_batch_is_alone_where_a_full_ones_parts_are_larger() -> None:
    for batch_size in range(2, 20):
        for accumulation in range(1, batch_size):
            largest = largest_micro_batch(batch_size, accumulation)
            for num_samples in range(2, batch_size + 2):
                parts = [
                    len(part)
                    for part, _ in micro_batches(
                        np.arange(num_samples), batch_size=batch_size, accumulation=accumulation
                    )
                ]
                assert len(parts) <= accumulation
                assert min(parts) >= 2
                assert max(parts) <= largest + 1  # a single last sample was merged


@pytest.mark.parametrize("num_samples", [1, 2, 7, 8, 9, 10, 33])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 40])
@pytest.mark.parametrize("amount", [{"epochs": 0}, {"epochs": 3}, {"steps": 1}, {"steps": 5}, {"steps": 20}])
def test_it_is_what_the_batches_add_up_to(num_samples: int, batch_size: int, amount: dict[str, int]) -> None:
    order = batches(num_samples, batch_size=batch_size, seed=3, **amount)
    sizes, training = [len(batch) for batch in order], Training(batch_size=batch_size, **amount)
    assert processed_samples(num_samples, training) == sum(sizes)
    assert num_steps(num_samples, training) == len(sizes)


def test_by_hand() -> None:
    assert processed_samples(10, Training(epochs=2, batch_size=4)) == 20
    # passes of 4, 4, 2: five steps are one pass and two batches of the next
    assert processed_samples(10, Training(steps=5, batch_size=4)) == 18
    assert processed_samples(0, Training(steps=5)) == num_steps(0, Training(steps=5)) == 0
    assert num_steps(10, Training(epochs=2, batch_size=4)) == 6
