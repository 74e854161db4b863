import pytest
from fedbonsai.learning.costs.amount import num_steps, processed_samples
from fedbonsai.learning.data.batches import batches
from fedbonsai.learning.spec import Training


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
