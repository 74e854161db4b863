"""From a configuration to samples: built-in sets, and a user's own data."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.data.load import load, names
from fedbonsai.learning.data.types import FederatedData, SamplePool, Samples
from fedbonsai.learning.spec import Call
from torch import Tensor

LINE = Samples(torch.arange(3.0), torch.arange(3.0))


def config(**settings: object) -> DataConfig:
    return msgspec.convert(settings, DataConfig)


# A user's module.


def make_pool(*, num_devices: int, seed: int, root: str | None, count: int = 12, kind: str = "classes") -> SamplePool:
    x = torch.arange(count * 6, dtype=torch.float32).view(count, 2, 3)  # (T, F): a sequence
    y = torch.arange(count) % 3 if kind == "classes" else torch.linspace(0, 1, count)
    groups = torch.arange(count) // 2
    return SamplePool(train=Samples(x, y), test=Samples(x[:2], y[:2]), groups=groups)


class Own:
    """A user's FederatedData: the samples of a device are its number, ``num_samples`` times."""

    num_classes = None
    skipped = 2

    def __init__(self, num_devices: int) -> None:
        self.num_devices = num_devices

    def num_samples(self, device: int) -> int:
        return device + 1

    def train(self, device: int) -> Samples:
        return Samples(torch.full((device + 1, 1), float(device)), torch.zeros(device + 1))

    def test(self, device: int) -> Samples | None:
        return None

    def server_test(self) -> Samples | None:
        return self.train(0)

    def train_transform(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x + 1

    def test_transform(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x

    def digest(self) -> dict[str, str]:
        return {"data": "own", "split": "own"}


def make_owned(*, num_devices: int, seed: int, root: str | None, owners: list[int]) -> SamplePool:
    return SamplePool(train=Samples(torch.arange(5.0), torch.arange(5.0)), owners=np.array(owners))


def make_own(*, num_devices: int, seed: int, root: str | None, extra: int = 0) -> Own:
    return Own(num_devices + extra)


def make_nothing(*, num_devices: int, seed: int, root: str | None) -> None:
    return None


OWNED = f"{__name__}:make_owned"
POOL, OWN = f"{__name__}:make_pool", f"{__name__}:make_own"


def add(x: Tensor, generator: torch.Generator, *, amount: float) -> Tensor:
    return x + amount


def test_the_default_is_offline_and_reaches_every_device() -> None:
    data = load(config(), num_devices=8, seed=0)
    assert isinstance(data, FederatedData)
    assert sum(data.num_samples(d) for d in range(8)) == 1437
    assert data.num_classes == 10
    server = data.server_test()
    assert server is not None
    assert len(server) == 360
    assert data.test(0) is None


def test_the_same_seed_gives_the_same_samples_and_digests() -> None:
    def made(seed: int) -> FederatedData:
        return load(config(partition={"name": "dirichlet", "alpha": 0.5}, test_share=0.2), num_devices=5, seed=seed)

    assert torch.equal(made(1).train(3).x, made(1).train(3).x)
    assert made(1).digest() == made(1).digest()
    assert made(1).digest()["data"] == made(2).digest()["data"]
    assert made(1).digest()["split"] != made(2).digest()["split"]


def test_every_built_in_name_is_listed_in_one_line() -> None:
    assert list(names()) == ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder", "synthetic"]
    assert all(text and "\n" not in text for text in names().values())


def test_a_held_out_share_is_disjoint_and_rounded() -> None:
    data = load(config(name=POOL, kwargs={"count": 11}, test_share=0.25), num_devices=2, seed=0)
    assert [data.num_samples(d) for d in range(2)] == [4, 4]  # of 6 and 5: 1.5 and 1.25 held out, rounded 2 and 1
    seen = []
    for device in range(2):
        test = data.test(device)
        assert test is not None
        seen += [*data.train(device).x[:, 0, 0].tolist(), *test.x[:, 0, 0].tolist()]
        assert len(data.train(device)) == data.num_samples(device)
    assert sorted(seen) == [6.0 * n for n in range(11)]


def test_one_sample_stays_for_training() -> None:
    data = load(config(name=POOL, kwargs={"count": 3}, test_share=0.9), num_devices=3, seed=0)
    assert [data.num_samples(d) for d in range(3)] == [1, 1, 1]
    assert data.test(0) is None


def test_held_out_samples_enter_the_split_hash() -> None:
    plain = load(config(name=POOL), num_devices=2, seed=0).digest()
    shared = load(config(name=POOL, test_share=0.5), num_devices=2, seed=0).digest()
    assert plain["data"] == shared["data"]
    assert plain["split"] != shared["split"]


def test_a_run_can_do_without_server_data() -> None:
    for name in ("digits", "synthetic", POOL, OWN):
        assert load(config(name=name), num_devices=2, seed=0).server_test() is not None
        assert load(config(name=name, server_test=False), num_devices=2, seed=0).server_test() is None


def test_a_users_pool_is_partitioned() -> None:
    data = load(config(name=POOL, partition={"name": "shards", "shards_per_device": 1}), num_devices=3, seed=0)
    assert sorted(data.train(d).y.unique().item() for d in range(3)) == [0, 1, 2]
    assert data.train(0).x.shape == (4, 2, 3)
    assert data.num_classes == 3
    assert len(data.digest()["data"]) == 32


def test_a_users_groups_are_kept_together() -> None:
    data = load(config(name=POOL, partition={"name": "groups"}), num_devices=6, seed=0)
    assert all(data.train(d).x[1, 0, 0] - data.train(d).x[0, 0, 0] == 6 for d in range(6))


def test_a_users_owners_define_the_partition() -> None:
    data = load(config(name=OWNED, kwargs={"owners": [2, 0, 1, 0, 2]}), num_devices=3, seed=0)
    assert [data.train(d).x.tolist() for d in range(3)] == [[1, 3], [2], [0, 4]]


def test_regression_targets_have_no_classes() -> None:
    data = load(config(name=POOL, kwargs={"kind": "regression"}), num_devices=2, seed=0)
    assert data.num_classes is None
    assert data.train(0).y.dtype == torch.float32


def test_a_users_federated_data_is_not_changed() -> None:
    data = load(config(name=OWN), num_devices=3, seed=0)
    assert [data.num_samples(d) for d in range(3)] == [1, 2, 3]
    assert (data.num_devices, data.num_classes, data.skipped) == (3, None, 2)
    assert data.train(2).x.tolist() == [[2.0]] * 3
    assert data.test(2) is None
    assert data.digest() == {"data": "own", "split": "own"}
    assert data.train_transform(torch.zeros(1), torch.Generator()).item() == 1.0


def test_listed_transforms_take_the_place_of_a_users_own() -> None:
    calls = [msgspec.to_builtins(Call(f"{__name__}:add", {"amount": 5.0}))]
    data = load(config(name=OWN, train_transforms=calls), num_devices=3, seed=0)
    assert data.train_transform(torch.zeros(1), torch.Generator()).item() == 5.0
    assert data.test_transform(torch.zeros(1), torch.Generator()).item() == 0.0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "digit"}, r"data\.name is 'digit'; allowed: digits, mnist, .*, or module:function"),
        ({"kwargs": {"a": 1}}, r"data\.kwargs: the keywords of 'digits' do not fit: .*`a`"),
        ({"classes": ["a"]}, r"data\.classes is for the image folders"),
        ({"name": "synthetic", "partition": {"name": "groups"}}, r"'groups', but 'synthetic' defines the owner"),
        ({"name": "synthetic", "kwargs": {"shape": [0]}}, r"data\.kwargs: .*shape"),
        ({"name": "nowhere:f"}, r"data\.name is 'nowhere:f'"),
        ({"name": POOL, "kwargs": {"colour": 1}}, r"data\.kwargs: .*make_pool' is called with .*colour"),
        ({"name": POOL, "kwargs": {"seed": 1}}, r"data\.kwargs has 'seed', which the runtime itself passes"),
        ({"name": POOL, "kwargs": {"kind": "x"}, "partition": {"name": "shards"}}, r"needs one class label"),
        ({"name": f"{__name__}:make_nothing"}, r"returned NoneType; it must return a SamplePool or a FederatedData"),
        ({"name": OWN, "kwargs": {"extra": 2}}, r"made data for 5 devices; the fleet has 3"),
        ({"name": OWN, "partition": {"name": "shards"}}, r"'shards', but .*make_own' defines the owner"),
        ({"name": OWN, "test_share": 0.5}, r"data\.test_share is 0\.5, but .*make_own' defines the devices"),
        ({"name": OWNED, "kwargs": {"owners": [0, 1, 1, 0, 1]}}, r"belong to 2 devices, and the fleet has 3"),
        ({"name": OWNED, "kwargs": {"owners": [0, 1, 4, 0, 1]}}, r"owners must be 0 to 2"),
        ({"name": OWNED, "kwargs": {"owners": [0, 1]}}, r"owners has shape \(2,\) for 5 training samples"),
        ({"train_transforms": [{"name": "spin"}]}, r"data\.train_transforms names 'spin'"),
        ({"test_transforms": [{"name": "spin"}]}, r"data\.test_transforms names 'spin'"),
    ],
)
def test_mistakes_are_one_sentence(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(config(**settings), num_devices=3, seed=0)


def test_more_devices_than_samples() -> None:
    with pytest.raises(ValueError, match=r"2000 devices and the data 1437 training samples"):
        load(config(), num_devices=2000, seed=0)


def test_samples_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(3, 2\) and y \(4,\)"):
        Samples(torch.zeros(3, 2), torch.zeros(4))


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (
            lambda: Samples(np.zeros((3, 2)), torch.zeros(3)),
            "data: x of Samples is a numpy.ndarray; it must be a torch.Tensor",
        ),
        (lambda: Samples(torch.zeros(3), [0, 1, 2]), "data: y of Samples is a list; it must be a torch.Tensor"),
        (
            lambda: SamplePool(train=(torch.zeros(3), torch.zeros(3))),
            "data: train of SamplePool is a tuple, which has no take",
        ),
        (
            lambda: SamplePool(train=LINE, test=torch.zeros(3)),
            "data: test of SamplePool is a torch.Tensor, which has no targets",
        ),
        (
            lambda: SamplePool(train=LINE, groups=np.arange(3)),
            "data: groups of SamplePool is a numpy.ndarray; it must be a torch.Tensor",
        ),
        (
            lambda: SamplePool(train=LINE, owners=[0, 0, 1]),
            "data: owners of SamplePool is a list; it must be a numpy.ndarray",
        ),
    ],
)
def test_what_is_no_tensor_or_no_source_is_named(made: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        made()


class Short(Own):
    """Declares the fleet's number of devices, and holds samples of two."""

    def __init__(self, num_devices: int) -> None:
        super().__init__(num_devices)
        self.sizes = [3, 4]

    def num_samples(self, device: int) -> int:
        return self.sizes[device]


class Wrong(Own):
    """Members that return wrong values, or fail."""

    def num_samples(self, device: int) -> int:
        return 2.5 if device == 2 and "number" in self.wrong else super().num_samples(device)

    def train(self, device: int) -> Samples:
        if "fails" in self.wrong:
            raise KeyError("no such file")
        samples = super().train(device)
        return (samples.x, samples.y) if "tuple" in self.wrong else samples.take(np.array([0] * (device + 2)))

    def test(self, device: int) -> Samples | None:
        return torch.zeros(3)

    def digest(self) -> dict[str, str]:
        return {"data": "x"}


def make_short(*, num_devices: int, seed: int, root: str | None) -> Own:
    return Short(num_devices)


def make_wrong(*, num_devices: int, seed: int, root: str | None, wrong: str) -> Own:
    made = Wrong(num_devices)
    made.wrong = wrong
    return made


def test_federated_data_that_lacks_devices_of_the_fleet_are_refused_when_loaded() -> None:
    sentence = r"^data\.name: num_samples\(2\) of '.*:make_short' fails: IndexError: list index out of range$"
    with pytest.raises(ValueError, match=sentence):
        load(config(name=f"{__name__}:make_short"), num_devices=3, seed=0)


@pytest.mark.parametrize(
    ("wrong", "ask", "sentence"),
    [
        ("fails", lambda data: data.train(1), r"train\(1\) of '.*' fails: KeyError: 'no such file'"),
        ("tuple", lambda data: data.train(1), r"train\(1\) of '.*' is a tuple; it must be Samples"),
        ("", lambda data: data.train(1), r"train\(1\) of '.*' has 3 samples, where num_samples says 2"),
        ("", lambda data: data.test(1), r"test\(1\) of '.*' is a Tensor; it must be Samples, or None"),
        (
            "",
            lambda data: data.digest(),
            r"digest\(\) of '.*' is \{'data': 'x'\}; it must be a mapping with the keys data and",
        ),
        ("number", lambda data: None, r"num_samples\(2\) of '.*' is 2.5; it must be a whole number from 0"),
    ],
)
def test_what_federated_data_return_by_mistake_is_named(
    wrong: str, ask: Callable[[Any], object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=f"^data.name: {sentence}"):
        ask(load(config(name=f"{__name__}:make_wrong", kwargs={"wrong": wrong}), num_devices=3, seed=0))


class Listed(Samples):
    """Returns its targets as a list."""

    def targets(self) -> list[int]:
        return self.y.tolist()


def make_listed(*, num_devices: int, seed: int, root: str | None) -> SamplePool:
    return SamplePool(train=Listed(torch.zeros(3, 1), torch.arange(3)))


def test_targets_of_a_source_must_be_an_array() -> None:
    with pytest.raises(ValueError, match=r"^data: targets\(\) of Listed is a list; it must be a numpy.ndarray$"):
        load(config(name=f"{__name__}:make_listed"), num_devices=3, seed=0)
