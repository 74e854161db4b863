"""The public set: where it comes from, its division, and that no device and no test has its samples."""

import time

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.data.devices import DeviceData, PoolShares
from fedbonsai.learning.data.load import load, load_public
from fedbonsai.learning.data.public import PublicSet, load_public_set, make_disjoint
from fedbonsai.learning.data.types import FederatedData, SamplePool, Samples
from torch import Tensor


def public_of(data: DataConfig, public: DataConfig | None = None, **changes: object) -> PublicSet:
    options = {"num_devices": 4, "seed": 1, "held_out": 0.1, "num_classes": 10} | changes
    return load_public_set(data, public, **options)


DIGITS = DataConfig(public_share=0.2)


# A user's modules.


def make_other(
    *,
    num_devices: int,
    seed: int,
    root: str | None,
    shape: tuple[int, ...] = (1, 8, 8),
    kind: str = "float32",
    count: int = 50,
) -> SamplePool:
    """Uniform noise of ``count`` samples, with labels that the task does not have."""
    generator = torch.Generator().manual_seed(7)
    x = (256 * torch.rand(count, *shape, generator=generator)).to(getattr(torch, kind))
    return SamplePool(train=Samples(x, torch.arange(count) % 2 + 50), mean=(0.5,), std=(0.25,))


def make_numbers(*, num_devices: int, seed: int, root: str | None) -> SamplePool:
    x = torch.linspace(0, 1, 20)[:, None]
    return SamplePool(train=Samples(x, 2 * x[:, 0]))


OTHER, NUMBERS = f"{__name__}:make_other", f"{__name__}:make_numbers"


def other(**kwargs: object) -> DataConfig:
    return DataConfig(name=OTHER, kwargs=kwargs)


# Where it comes from.


def test_it_is_the_public_share_of_the_task_with_its_labels() -> None:
    public, share = public_of(DIGITS), load_public(DIGITS, num_devices=4, seed=1).train(0)
    assert len(public) == 287
    assert torch.equal(public.samples.x, share.x)
    assert torch.equal(public.samples.y, share.y)
    assert public.labelled
    assert public.num_bytes == 287 * (64 * 4 + 8)
    assert public.dropped == 0
    first = public.transform(public.samples.x[:2], torch.Generator())
    assert torch.equal(first, share.x[:2])


@pytest.mark.parametrize("num_classes", [None, 10])
def test_labels_count_only_for_classes(num_classes: int | None) -> None:
    assert public_of(DIGITS, num_classes=num_classes).labelled is (num_classes is not None)
    assert not public_of(DataConfig(name=NUMBERS, public_share=0.5), num_classes=num_classes).labelled


def test_of_another_data_set_it_is_all_training_samples_without_labels_and_by_its_own_transform() -> None:
    public = public_of(DataConfig(), other())
    assert len(public) == 50
    assert not public.labelled
    assert public.num_bytes == 50 * 64 * 4
    x = public.samples.x
    assert torch.allclose(public.transform(x, torch.Generator()), (x - 0.5) / 0.25)
    assert sorted([*public.train, *public.held_out]) == list(range(50))


def test_without_both_there_is_none() -> None:
    with pytest.raises(
        ValueError, match=r"^server\.public is not set and data\.public_share is 0; distillation .* one of"
    ):
        public_of(DataConfig())


@pytest.mark.parametrize(
    ("public", "problem"),
    [
        (
            other(shape=(1, 9, 8)),
            r"^server\.public\.name is '.*make_other', whose inputs have shape \[1, 9, 8\] and type fl",
        ),
        (
            other(shape=(8,)),
            r"have shape \[8\] and type float32, after transforms; the task's have shape \[1, 8, 8\] and",
        ),
        (DataConfig(), r"^server\.public\.name is 'digits', which is what the devices have; .* data\.public_share$"),
        (DataConfig(name="none"), r"^server\.public: data\.name is 'none'; allowed: digits"),
        (DataConfig(name="cifar10", root="/nowhere"), r"^server\.public: data\.root: /nowhere/.* is missing"),
        (msgspec.structs.replace(other(), test_share=0.5), r"^server\.public\.test_share is 0\.5; leave it out"),
        (msgspec.structs.replace(other(), public_share=0.5), r"^server\.public\.public_share is 0\.5; leave it out"),
        (
            msgspec.convert({"name": OTHER, "train_transforms": [{"name": "random_flip"}]}, DataConfig),
            r"^server\.public\.train_transforms is .*random_flip.*; leave it out: .* without random transforms",
        ),
        (
            msgspec.convert({"name": OTHER, "test_transforms": [{"name": "random_flop"}]}, DataConfig),
            r"^server\.public: data\.test_transforms names 'random_flop'",
        ),
        (other(count=3), r"^the public set has 3 samples; distillation needs 2 to train on, and 2 that are held out$"),
    ],
)
def test_other_data_that_do_not_fit_are_refused(public: DataConfig, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        public_of(DataConfig(), public)
    assert "\n" not in str(caught.value)


def test_bytes_and_floats_fit_each_other_after_transforms() -> None:
    public = public_of(DataConfig(), other(kind="uint8"))
    assert public.samples.x.dtype == torch.uint8
    assert public.num_bytes == 50 * 64
    assert public.transform(public.samples.x, torch.Generator()).dtype == torch.float32


# Its division.


@pytest.mark.parametrize(("held_out", "expected"), [(0.1, 29), (0.5, 144), (0.001, 2), (0.999, 285)])
def test_so_many_samples_are_held_out(held_out: float, expected: int) -> None:
    public = public_of(DIGITS, held_out=held_out)
    assert len(public.held_out) == expected
    together = np.concatenate([public.train, public.held_out])
    assert sorted(together) == list(range(287))
    assert (np.diff(public.train) > 0).all()


def test_the_division_follows_from_the_seed() -> None:
    one, same, different = (public_of(DIGITS, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.held_out, same.held_out)
    assert not np.array_equal(one.held_out, different.held_out)
    assert one.digest == same.digest != different.digest
    assert public_of(DataConfig(public_share=0.3)).digest != one.digest


# Samples that others have too.


def as_it_is(x: Tensor, generator: torch.Generator) -> Tensor:
    return x


def private(x: Tensor, *, test: Tensor | None = None, num_devices: int = 2, test_share: float = 0.0) -> FederatedData:
    def samples(values: Tensor) -> Samples:
        return Samples(values, torch.zeros(len(values)))

    owned = np.array_split(np.arange(len(x)), num_devices)
    return DeviceData(
        shares=PoolShares(SamplePool(train=samples(x), test=None if test is None else samples(test)), owned),
        num_classes=None,
        train_transform=as_it_is,
        test_transform=as_it_is,
        with_server_test=True,
        test_share=test_share,
        seed=1,
    )


def numbers(start: int, count: int) -> Tensor:
    return torch.arange(float(start), float(start + count))[:, None].repeat(1, 3)


def hundreds(count: int = 200) -> PublicSet:
    """Samples 0, 1, ...; the last tenth is held out."""
    order = np.arange(count)
    return PublicSet(
        samples=Samples(numbers(0, count), torch.arange(count)),
        transform=as_it_is,
        labelled=True,
        train=order[: -count // 10],
        held_out=order[-count // 10 :],
        digest="old",
    )


def test_a_set_that_shares_no_sample_stays_as_it_is() -> None:
    public = hundreds()
    twice = torch.cat([numbers(500, 10)] * 2)  # private samples may be there more than once
    assert make_disjoint(public, private(twice, test=numbers(500, 4))) is public


@pytest.mark.parametrize("test_share", [0.0, 0.5])
def test_a_few_shared_samples_are_dropped(test_share: float) -> None:
    """3 on the devices (in their training or test shares), 199 in the server's test set; the last is held out."""
    x = torch.cat([numbers(500, 9), numbers(3, 1)])
    public = make_disjoint(hundreds(), private(x, test=numbers(199, 2), test_share=test_share))
    assert (len(public), public.dropped) == (198, 2)
    assert public.samples.y.tolist() == [label for label in range(199) if label != 3]
    assert public.samples.y[public.train].tolist() == [label for label in range(180) if label != 3]
    assert public.samples.y[public.held_out].tolist() == list(range(180, 199))
    assert public.digest != "old"
    assert make_disjoint(public, private(x, test=numbers(199, 2))) is public


@pytest.mark.parametrize("where", ["training", "devices' tests", "server's test"])
def test_more_than_one_in_a_hundred_are_refused(where: str) -> None:
    shared, own = numbers(10, 3), numbers(500, 6)
    data = {
        "training": private(torch.cat([own, shared])),
        "devices' tests": private(torch.cat([own, shared]), test_share=0.99),
        "server's test": private(own, test=shared),
    }[where]
    with pytest.raises(
        ValueError, match=r"has 200 samples, of which 3 are also on a device or in .*; at most 1% may be$"
    ):
        make_disjoint(hundreds(), data)


def test_all_public_copies_of_a_private_sample_are_dropped() -> None:
    public = hundreds()
    public.samples.x[7].copy_(public.samples.x[3])
    data = private(torch.cat([numbers(500, 9), numbers(3, 1)]))
    assert make_disjoint(public, data).dropped == 2


def test_inputs_of_another_type_or_shape_are_other_samples() -> None:
    for x in (numbers(0, 100).double(), numbers(0, 100)[:, :, None], torch.zeros(100, 12, dtype=torch.uint8)):
        public = hundreds()
        assert make_disjoint(public, private(x)) is public


def test_the_public_share_of_the_digits_is_disjoint_and_their_images_are_all_different() -> None:
    data = load(msgspec.structs.replace(DIGITS, test_share=0.2), num_devices=4, seed=1)
    public = public_of(DIGITS)
    assert make_disjoint(public, data) is public
    whole = load(DataConfig(), num_devices=1, seed=1)
    test = whole.server_test()
    assert test is not None
    images = torch.cat([whole.train(0).x, test.x])
    assert len(torch.unique(images.flatten(1), dim=0)) == 1797
    with pytest.raises(ValueError, match="has 287 samples, of which 287 are also on a device"):
        make_disjoint(public, load(DataConfig(), num_devices=4, seed=1))


def test_60000_images_are_compared_in_about_a_second() -> None:
    x = torch.randint(0, 256, (60_000, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    public = PublicSet(
        samples=Samples(x[:20_000], torch.zeros(20_000)),
        transform=as_it_is,
        labelled=False,
        train=np.arange(19_000),
        held_out=np.arange(19_000, 20_000),
        digest="",
    )
    start = time.process_time()
    assert make_disjoint(public, private(x[20_000:], num_devices=100)) is public
    assert time.process_time() - start < 5  # measured: 0.1 s
