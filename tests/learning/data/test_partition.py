"""Partitions over devices, and the public share, which no device gets."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.learning.data.config import CyclicClasses, DataConfig, Dirichlet, Groups, Iid, Partition, Shards
from fedbonsai.learning.data.load import load, load_public
from fedbonsai.learning.data.partition import (
    by_group,
    cyclic_classes,
    dirichlet_equal,
    dirichlet_free,
    iid,
    public_and_rest,
    shards,
    split,
)
from fedbonsai.learning.data.types import FederatedData, SamplePool, Samples
from hypothesis import given
from hypothesis import strategies as st

Owned = list[np.ndarray]
Deal = Callable[[np.ndarray, int, int], Owned]

# A new partition is a row: labels (or groups), number of devices, seed -> owned.
COMPLETE: dict[str, Deal] = {
    "iid": lambda labels, devices, seed: iid(len(labels), num_devices=devices, seed=seed),
    "dirichlet_free": lambda labels, devices, seed: dirichlet_free(
        labels, num_devices=devices, alpha=0.1, min_samples=1, seed=seed
    ),
    "dirichlet_equal": lambda labels, devices, seed: dirichlet_equal(
        labels, num_devices=devices, alpha=0.1, min_samples=1, seed=seed
    ),
    "shards": lambda labels, devices, seed: shards(labels, num_devices=devices, shards_per_device=1, seed=seed),
}

cases = st.tuples(
    st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array), st.integers(1, 60), st.integers(0, 2**40)
).filter(lambda case: case[1] <= len(case[0]))


@pytest.mark.parametrize("name", COMPLETE)
@given(case=cases)
def test_every_sample_has_one_owner_and_every_device_a_sample(name: str, case: tuple[np.ndarray, int, int]) -> None:
    labels, devices, seed = case
    owned = COMPLETE[name](labels, devices, seed)
    assert len(owned) == devices
    assert all(len(mine) >= 1 for mine in owned)
    assert all((np.diff(mine) > 0).all() for mine in owned)
    assert sorted(np.concatenate(owned)) == list(range(len(labels)))


@pytest.mark.parametrize("name", COMPLETE)
def test_the_seed_decides(name: str) -> None:
    labels = np.arange(200) % 5

    def dealt(seed: int) -> list[list[int]]:
        return [list(mine) for mine in COMPLETE[name](labels, 7, seed)]

    assert dealt(1) == dealt(1) != dealt(2)


@pytest.mark.parametrize("name", ["iid", "dirichlet_equal"])
def test_equal_sizes_give_the_remainder_to_the_first_devices(name: str) -> None:
    assert [len(mine) for mine in COMPLETE[name](np.arange(11) % 2, 4, 3)] == [3, 3, 3, 2]


def test_the_smaller_alpha_the_fewer_classes_a_device_has() -> None:
    labels = np.arange(2000) % 10

    def mean_classes(alpha: float, deal: Callable[..., Owned]) -> float:
        owned = deal(labels, num_devices=10, alpha=alpha, min_samples=1, seed=0)
        return float(np.mean([len(np.unique(labels[mine])) for mine in owned]))

    for deal in (dirichlet_free, dirichlet_equal):
        assert mean_classes(0.01, deal) < 5 < 9 < mean_classes(100, deal)


def test_free_sizes_with_a_huge_alpha_are_even_shares_of_every_class() -> None:
    labels = np.array([0] * 12 + [1] * 8)
    owned = dirichlet_free(labels, num_devices=4, alpha=1e9, min_samples=1, seed=0)
    assert [np.bincount(labels[mine]).tolist() for mine in owned] == [[3, 2]] * 4


def test_free_sizes_respect_the_minimum() -> None:
    owned = dirichlet_free(np.zeros(40, dtype=int), num_devices=8, alpha=0.01, min_samples=4, seed=0)
    assert min(len(mine) for mine in owned) >= 4


@pytest.mark.parametrize("alpha", [1e-300, 1e300])
def test_extreme_alphas_give_finite_proportions(alpha: float) -> None:
    for deal in (dirichlet_free, dirichlet_equal):
        owned = deal(np.arange(30) % 3, num_devices=5, alpha=alpha, min_samples=1, seed=0)
        assert sum(len(mine) for mine in owned) == 30


def test_shards_hold_neighbouring_labels() -> None:
    labels = np.array([1, 0, 1, 0, 2, 2, 3, 3])
    owned = shards(labels, num_devices=2, shards_per_device=2, seed=4)
    assert [len(mine) for mine in owned] == [4, 4]
    assert all(len(np.unique(labels[mine])) == 2 for mine in owned)  # two shards of two, each of one label


def test_too_few_samples_for_the_shards_names_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"6 shards for 3 devices.*only 5 samples"):
        shards(np.zeros(5, dtype=int), num_devices=3, shards_per_device=2, seed=0)


def test_cyclic_classes_by_hand() -> None:
    labels = np.repeat([0, 1, 2], [5, 4, 3])
    owned = cyclic_classes(labels, num_devices=3, classes_per_device=2, seed=0)
    # Device 0 owns classes 0 and 1, device 1 owns 1 and 2, device 2 owns 2 and 0; the last owner of 5 and 3 takes more.
    assert [np.bincount(labels[mine], minlength=3).tolist() for mine in owned] == [[2, 2, 0], [0, 2, 1], [3, 0, 2]]
    assert sorted(np.concatenate(owned)) == list(range(12))


def test_cyclic_with_all_classes_is_an_even_share_of_each() -> None:
    labels = np.arange(40) % 4
    owned = cyclic_classes(labels, num_devices=5, classes_per_device=4, seed=1)
    assert [np.bincount(labels[mine]).tolist() for mine in owned] == [[2, 2, 2, 2]] * 5


def test_a_class_without_owner_is_not_used() -> None:
    labels = np.arange(20) % 5
    owned = cyclic_classes(labels, num_devices=2, classes_per_device=2, seed=1)
    assert np.unique(labels[np.concatenate(owned)]).tolist() == [0, 1, 2]


@given(case=cases, wanted=st.integers(1, 5))
def test_cyclic_shares_are_disjoint(case: tuple[np.ndarray, int, int], wanted: int) -> None:
    labels, devices, seed = case
    classes, counts = np.unique(labels, return_counts=True)
    if wanted > len(classes) or counts.min() < devices:
        labels = np.tile(np.arange(wanted), devices)  # a case that can be partitioned, in place of an error
    owned = cyclic_classes(labels, num_devices=devices, classes_per_device=wanted, seed=seed)
    together = np.concatenate(owned)
    assert len(np.unique(together)) == len(together)
    assert all(1 <= len(np.unique(labels[mine])) <= wanted for mine in owned)


def test_cyclic_errors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"classes_per_device is 4, but the data have only 3 classes"):
        cyclic_classes(np.arange(9) % 3, num_devices=2, classes_per_device=4, seed=0)
    with pytest.raises(ValueError, match=r"class 0 has 2 samples for 3 devices"):
        cyclic_classes(np.arange(4) % 2, num_devices=3, classes_per_device=2, seed=0)


def test_groups_stay_whole() -> None:
    groups = np.array([7, 7, 3, 9, 3, 9, 5])
    owned = by_group(groups, num_devices=2, seed=0)
    holders = [{int(g) for g in groups[mine]} for mine in owned]
    assert holders[0] | holders[1] == {3, 5, 7, 9}
    assert not holders[0] & holders[1]
    assert [len(mine) for mine in holders] == [2, 2]
    assert sum(len(mine) for mine in owned) == 7


def test_one_group_each_when_there_are_as_many_devices() -> None:
    owned = by_group(np.array([4, 4, 2]), num_devices=2, seed=0)
    assert sorted(mine.tolist() for mine in owned) == [[0, 1], [2]]


def test_fewer_groups_than_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 devices cannot share 2 groups"):
        by_group(np.array([0, 1, 1]), num_devices=3, seed=0)


def dealt(partition: Partition, **changes: object) -> Owned:
    labels = np.arange(24) % 4
    settings = {"num_samples": 24, "num_devices": 4, "seed": 0, "labels": labels, "groups": np.arange(24) % 8}
    return split(partition, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "partition",
    [
        Iid(),
        Dirichlet(alpha=1),
        Dirichlet(alpha=1, sizes="equal"),
        Shards(),
        CyclicClasses(classes_per_device=2),
        Groups(),
    ],
    ids=repr,
)
def test_split_carries_out_every_configuration(partition: Partition) -> None:
    owned = dealt(partition)
    assert sorted(np.concatenate(owned)) == list(range(24))


def test_equal_sizes_reach_the_partitioner() -> None:
    assert {len(mine) for mine in dealt(Dirichlet(alpha=0.1, sizes="equal"))} == {6}
    assert {len(mine) for mine in dealt(Dirichlet(alpha=0.1, sizes="free"))} != {6}


def test_more_devices_than_samples_names_both_numbers() -> None:
    for partition in (Iid(), Dirichlet(alpha=1), Shards(), Groups()):
        with pytest.raises(ValueError, match=r"30 devices and the data 24 training samples"):
            dealt(partition, num_devices=30)


def test_a_minimum_that_cannot_be_met_is_refused() -> None:
    for sizes in ("free", "equal"):
        with pytest.raises(ValueError, match=r"min_samples = 7 samples"):
            dealt(Dirichlet(alpha=1, min_samples=7, sizes=sizes))


def test_what_the_data_do_not_offer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'shards', which needs one class label"):
        dealt(Shards(), labels=None)
    with pytest.raises(ValueError, match=r"'groups', but these data have no natural groups"):
        dealt(Groups(), groups=None)


def config(**settings: Any) -> DataConfig:
    return msgspec.convert({"name": f"{__name__}:numbers"} | settings, DataConfig)


def numbers(*, num_devices: int, seed: int, root: str | None, owners: list[int] | None = None) -> SamplePool:
    """Twenty samples, whose inputs are their numbers, with four labels, in ten pairs."""
    x = torch.arange(20)
    held = None if owners is None else np.array(owners)
    return SamplePool(
        train=Samples(x[:, None], x % 4), test=Samples(x[:2, None] + 100, x[:2]), groups=x // 2, owners=held
    )


def own(*, num_devices: int, seed: int, root: str | None) -> FederatedData:
    return load(config(), num_devices=num_devices, seed=seed)


def devices(found: FederatedData) -> list[int]:
    """The numbers that devices hold, for training or testing."""
    parts = [part for d in range(found.num_devices) for part in (found.train(d), found.test(d)) if part is not None]
    return [int(number) for part in parts for number in part.x.flatten()]


def public(num_devices: int = 3, seed: int = 1, **settings: Any) -> list[int]:
    return [int(x) for x in load_public(config(**settings), num_devices=num_devices, seed=seed).train(0).x.flatten()]


@pytest.mark.parametrize(
    "partition",
    [
        {"name": "iid"},
        {"name": "dirichlet", "alpha": 0.5},
        {"name": "dirichlet", "alpha": 0.5, "sizes": "equal"},
        {"name": "shards", "shards_per_device": 2},
        {"name": "groups"},
    ],
)
def test_public_samples_and_the_devices_are_disjoint_and_together_all(partition: dict[str, Any]) -> None:
    settings = {"public_share": 0.25, "test_share": 0.2, "partition": partition}
    dealt = devices(load(config(**settings), num_devices=3, seed=1))
    shared = public(**settings)
    assert len(shared) == 5
    assert not set(dealt) & set(shared)
    if partition.get("sizes") != "equal":  # which may not use all
        assert sorted(dealt + shared) == list(range(20))


def test_the_public_share_depends_on_its_own_seed_alone() -> None:
    shared = public(public_share=0.25)
    assert public(public_share=0.25, num_devices=7, seed=9) == shared
    assert public(public_share=0.25, public_seed=1) != shared
    assert set(shared) < set(public(public_share=0.5))


def test_without_a_share_all_is_as_it_was() -> None:
    first, rest = public_and_rest(20, config())
    assert (len(first), rest.tolist()) == (0, list(range(20)))


def test_owners_keep_what_is_not_public() -> None:
    owners = [0] * 10 + [1] * 10
    settings = {"kwargs": {"owners": owners}, "public_share": 0.25}
    found, shared = load(config(**settings), num_devices=2, seed=1), set(public(num_devices=2, **settings))
    assert set(found.train(0).x.flatten().tolist()) == set(range(10)) - shared
    assert set(found.train(1).x.flatten().tolist()) == set(range(10, 20)) - shared


def test_the_content_is_named_by_one_digest_and_the_test_samples_are_the_servers() -> None:
    settings = config(public_share=0.25)
    shared, dealt = (how(settings, num_devices=3, seed=1) for how in (load_public, load))
    assert shared.digest()["data"] == dealt.digest()["data"] == load(config(), num_devices=3, seed=1).digest()["data"]
    test = shared.server_test()
    assert test is not None
    assert test.x.flatten().tolist() == [100, 101]
    assert shared.num_classes == 4


def test_a_share_that_leaves_a_device_without_samples_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        public(public_share=0.01)
    assert str(caught.value) == (
        "data.public_share is 0.01: 0 of 20 samples; at least one must be public, and one must be left for the devices"
    )
    first = public(public_share=0.05)[0]
    owners = [int(number != first) for number in range(20)]  # device 0 has this one only
    with pytest.raises(ValueError, match=r"data.public_share is 0.05, which leaves device 0 no sample"):
        load(config(kwargs={"owners": owners}, public_share=0.05), num_devices=2, seed=1)


@pytest.mark.parametrize("name", ["synthetic", f"{__name__}:own"])
def test_data_that_know_their_owners_have_no_public_share(name: str) -> None:
    settings = config(name=name, public_share=0.1)
    for how in (load, load_public):
        with pytest.raises(
            ValueError, match=r"data.public_share is 0.1, but '.*' defines the owner of each sample itself"
        ):
            how(settings, num_devices=3, seed=1)
    with pytest.raises(ValueError, match=r"data.public_share is 0; it must be above 0"):
        load_public(config(name=name), num_devices=3, seed=1)
