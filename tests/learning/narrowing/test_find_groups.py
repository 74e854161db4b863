"""Groups of channels: owners of pencil-sized networks by hand, layers that stay whole, and the checks of what was found."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedbonsai.learning.models import build
from fedbonsai.learning.narrowing.check_groups import Probe
from fedbonsai.learning.narrowing.find_groups import find_groups
from fedbonsai.learning.narrowing.narrow import narrow
from fedbonsai.learning.spec import Call
from torch import Tensor, nn

IMAGE = torch.zeros(2, 1, 4, 4)


def owners(groups):
    return {name: {d: owner.tolist() for d, owner in dims.items()} for name, dims in groups.owners.items()}


def every(prefix, numbers, names):
    return {f"{prefix}.{name}": {0: numbers} for name in names}


NORM = ("weight", "bias", "running_mean", "running_var")


def test_a_convolution_its_normalisation_and_a_flattened_map():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    )
    groups = find_groups(model, IMAGE)
    assert (groups.names, groups.sizes, groups.starts, groups.channels) == (("0",), (3,), (0,), 3)
    assert owners(groups) == {
        **every("0", [0, 1, 2], ("weight", "bias")),
        **every("1", [0, 1, 2], NORM),
        "5.weight": {1: [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]},
    }
    assert (groups.producers, groups.scales) == ((("0.weight",),), (("1.weight",),))
    assert groups.whole == {"5": "its channels are the model's outputs"}


class Residual(nn.Module):
    """Two convolutions are added up, and the sum meets the second one again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.inner = nn.Conv2d(2, 3, 1, bias=False)
        self.outer = nn.Conv2d(3, 2, 1)
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.outer(self.inner(x)))


def test_a_sum_ties_channels():
    groups = find_groups(Residual(), IMAGE)
    assert (groups.names, groups.sizes) == (("stem", "inner"), (2, 3))
    assert owners(groups) == {
        "stem.weight": {0: [0, 1]},
        "inner.weight": {0: [2, 3, 4], 1: [0, 1]},
        "outer.weight": {0: [0, 1], 1: [2, 3, 4]},
        "outer.bias": {0: [0, 1]},
        "head.weight": {1: [0, 1]},
    }
    assert groups.producers == (("stem.weight", "outer.weight"), ("inner.weight",))


class Concatenation(nn.Module):
    """Two widths side by side, a normalisation of both, and a sum with a layer as wide as both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(1, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.c = nn.Conv2d(1, 5, 1, bias=False)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.cat([self.b(x), self.a(x)], dim=1)) + self.c(x))


def test_a_concatenation_has_several_groups_in_one_dimension():
    """Each keeps a channel: of ``c`` alone, all channels of ``a`` might go."""
    groups = find_groups(Concatenation(), IMAGE)
    assert (groups.names, groups.sizes) == (("a", "b"), (2, 3))
    assert owners(groups) == {
        "a.weight": {0: [0, 1]},
        "b.weight": {0: [2, 3, 4]},
        **every("norm", [2, 3, 4, 0, 1], NORM),
        "c.weight": {0: [2, 3, 4, 0, 1]},
        "head.weight": {1: [2, 3, 4, 0, 1]},
    }
    assert groups.producers == (("a.weight", "c.weight"), ("b.weight", "c.weight"))
    assert groups.scales == (("norm.weight",), ("norm.weight",))


def test_a_depthwise_convolution_belongs_to_its_inputs():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.PReLU(4), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1)
    )
    groups = find_groups(model, IMAGE)
    assert owners(groups) == {
        **every("0", [0, 1, 2, 3], ("weight", "bias")),
        **every("1", [0, 1, 2, 3], ("weight", "bias")),
        "2.weight": {0: [0, 1, 2, 3]},
        **every("3", [0, 1, 2, 3], ("weight", "bias")),
        "4.weight": {1: [0, 1, 2, 3]},
    }
    assert groups.producers == (("0.weight", "1.weight"),)
    narrow(model, groups, np.array([True, False, True, False]))
    assert (model[1].in_channels, model[1].out_channels, model[1].groups) == (2, 2, 2)
    assert (model[2].num_parameters, model[3].num_channels) == (2, 2)
    assert model(IMAGE).shape == (2, 2, 2, 2)


class Unflattened(nn.Module):
    """A linear layer whose outputs become two channels of 2x2."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.head = nn.Linear(3, 8), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(self.linear(x).view(len(x), -1, 2, 2))))


class Attention(nn.Module):
    """A map of one channel is multiplied with all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.conv, self.head = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.gate(x)) * self.conv(x))


def test_a_layer_of_one_channel_is_broadcast():
    groups = find_groups(Attention(), IMAGE)
    assert owners(groups) == {
        "conv.weight": {0: [0, 1, 2]},
        "conv.bias": {0: [0, 1, 2]},
        "head.weight": {1: [0, 1, 2]},
    }


class Tied(nn.Module):
    """The second and third layer have one weight, and an unused layer keeps it under a third name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 3)
        self.second, self.third = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.third.weight = self.second.weight
        self.again = self.second
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(torch.relu(self.second(torch.relu(self.first(x.flatten(1)))))))


def test_tied_tensors_tie_channels_and_stay_tied():
    """One index of the tied weight belongs to the channels of both layers."""
    model = Tied()
    groups = find_groups(model, IMAGE)
    assert groups.sizes == (3,)
    assert owners(groups)["second.weight"] == owners(groups)["third.weight"] == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert owners(groups)["again.weight"] == owners(groups)["second.weight"]
    narrow(model, groups, np.array([True, False, True]))
    assert model.third.weight is model.second.weight is model.again.weight
    assert model.second.weight.shape == (2, 2)
    assert model(IMAGE).shape == (2, 2)


class Chunked(nn.Module):
    """Halves of one layer's channels are used apart: as long as both keep as many, they can be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(1, 6, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        return self.b(b) + self.a(a)


class Gated(Chunked):
    """One half gates the other: a channel is one of each."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        return self.a(a * torch.sigmoid(b))


def test_halves_of_a_layer():
    groups = find_groups(Chunked(), IMAGE)
    assert (groups.names, groups.sizes) == (("conv", "conv"), (3, 3))
    assert owners(groups)["conv.weight"] == {0: [0, 1, 2, 3, 4, 5]}
    assert (owners(groups)["a.weight"], owners(groups)["b.weight"]) == ({1: [0, 1, 2]}, {1: [3, 4, 5]})
    assert owners(find_groups(Gated(), IMAGE))["conv.weight"] == {0: [0, 1, 2, 0, 1, 2]}


def sequence(*layers):
    """Layers between two narrowable groups of four channels each, so that something is left."""
    return nn.Sequential(nn.Conv2d(1, 4, 1), *layers, nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))


class Scale(nn.Module):
    """A parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Fixed(nn.Module):
    """Code that counts on four channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), 4, *x.shape[2:])


class Positional(nn.Module):
    """Code that runs at any width, and in which the order of channels matters."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]


class Single(nn.Module):
    """Works in single precision whatever the model's type is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x.float())) * self.scale


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 1, groups=2), "its channels reach '1', a Conv2d that cannot be narrowed"),
        (nn.ConvTranspose2d(4, 4, 1), "its channels reach '1', a ConvTranspose2d that cannot be narrowed"),
        (nn.GroupNorm(2, 4), "its channels reach '1', a GroupNorm that cannot be narrowed"),
        (nn.BatchNorm2d(4, affine=False, track_running_stats=False), "its channels reach '1', a BatchNorm2d"),
        (Scale(), "its channels reach a parameter that belongs to no layer of torch's own"),
        (Fixed(), "a narrower model fails: RuntimeError"),
        (Positional(), "what the model computes depends on the order of its channels"),
        (nn.ChannelShuffle(2), "a narrower model fails: RuntimeError"),
        (nn.LocalResponseNorm(3), "what the model computes depends on the order of its channels"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_not_known_for_certain_stays_whole(layer, reason):
    model = sequence(layer)
    groups = find_groups(model, IMAGE)
    assert (groups.names, groups.sizes) == (("2",), (3,))
    assert groups.whole["0"].startswith(reason)
    assert not any(name.startswith(("0.", "1.")) for name in groups.owners)
    assert "2.weight" in groups.owners
    assert 1 not in groups.owners["2.weight"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.InstanceNorm2d(4, affine=True),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        Single(),
        nn.Softmax(1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_can_be_narrowed(layer):
    model = sequence(layer)
    groups = find_groups(model, IMAGE)
    assert groups.sizes[0] == 4
    narrow(model, groups, np.arange(groups.channels) % 2 == 0)
    assert model(IMAGE).shape == (2, 2, 4, 4)


def test_an_unflattened_map():
    """Positions of one channel are one channel of the linear layer."""
    groups = find_groups(Unflattened(), torch.zeros(2, 3))
    assert owners(groups)["linear.weight"] == {0: [0, 0, 0, 0, 1, 1, 1, 1]}
    assert owners(groups)["conv.weight"] == {0: [2, 3, 4], 1: [0, 1]}


class Features(nn.Module):
    """Returns its features beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.b(torch.relu(self.a(x.flatten(1))))
        return {"logits": self.head(features), "features": features}


def test_every_output_keeps_its_channels():
    groups = find_groups(Features(), IMAGE)
    assert groups.names == ("a",)
    assert groups.whole == dict.fromkeys(("b", "head"), "its channels are the model's outputs")


class NeedsValues(nn.Module):
    """Its code reads a value, which tensors on the meta device do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)) * self.scale.item())


class Broken(nn.Module):
    """Fails."""

    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no such disk")


@pytest.mark.parametrize(
    ("model", "inputs", "sentence"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(16, 2)),
            IMAGE,
            "it has no channels but those of its inputs and outputs",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1)),
            IMAGE,
            "'0' stays whole, since its",
        ),
        (nn.Sequential(nn.Conv2d(1, 4, 1), Positional(), nn.Conv2d(4, 1, 1)), IMAGE, "'0' stays whole, since what the"),
        (nn.Sequential(nn.Linear(4, 4), Broken()), IMAGE, "its channels cannot be followed: OSError: no such disk"),
        (
            build(Call("shufflenet_v2_x0_5", {}), seed=0, outputs=10),
            torch.zeros(1, 3, 32, 32),
            "its channels cannot be followed: ZeroDivisionError: integer division or modulo by zero",
        ),
    ],
    ids=["one layer", "all groups", "order", "broken", "shufflenet"],
)
def test_models_that_cannot_be_narrowed(model, inputs, sentence):
    with pytest.raises(ValueError, match=f"^this model cannot be narrowed: {sentence}"):
        find_groups(model, inputs)


def test_code_that_needs_values_runs_on_a_copy():
    assert find_groups(NeedsValues(), IMAGE).sizes == (4,)
    assert find_groups(NeedsValues(), IMAGE.to("meta")).sizes == (4,)


def test_the_model_is_left_as_it_was_and_the_meta_device_gives_the_same():
    model = build(Call("resnet18", {}), seed=0, outputs=10)
    model.layer1.eval()
    model.conv1.requires_grad_(False)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    before = copy.deepcopy(model)
    modes, tensors = [m.training for m in model.modules()], dict(model.named_parameters())
    gradients = {name: tensor.grad.clone() for name, tensor in tensors.items() if tensor.grad is not None}
    random = torch.get_rng_state()
    groups = find_groups(model, torch.zeros(2, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(tensor is tensors[name] for name, tensor in model.named_parameters())
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    found = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.inference_mode(), torch.device("meta"):
        again = find_groups(model.to("meta"), torch.zeros(2, 3, 32, 32))
    assert (again.names, again.sizes, again.whole) == (groups.names, groups.sizes, groups.whole)
    assert owners(again) == owners(groups)


def test_groups_that_are_wrong_are_found_among_right_ones():
    """Owners in which two layers of equal size are mistaken for each other: the narrow model runs all the same."""
    model = nn.Sequential(*(nn.Conv2d(1 if i == 0 else 4, 4, 1) for i in range(9)))
    groups = find_groups(model, IMAGE)
    assert groups.sizes == (4,) * 8
    probe = Probe(model, IMAGE, [(2, 4, 4, 4)])
    assert probe.accepted(groups).whole == groups.whole
    wrong = {name: dict(dimensions) for name, dimensions in groups.owners.items()}
    wrong["3.weight"][1], wrong["6.weight"][1] = wrong["6.weight"][1], wrong["3.weight"][1]
    checked = probe.accepted(replace(groups, owners=wrong))
    assert set(checked.whole) - set(groups.whole) == {"2", "5"}
    assert checked.names == ("0", "1", "3", "4", "6", "7")
