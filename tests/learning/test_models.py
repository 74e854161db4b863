"""Models by name: exact sizes, seeds, arguments, and errors in one sentence."""

import numpy as np
import pytest
import torch
from fedbonsai.learning.models import build, names, use_batch_statistics
from fedbonsai.learning.models.from_torchvision import replace_head
from fedbonsai.learning.spec import Call
from sklearn.datasets import load_digits
from torch import nn


def make(name: str, *, outputs: int | None = None, seed: int = 0, **kwargs: object) -> nn.Module:
    return build(Call(name, kwargs), seed=seed, outputs=outputs)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def of_user(num_classes: int, width: int = 3) -> nn.Module:
    return nn.Linear(width, num_classes)


def lazy() -> nn.Module:
    return nn.LazyLinear(3)


class Remembering(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}


def not_a_model() -> int:
    return 3


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("resfed_cnn", (3, 32, 32), 1_020_160),  # the paper's "4.08 MB" of float32
        ("vgg11_bn", (3, 32, 32), 34_440_970),
        ("vgg16_bn", (3, 32, 32), 33_642_442),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("small", (3, 32, 32), 2_156_490),
        ("digits_cnn", (1, 8, 8), 38_282),
        ("torchvision/resnet18", (3, 32, 32), 11_181_642),
    ],
)
def test_sizes(name, shape, count):
    model = make(name, outputs=10)
    assert parameters(model) == count
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, *shape)).shape == (2, 10)


def test_vgg16_buffers_and_flattened_widths():
    """The two papers' networks differ in pools, bias and the width of the flattened map."""
    vgg11, vgg16 = make("vgg11_bn"), make("vgg16_bn")
    assert sum(b.numel() for b in vgg16.buffers()) == 8_461
    assert (vgg11.get_submodule("classifier.0").in_features, vgg16.get_submodule("classifier.0").in_features) == (
        2048,
        512,
    )
    assert vgg11.get_submodule("features.0").bias is not None
    assert vgg16.get_submodule("features.0").bias is None


def test_resnet18_has_the_cifar_stem_and_torchvisions_has_not():
    ours, theirs = make("resnet18"), make("torchvision/resnet18")
    assert (ours.conv1.kernel_size, ours.conv1.stride, type(ours.maxpool)) == ((3, 3), (1, 1), nn.Identity)
    assert (theirs.conv1.kernel_size, theirs.conv1.stride, type(theirs.maxpool)) == ((7, 7), (2, 2), nn.MaxPool2d)


def test_channels_and_image_size():
    assert make("small", in_channels=1, image_size=28)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size is 4; this model halves the image 3 times"):
        make("resfed_cnn", image_size=4)


@pytest.mark.parametrize("name", ["digits_cnn", "resnet18", "squeezenet1_1", f"{__name__}:of_user"])
def test_same_seed_same_bits_and_the_global_generator_is_unchanged(name):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (make(name, outputs=10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_digits_cnn_learns_digits():
    """More than 97 % on held-out digits after six epochs of the default optimiser."""
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    y = torch.from_numpy(digits.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    train, test = order[:1400], order[1400:]
    model = make("digits_cnn", outputs=10)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(6):
        for batch in train[torch.randperm(1400, generator=torch.Generator().manual_seed(epoch))].split(32):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    with torch.no_grad():
        assert (model(x[test]).argmax(1) == y[test]).float().mean() > 0.97


@pytest.mark.parametrize(
    "name",
    [
        *("torchvision/resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
        *("shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5"),
    ],
)
def test_cifar_stem_keeps_small_images_large(name):
    """The last convolution's map is at least twice as wide with the CIFAR stem."""

    def last_map(stem: str) -> int:
        model = make(name, outputs=7, stem=stem).eval()
        sides: list[int] = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # All strides are applied where maps are smallest; squeeze-and-excite works on 1x1 maps.
                module.register_forward_hook(lambda _, inputs, out: sides.append(out.shape[-1]))
        with torch.no_grad():
            assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
        return max(sides[-1], sides[-2])

    assert last_map("cifar") >= 2 * last_map("imagenet")


def test_stem_errors():
    with pytest.raises(ValueError, match="stem is 'cifar', which 'alexnet' does not have; these families do: ResNet"):
        make("alexnet", stem="cifar")
    with pytest.raises(ValueError, match="stem is 'mnist'; it may be imagenet or cifar"):
        make("resnet18", stem="mnist")
    with pytest.raises(ValueError, match="weights is 'NOTHING'; for 'resnet18' it may be IMAGENET1K_V1 or DEFAULT"):
        make("torchvision/resnet18", weights="NOTHING")


def test_outputs_become_num_classes_unless_the_user_says_otherwise():
    assert make("digits_cnn", outputs=4).get_submodule("classifier.2").out_features == 4
    assert make("digits_cnn", outputs=4, num_classes=6).get_submodule("classifier.2").out_features == 6
    assert make("squeezenet1_1", outputs=4).num_classes == 4
    assert make(f"{__name__}:of_user", outputs=4, width=2).weight.shape == (4, 2)


def test_inception_has_one_output_in_training():
    assert isinstance(make("googlenet", outputs=3).train()(torch.zeros(2, 3, 64, 64)), torch.Tensor)


def test_pretrained_models_get_a_fresh_head():
    for name, head in (("resnet18", "fc"), ("squeezenet1_1", "classifier.1")):
        model = make(f"torchvision/{name}", num_classes=1000)
        old = model.get_submodule(head)
        replace_head(model, 1000)
        assert model.get_submodule(head) is old
        replace_head(model, 3)
        assert model.get_submodule(head).weight.shape[0] == 3


def test_errors_of_naming():
    with pytest.raises(
        ValueError, match=r"^model\.name is 'resnet_18', which is unknown; did you mean resnet18 .*fedbonsai models"
    ):
        make("resnet_18")
    with pytest.raises(
        ValueError, match="'digits_cnn': got an unexpected keyword argument 'depth'; its parameters are: num_classes"
    ):
        make("digits_cnn", depth=3)
    with pytest.raises(ValueError, match=r"torchvision's 'resnet50' refuses its arguments: .*'depth'"):
        make("resnet50", depth=3)
    with pytest.raises(ValueError, match="missing a required argument: 'num_classes'"):
        make(f"{__name__}:of_user")
    with pytest.raises(ValueError, match=r"returned a int; it must return an nn\.Module"):
        make(f"{__name__}:not_a_model")
    with pytest.raises(ValueError, match="which has lazy layers; give them their sizes"):
        make(f"{__name__}:lazy")
    with pytest.raises(ValueError, match="whose state holds '_extra_state'; it must hold tensors only"):
        make(f"{__name__}:Remembering")
    with pytest.raises(ValueError, match="which is a module; it must be a function or a class"):
        make(f"{__name__}:np")


def test_names_are_all_buildable_names():
    listed = names()
    assert list(listed)[:6] == ["digits_cnn", "resfed_cnn", "resnet18", "small", "vgg11_bn", "vgg16_bn"]
    assert "torchvision/resnet18" in listed
    assert "stem: imagenet or cifar" in listed["torchvision/densenet121"]
    assert all(line and "\n" not in line for line in listed.values())


def test_batch_statistics_are_used_in_evaluation_too():
    model = use_batch_statistics(make("resnet18").eval())
    assert not [name for name in model.state_dict() if "running" in name or "tracked" in name]
    layer = use_batch_statistics(nn.BatchNorm1d(1)).eval()
    assert layer(torch.tensor([[1.0], [3.0]])).tolist() == [[pytest.approx(-1, abs=1e-4)], [pytest.approx(1, abs=1e-4)]]


def scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(3, 3))


def partly_scripted() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)))


def without_parameters() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.ReLU())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("builder", "sentence"),
    [
        (scripted, "which returned a TorchScript module; it must be made of plain nn.Modules"),
        (partly_scripted, "whose '1' is a TorchScript module; it must be made of plain nn.Modules"),
        (without_parameters, "which has no parameters: there is nothing to train"),
    ],
)
def test_models_that_cannot_be_trained_here(builder, sentence):
    name = f"{__name__}:{builder.__name__}"
    with pytest.raises(ValueError, match=f"^model.name is {name!r}, {sentence}"):
        make(name)
