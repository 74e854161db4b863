import pickle

import pytest
import torch
from fedbonsai.learning.data.transforms import Normalize, RandomCrop, RandomFlip, Resize, build
from fedbonsai.learning.data.types import Transform
from fedbonsai.learning.spec import Call


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apply(transform: Transform, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return transform(x, seeded(seed))


def add(x: torch.Tensor, generator: torch.Generator, *, amount: float) -> torch.Tensor:
    """A user's transform."""
    return x + amount


def test_normalize_takes_bytes_and_floats() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    normalize = Normalize((0.5, 0.0), (0.5, 2.0))
    expected = torch.tensor([-1.0, 0.5]).view(1, 2, 1, 1)
    assert torch.equal(apply(normalize, pixels), expected)
    assert torch.equal(apply(normalize, pixels / 255), expected)


def test_normalize_leaves_its_input_alone() -> None:
    x = torch.ones(2, 1, 2, 2)
    apply(Normalize((1.0,), (1.0,)), x)
    assert torch.equal(x, torch.ones(2, 1, 2, 2))


def test_normalize_refuses_the_wrong_number_of_channels() -> None:
    with pytest.raises(ValueError, match=r"mean has 3 values, but the batch has shape \(2, 1, 4, 4\)"):
        apply(Normalize((0.0,) * 3, (1.0,) * 3), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="mean has 1 values and std 2"):
        Normalize((0.0,), (1.0, 1.0))


def test_normalize_works_beside_images() -> None:
    assert torch.equal(apply(Normalize((1.0, 2.0), (1.0, 1.0)), torch.tensor([[1.0, 2.0]])), torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_crop_is_a_window_of_the_padded_image(dtype: torch.dtype) -> None:
    x = torch.arange(1, 50 * 2 * 3 * 4 + 1).remainder(250).add(1).view(50, 2, 3, 4).to(dtype)
    cropped = apply(RandomCrop(padding=1), x)
    assert cropped.shape == x.shape
    assert cropped.dtype == dtype
    assert cropped.is_contiguous()
    padded = torch.nn.functional.pad(x, [1] * 4)
    corners = set()
    for image, result in zip(padded, cropped, strict=True):
        found = [
            (row, column)
            for row in range(3)
            for column in range(3)
            if torch.equal(image[:, row : row + 3, column : column + 4], result)
        ]
        assert len(found) == 1
        corners.add(found[0])
    assert len(corners) == 9  # every corner occurs among 50 images


def test_flip_mirrors_about_as_many_as_asked() -> None:
    x = torch.rand(200, 1, 2, 3, generator=seeded())
    flipped = apply(RandomFlip(probability=0.5), x)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(x, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 70 < sum(mirrored) < 130
    assert torch.equal(apply(RandomFlip(probability=1), x), x.flip(-1))
    assert torch.equal(apply(RandomFlip(probability=0), x), x)


def test_resize_gives_floats_between_zero_and_one() -> None:
    x = torch.full((2, 3, 8, 6), 51, dtype=torch.uint8)
    resized = apply(Resize(size=4), x)
    assert resized.shape == (2, 3, 4, 4)
    assert torch.allclose(resized, torch.tensor(0.2))


@pytest.mark.parametrize("name", ["random_crop", "random_flip"])
def test_images_are_needed(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs images .* \(5, 7\)"):
        apply(build([Call(name)], field="f"), torch.zeros(5, 7))


def test_random_only_through_the_generator() -> None:
    x = torch.rand(30, 1, 4, 4, generator=seeded())
    transform = build([Call("random_crop"), Call("random_flip")], field="f")
    before = torch.random.get_rng_state()
    assert torch.equal(apply(transform, x, 1), apply(transform, x, 1))
    assert not torch.equal(apply(transform, x, 1), apply(transform, x, 2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_list_the_data_sets_normalisation_applies() -> None:
    x = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    assert apply(build([], field="f", mean=(0.5,), std=(0.25,)), x).item() == 2.0
    assert apply(build([Call("normalize")], field="f", mean=(0.5,), std=(0.25,)), x).item() == 2.0
    assert (
        apply(build([Call("normalize", {"mean": [0], "std": [0.5]})], field="f", mean=(0.5,), std=(0.25,)), x).item()
        == 2
    )


def test_the_output_of_a_chain_is_never_images_as_bytes() -> None:
    x = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    assert apply(build([Call("random_flip")], field="f", mean=(0.5,), std=(0.25,)), x).item() == 1.0


def test_without_anything_floats_pass_untouched() -> None:
    x = torch.rand(3, 5, generator=seeded())
    assert apply(build([], field="f"), x) is x


def test_a_users_function_with_keywords() -> None:
    transform = build([Call(f"{__name__}:add", {"amount": 2.0})], field="f")
    assert torch.equal(apply(transform, torch.zeros(3)), torch.full((3,), 2.0))


def test_transforms_survive_serialisation() -> None:
    transform = build([Call("random_crop", {"padding": 2}), Call("normalize")], field="f", mean=(0.1,), std=(0.2,))
    assert pickle.loads(pickle.dumps(transform)) == transform


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (Call("rotate"), r"data\.train_transforms names 'rotate'; allowed: normalize, random_crop"),
        (Call("random_crop", {"pad": 1}), r"data\.train_transforms: the keywords of 'random_crop' do not fit: .*`pad`"),
        (Call("random_crop", {"padding": 0}), r"'random_crop' do not fit: .*>= 1"),
        (Call("normalize", {"mean": [0.0], "std": [0.0]}), r"'normalize' do not fit: .*> 0"),
        (Call(f"{__name__}:add", {"sum": 1}), r"is called as fn\(x, generator, \*\*kwargs\), but: "),
        (Call("no_such_module:f"), r"data\.train_transforms is 'no_such_module:f'"),
    ],
)
def test_mistakes_name_the_field(call: Call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build([call], field="data.train_transforms")


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3), (2,)])
def test_bytes_that_are_no_images_are_no_pixels(shape: tuple[int, ...]) -> None:
    """A table of counts, or text as bytes."""
    x = torch.full(shape, 255, dtype=torch.uint8)
    assert apply(build([], field="f"), x) is x
    assert apply(build([Call("normalize")], field="f"), x).unique().tolist() == [1.0]  # explicitly configured
