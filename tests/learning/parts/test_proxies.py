"""Proxies: the shape of what they replace, at the size of the samples and at others; equal bits; and what cannot have one."""

from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
import torch
from fedbonsai.learning.architecture import Architecture, Examples
from fedbonsai.learning.compat import import_torchvision
from fedbonsai.learning.models.cnn import digits_cnn, resfed_cnn
from fedbonsai.learning.parts.part import proxy
from fedbonsai.learning.parts.proxies import (
    MapProxy,
    PooledProxy,
    SequenceProxy,
    build_proxy,
    channels_last,
    check_proxy,
)
from torch import nn

models = import_torchvision().models


def architecture(build, shape, *, seed=1, dtype=torch.float32):
    """A model with fixed initial weights, on samples of ``shape``."""

    def seeded():
        torch.manual_seed(0)
        return build()

    x = torch.zeros(8, *shape, dtype=dtype)
    examples = Examples(lambda: (x[0], torch.tensor(0)), lambda count: (x[:count], torch.zeros(count)))
    return Architecture(seeded, examples, seed=seed)


class ThroughStem(nn.Module):
    """A residual network with a stem for small images: 3x3 with stride 1, no pooling."""

    def __init__(self):
        super().__init__()
        net = models.resnet18(num_classes=5)
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        self.net = net

    def forward(self, x):
        return self.net(x)


class Lasting(nn.Module):
    """Maps with the channels last, between linear layers: [n, 6, 6, channels]."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 5), nn.Linear(5, 7), nn.Linear(7, 3)
        self.pool, self.out = nn.AvgPool2d(2), nn.Linear(3 * 9, 4)

    def forward(self, x):
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        x = torch.tanh(self.c(x)).permute(0, 3, 1, 2)
        return self.out(self.pool(x).flatten(1))


def vit():
    return models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    )


def swin():
    return models.SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=[4, 4], num_classes=5
    )


def convnext():
    config = models.convnext.CNBlockConfig
    return models.ConvNeXt([config(8, 16, 1), config(16, None, 1)], num_classes=5)


MODELS = {
    "resnet18": (lambda: models.resnet18(num_classes=5), (3, 64, 64), (3, 96, 96)),
    "resnet18, small images": (ThroughStem, (3, 32, 32), (3, 48, 48)),
    "vgg11_bn": (lambda: models.vgg11_bn(num_classes=5), (3, 32, 32), (3, 64, 64)),
    "mobilenet_v3": (lambda: models.mobilenet_v3_small(num_classes=5), (3, 64, 64), (3, 96, 96)),
    "vit": (vit, (3, 16, 16), None),
    "swin": (swin, (3, 32, 32), None),
    "convnext": (convnext, (3, 32, 32), (3, 64, 64)),
    "digits_cnn": (digits_cnn, (1, 8, 8), None),
    "resfed_cnn": (resfed_cnn, (3, 32, 32), None),
    "channels last": (Lasting, (6, 6, 2), None),
}


def groups_of(made, count=4):
    """At most ``count`` groups of the blocks but the last, as equal as possible."""
    body = made.spec.block_names[:-1]
    count = min(count, len(body))
    bounds = [len(body) * number // count for number in range(count + 1)]
    return [body[start:end] for start, end in pairwise(bounds)]


@dataclass
class Fed:
    """A model to which samples of one shape are given: what enters and leaves each of its groups."""

    made: Architecture
    shape: tuple[int, ...]

    def through(self, groups):
        """Pairs of what enters and leaves each group."""
        generator, found = torch.Generator().manual_seed(1), []
        x = torch.randn(2, *self.shape, generator=generator)
        self.made.blocks.model.eval()
        with torch.no_grad():
            for group in groups:
                before = x
                for name in group:
                    x = self.made.blocks.modules[name](x)
                found.append((before, x))
        return found


@pytest.mark.parametrize("name", MODELS)
def test_a_proxy_gives_what_its_blocks_give_in_shape_at_every_size(name):
    build, shape, other = MODELS[name]
    made = architecture(build, shape)
    assert made.cut_fault == ""
    groups = groups_of(made)
    assert len(groups) >= 2
    for size in (shape, other) if other else (shape,):
        for group, (entering, leaving) in list(zip(groups, Fed(made, size).through(groups), strict=True))[1:]:
            module = made.new_auxiliary(proxy(group[0], group[-1]))
            if size == other and isinstance(module, MapProxy) and not module.flat:
                module.grid = tuple(leaving.shape[-2:])  # it pools to the grid of the size that it was built for
            if size == other and not isinstance(module, MapProxy | nn.Linear):
                raise AssertionError("every proxy is one of two layers")
            assert module(entering).shape == leaving.shape, group
            assert module(entering).dtype == leaving.dtype


def test_every_run_of_neighbours_of_a_small_model_has_its_proxy():
    made = architecture(resfed_cnn, (3, 32, 32))
    body = made.spec.block_names[:-1]
    (*_, (entering, _)) = Fed(made, (3, 32, 32)).through([body[:1], body[1:2]])
    for first, last in combinations(range(1, len(body)), 2):
        groups = [body[:first], body[first : last + 1]]
        entering, leaving = Fed(made, (3, 32, 32)).through(groups)[1]
        assert made.new_auxiliary(proxy(body[first], body[last]))(entering).shape == leaving.shape


def test_of_a_residual_network_it_is_one_strided_convolution_without_bias():
    made = architecture(ThroughStem, (3, 32, 32))
    names = made.spec.block_names
    stages = [[name for name in names if f"layer{number}" in name] for number in (2, 3, 4)]
    built = [made.new_auxiliary(proxy(stage[0], stage[-1])) for stage in stages[:2]]
    assert [(m.in_channels, m.out_channels, m.stride, m.padding, m.bias) for m in built] == [
        (64, 128, (2, 2), (0, 0), None),
        (128, 256, (2, 2), (0, 0), None),
    ]
    assert [sum(p.numel() for p in m.parameters()) for m in built] == [32_768, 131_072]
    # The last block of the fourth stage pools, so that a vector of 512 leaves it: the convolution, then the mean of its map.
    last = made.new_auxiliary(proxy(stages[2][0], stages[2][-1]))
    assert (sum(p.numel() for p in last.parameters()), last.stride, last.grid, last.flat) == (
        524_288, (2, 2), (1, 1), True,
    )  # fmt: skip


@dataclass
class Cut:
    """What is known of the tensor at a cut."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def built(entering, leaving, channels=0):
    check_proxy(entering, leaving)
    return build_proxy(Cut(entering), Cut(leaving), channels=channels)


def test_which_proxy_leads_from_which_shape_to_which():
    assert isinstance(built((3, 8, 8), (5, 4, 4)), MapProxy)
    assert isinstance(built((3, 8, 8), (80,), channels=5), MapProxy)
    assert isinstance(built((3, 8, 8), (80,)), PooledProxy)
    assert isinstance(built((7, 3), (7, 4)), SequenceProxy)
    assert isinstance(built((7, 3), (4,)), SequenceProxy)
    assert type(built((6,), (4,))) is nn.Linear


def test_its_stride_is_the_ratio_of_the_sizes():
    strides = {after: built((3, 12, 12), (5, after, after)).stride for after in (12, 6, 4, 3, 5, 1)}
    assert strides == {12: (1, 1), 6: (2, 2), 4: (3, 3), 3: (4, 4), 5: (2, 2), 1: (3, 3)}
    for after in strides:  # also where no stride gives the size exactly: pooling does the rest
        assert built((3, 12, 12), (5, after, after))(torch.zeros(2, 3, 12, 12)).shape == (2, 5, after, after)
    assert built((2, 6, 9), (4, 3, 3))(torch.zeros(1, 2, 6, 9)).shape == (1, 4, 3, 3)
    assert built((2, 3, 3), (4, 5, 5))(torch.zeros(1, 2, 3, 3)).shape == (1, 4, 5, 5)  # larger maps leave than enter


def test_where_one_value_is_left_a_small_grid_is_averaged():
    strides = {before: built((3, before, before), (5,), channels=5).stride[0] for before in (1, 2, 3, 4, 8, 16, 32)}
    assert strides == {1: 1, 2: 2, 3: 2, 4: 2, 8: 2, 16: 4, 32: 8}


def test_its_kernel_is_as_large_as_its_stride():
    sizes = ((12, 12), (6, 6)), ((12, 12), (12, 12)), ((4, 2), (2, 1)), ((1, 4), (1, 4)), ((9, 9), (4, 4))
    made = [built((3, *before), (5, *after)) for before, after in sizes]
    assert [each.kernel_size for each in made] == [(2, 2), (1, 1), (2, 2), (1, 1), (2, 2)]
    assert all(each.kernel_size == each.stride and each.padding == (0, 0) for each in made)


def test_a_vector_that_holds_maps_is_made_of_maps():
    # 80 values of five channels: maps of 4x4, in the order of a flattened map.
    module = built((3, 8, 8), (80,), channels=5)
    x = torch.arange(2 * 3 * 64.0).reshape(2, 3, 8, 8)
    expected = nn.functional.conv2d(x, module.weight, stride=2).flatten(1)
    assert (module.out_channels, module.grid) == (5, (4, 4))
    torch.testing.assert_close(module(x), expected)
    # 7 values cannot be maps of five channels: one mean for each.
    other = built((3, 8, 8), (7,), channels=5)
    assert (other.out_channels, other.grid, other(x).shape) == (7, (1, 1), (2, 7))


def test_maps_with_the_channels_last_stay_so():
    assert channels_last((6, 6, 2))
    assert not channels_last((2, 6, 6))
    assert not channels_last((4, 4, 4))
    module = built((6, 6, 2), (3, 3, 5))
    x = torch.randn(2, 6, 6, 2, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.conv2d(x.permute(0, 3, 1, 2), module.weight, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), expected)
    assert module(x).is_contiguous()
    assert (module.in_channels, module.out_channels) == (2, 5)
    # Where one side is a cube, the other one says where the channels are.
    assert built((4, 4, 4), (2, 2, 8))(torch.zeros(1, 4, 4, 4)).shape == (1, 2, 2, 8)
    assert built((4, 4, 4), (8, 2, 2))(torch.zeros(1, 4, 4, 4)).shape == (1, 8, 2, 2)
    assert built((8, 8, 2), (4, 4, 4))(torch.zeros(1, 8, 8, 2)).shape == (1, 4, 4, 4)
    assert built((6, 6, 2), (9,))(torch.zeros(1, 6, 6, 2)).shape == (1, 9)
    assert built((6, 6, 2), (45,), channels=5)(torch.zeros(1, 6, 6, 2)).shape == (1, 45)


def test_a_linear_map_of_maps_reads_a_small_grid():
    module = built((2, 8, 8), (3,))
    x = torch.arange(128.0).reshape(1, 2, 8, 8)
    expected = nn.functional.avg_pool2d(x, 2).flatten(1) @ module.weight.T + module.bias
    assert module.in_features == 2 * 4 * 4
    torch.testing.assert_close(module(x), expected)
    assert built((2, 3, 3), (3,)).in_features == 2 * 3 * 3


def test_a_sequence_is_mapped_element_by_element_and_to_a_vector_by_its_mean():
    x = torch.arange(12.0).reshape(1, 4, 3)
    each, mean = built((4, 3), (4, 2)), built((4, 3), (2,))
    torch.testing.assert_close(each(x)[0, 2], x[0, 2] @ each.weight.T + each.bias)
    torch.testing.assert_close(mean(x)[0], torch.tensor([4.5, 5.5, 6.5]) @ mean.weight.T + mean.bias)


@pytest.mark.parametrize(
    ("entering", "leaving", "shapes"),
    [
        ((3,), (3, 4, 4), "3 to 3x4x4"),
        ((4, 3), (5, 3), "4x3 to 5x3"),
        ((3, 4, 4), (16, 3), "3x4x4 to 16x3"),
        ((2, 3, 4, 4), (2, 3, 4, 4), "2x3x4x4 to 2x3x4x4"),
        ((4,), (), "4 to a number"),
        ((6, 6, 2), (2, 3, 3), "6x6x2 to 2x3x3"),
    ],
)
def test_shapes_that_no_proxy_connects(entering, leaving, shapes):
    with pytest.raises(ValueError, match=f"^no proxy leads from {shapes}; it stands for blocks with maps, sequences"):
        check_proxy(entering, leaving)


def test_one_seed_gives_the_same_bits_at_every_call_and_the_random_state_is_as_before():
    name = proxy("features.2", "classifier.0")
    first, other = architecture(digits_cnn, (1, 8, 8)), architecture(digits_cnn, (1, 8, 8), seed=2)
    _ = first.spec, other.spec
    state = torch.random.get_rng_state()
    bits = [made.new_auxiliary(name).weight for made in (first, first, other)]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(77)
    assert torch.equal(bits[0], first.new_auxiliary(name).weight)
    assert torch.equal(bits[0], bits[1])
    assert not torch.equal(bits[0], bits[2])


def test_its_tensors_have_its_name_and_are_counted_without_values():
    made = architecture(digits_cnn, (1, 8, 8))
    name = proxy("features.2", "features.2")
    # From 16 maps of 8x8 to 32 maps of 4x4, flattened.
    assert [(t.name, t.shape, t.role) for t in made.spec.auxiliary(name).tensors] == [
        (f"{name}.weight", (32, 16, 2, 2), "weight")
    ]
    assert made.empty_auxiliary(name).weight.is_meta
    both = proxy("features.2", "classifier.0")
    # They end with a linear layer: 16 maps, pooled to 4x4, times 64, and 64 biases.
    assert [t.shape for t in made.spec.auxiliary(both).tensors] == [(64, 256), (64,)]


def test_a_proxy_has_the_type_of_the_models_weights():
    class Double(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
            self.double()

    made = architecture(Double, (4,), dtype=torch.float64)
    names = made.spec.block_names
    assert made.new_auxiliary(proxy(names[1], names[1])).weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("proxy@features.0..features.2", "a proxy can stand for neighbours among: features.2, classifier.0, classifier.2"),
        ("proxy@features.2..features.9", "a proxy can stand for neighbours among: "),
        ("proxy@classifier.0..features.2", "a proxy can stand for neighbours among: "),
        ("proxy@features.2", "a head can stand behind"),
    ],
)  # fmt: skip
def test_what_is_no_proxy_of_the_model_is_refused(name, sentence):
    made = architecture(digits_cnn, (1, 8, 8))
    for ask in (made.new_auxiliary, made.empty_auxiliary, made.spec.auxiliary):
        with pytest.raises(ValueError, match=f"^part.auxiliaries names {name!r}; {sentence}"):
            ask(name)


def test_blocks_between_shapes_that_no_proxy_connects_have_none():
    made = architecture(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 12), nn.Unflatten(1, (3, 4))), (4,))
    names = made.spec.block_names
    with pytest.raises(
        ValueError, match=f"^part.auxiliaries names '{proxy(names[1], names[1])}'; no proxy leads from 6 to 3x4"
    ):
        made.new_auxiliary(proxy(names[1], names[1]))
