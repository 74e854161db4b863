"""The public share: nobody's samples, and the rest dealt out as ever."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.data.load import load, load_public
from fedbonsai.learning.data.public import public_and_rest
from fedbonsai.learning.data.types import FederatedData, SamplePool, Samples


def config(**settings: Any) -> DataConfig:
    return msgspec.convert({"name": f"{__name__}:numbers"} | settings, DataConfig)


def numbers(*, num_devices: int, seed: int, root: str | None, owners: list[int] | None = None) -> SamplePool:
    """Twenty samples, each its own number, of four labels and ten pairs."""
    x = torch.arange(20)
    held = None if owners is None else np.array(owners)
    return SamplePool(
        train=Samples(x[:, None], x % 4), test=Samples(x[:2, None] + 100, x[:2]), groups=x // 2, owners=held
    )


def own(*, num_devices: int, seed: int, root: str | None) -> FederatedData:
    return load(config(), num_devices=num_devices, seed=seed)


def devices(found: FederatedData) -> list[int]:
    """The numbers that devices have, to train on or to test on."""
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
    if partition.get("sizes") != "equal":  # which may leave some out
        assert sorted(dealt + shared) == list(range(20))


def test_neither_the_seed_of_the_run_nor_the_number_of_devices_moves_it_and_its_own_seed_does() -> None:
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


def test_a_share_that_leaves_somebody_nothing_is_one_sentence() -> None:
    with pytest.raises(ValueError) as caught:
        public(public_share=0.01)
    assert str(caught.value) == (
        "data.public_share is 0.01: 0 of 20 samples; at least one must be public, and one a device's"
    )
    first = public(public_share=0.05)[0]
    owners = [int(number != first) for number in range(20)]  # device 0 has that one alone
    with pytest.raises(ValueError, match=r"data.public_share is 0.05, which leaves device 0 no sample"):
        load(config(kwargs={"owners": owners}, public_share=0.05), num_devices=2, seed=1)


@pytest.mark.parametrize("name", ["synthetic", f"{__name__}:own"])
def test_data_that_know_their_owners_have_no_public_share(name: str) -> None:
    settings = config(name=name, public_share=0.1)
    for how in (load, load_public):
        with pytest.raises(ValueError, match=r"data.public_share is 0.1, but '.*' says itself which device owns what"):
            how(settings, num_devices=3, seed=1)
    with pytest.raises(ValueError, match=r"data.public_share is 0; it must be above 0"):
        load_public(config(name=name), num_devices=3, seed=1)
