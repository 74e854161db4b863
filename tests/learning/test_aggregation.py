import numpy as np
import pytest
import torch
from fedbonsai.learning.aggregation import Fold
from numpy.typing import NDArray
from torch import Tensor

FULL = {"w": torch.zeros(2, 3)}


def at(*indices: int) -> NDArray[np.int64]:
    return np.array(indices, np.int64)


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_weighted_mean_by_hand() -> None:
    fold = Fold()
    fold.add({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}, weight=1)
    fold.add({"w": torch.tensor([5.0, -2.0]), "b": torch.tensor(-1.0)}, weight=3)
    assert fold.updates == 2
    means = fold.close()
    assert means["w"].tolist() == [(1 + 15) / 4, (2 - 6) / 4]
    assert means["b"].item() == 0.0


def test_a_tensor_counts_for_those_who_trained_it() -> None:
    fold = Fold()
    fold.add({"front": torch.tensor([2.0]), "back": torch.tensor([4.0])}, weight=1)
    fold.add({"front": torch.tensor([6.0])}, weight=1)
    means = fold.close()
    assert (means["front"].item(), means["back"].item()) == (4.0, 4.0)


def test_overlapping_parts_by_hand() -> None:
    fold = Fold()
    fold.add({"w": torch.tensor([[1.0, 2.0]])}, weight=1, slices={"w": (at(0), at(0, 1))}, tensors=FULL)
    fold.add({"w": torch.tensor([[4.0], [8.0]])}, weight=3, slices={"w": (None, at(1))}, tensors=FULL)
    # position 0 is trained by the first, 1 by both, 4 by the second, the others by none
    assert fold.updates == 2
    assert fold.close()["w"].tolist() == [[1.0, (2 + 12) / 4, 0.0], [0.0, 8.0, 0.0]]


def test_what_nobody_trained_keeps_every_bit() -> None:
    fold = Fold()
    fold.add({"w": torch.tensor([[1.0]])}, weight=2, slices={"w": (at(1), at(2))}, tensors=FULL)
    model = torch.tensor([[0.0, -0.0, 1.5], [-2.0, 1e-45, 3.0]])
    before = model.clone()
    model.add_(fold.close()["w"], alpha=0.3)
    assert same_bits(model.reshape(-1)[:5], before.reshape(-1)[:5])
    assert model[1, 2].item() == pytest.approx(3.3)


@pytest.mark.parametrize("whole_first", [True, False])
def test_whole_and_part_together(whole_first: bool) -> None:
    fold = Fold()

    def whole() -> None:
        fold.add({"w": torch.full((2, 3), 2.0)}, weight=1)

    def part() -> None:
        fold.add({"w": torch.tensor([[10.0]])}, weight=3, slices={"w": (at(1), at(0))}, tensors=FULL)

    for step in (whole, part) if whole_first else (part, whole):
        step()
    assert fold.close()["w"].tolist() == [[2.0, 2.0, 2.0], [8.0, 2.0, 2.0]]


def test_a_slice_of_all_elements_gives_the_bits_of_the_whole() -> None:
    added, sliced = Fold(), Fold()
    everywhere = {"w": (np.arange(1001),)}
    for seed, weight in enumerate([0.1, 17.0, 0.7, 333.3]):
        differences = {"w": some(seed, 1001)}
        differences["w"][:3] = torch.tensor([-0.0, 0.0, 1e-45])
        added.add(differences, weight=weight, scale=0.7)
        sliced.add(differences, weight=weight, scale=0.7, slices=everywhere, tensors={"w": torch.zeros(1001)})
    assert same_bits(added.close()["w"], sliced.close()["w"])


def test_the_order_of_arrival_fixes_the_bits() -> None:
    updates = [({"w": some(seed, 500)}, weight) for seed, weight in enumerate([3.0, 0.3, 41.0])]

    def folded() -> Tensor:
        fold = Fold()
        for differences, weight in updates:
            fold.add(differences, weight=weight)
        return fold.close()["w"]

    first = folded()
    assert same_bits(first, folded())
    updates.reverse()
    torch.testing.assert_close(first, folded())


def test_updates_are_only_read() -> None:
    fold, update = Fold(), {"w": torch.tensor([1.0, 2.0])}
    fold.add(update, weight=2)
    fold.add(update, weight=2)
    fold.close()
    assert update["w"].tolist() == [1.0, 2.0]


def test_closing_empties_the_fold() -> None:
    fold = Fold()
    assert fold.close() == {}
    fold.add({"w": torch.tensor([8.0])}, weight=100)
    fold.close()
    assert fold.updates == 0
    fold.add({"w": torch.tensor([1.0])}, weight=1)
    assert fold.close()["w"].tolist() == [1.0]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_above_zero_and_finite(weight: float) -> None:
    fold = Fold()
    with pytest.raises(ValueError, match=f"weight of an update is {weight}; it must be a finite number above 0"):
        fold.add({"w": torch.ones(1)}, weight=weight)
    with pytest.raises(ValueError, match="finite number above 0"):
        fold.add({"w": torch.ones(1, 1)}, weight=weight, slices={"w": (at(0), at(0))}, tensors=FULL)
    assert fold.updates == 0
    assert fold.close() == {}


@pytest.mark.parametrize("sliced", [False, True])
def test_sums_of_float16_are_float32(sliced: bool) -> None:
    """Three updates of 0.5 with 60,000 samples: the sum is 90,000, and float16's maximum is 65,504."""
    fold, update = Fold(), {"w": torch.tensor([0.5, -0.5], dtype=torch.float16)}
    for _ in range(3):
        if sliced:
            fold.add(update, weight=60_000, slices={"w": (at(0, 1),)}, tensors=update)
        else:
            fold.add(update, weight=60_000)
    mean = fold.close()["w"]
    assert (mean.dtype, mean.tolist()) == (torch.float32, [0.5, -0.5])


def test_sums_of_float64_stay_float64() -> None:
    fold = Fold()
    fold.add({"w": torch.tensor([1 / 3], dtype=torch.float64)}, weight=1)
    assert fold.close()["w"].item() == 1 / 3


def test_a_parameter_of_float16_moves_by_what_float32_says() -> None:
    """The weighted mean of 1 and 3 with 60,000 and 180,000 samples, added once."""
    fold, model = Fold(), torch.tensor([1.0], dtype=torch.float16)
    for value, weight in ((1.0, 60_000), (3.0, 180_000)):
        fold.add({"w": torch.tensor([value], dtype=torch.float16)}, weight=weight)
    assert model.add_(fold.close()["w"]).item() == 3.5


def test_the_mean_of_equal_differences_is_that_difference_where_sums_are_exact():
    """A weight that no device has sent is exactly 0 in the next version; in float32 most keep a rest."""
    start = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    weights = [37, 101, 53, 7, 211, 19, 83, 5, 149, 61]

    def next_version(**changes):
        fold = Fold()
        for weight in weights:
            fold.add({"w": 0 - start}, weight=weight, **changes)
        return start + fold.close()["w"]

    assert not next_version(exact=True).any()
    assert next_version(exact=True).dtype == torch.float32
    assert next_version().any()


def test_exact_sums_go_on_from_earlier_ones_and_end_with_the_version():
    fold = Fold()
    fold.add({"w": torch.tensor([1.0])}, weight=1)
    fold.add({"w": torch.tensor([3.0])}, weight=1, exact=True)
    fold.add({"w": torch.tensor([5.0])}, weight=2)
    mean = fold.close()["w"]
    assert (mean.tolist(), mean.dtype) == ([3.5], torch.float32)
    fold.add({"w": torch.tensor([1.0])}, weight=1)
    assert fold._exact == set()
