"""Blocks: names, roles, and equality with the whole model, bit for bit, on torchvision's and on unusual models."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from fedbonsai.learning.models import build
from fedbonsai.learning.parts.blocks import Blocks, cut, cut_like, grouped, model_spec
from fedbonsai.learning.spec import Call
from torch import Tensor, nn


def named(name: str, **kwargs: object) -> nn.Module:
    return build(Call(name, kwargs), seed=0, outputs=10)


def tensors(blocks: Blocks) -> dict[str, list[str]]:
    return {block.name: [tensor.name for tensor in block.tensors] for block in blocks.spec.blocks}


def check_equal(model: nn.Module, blocks: Blocks, x: Tensor) -> None:
    """Output, random numbers and running statistics are equal in both modes, and every name occurs once."""
    keys = [key for module in blocks.modules.values() for key in module.state_dict()]
    assert sorted(keys) == sorted(model.state_dict())
    for name, module in blocks.modules.items():
        assert set(tensors(blocks)[name]) == module.state_dict().keys()
    for train in (True, False):
        model.train(train)
        start = copy.deepcopy(model.state_dict())
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            whole, after = model(x), copy.deepcopy(model.state_dict())
            model.load_state_dict(start)
            torch.manual_seed(1)
            assert torch.equal(whole, blocks.run(blocks.modules, x))
        assert all(torch.equal(after[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "kwargs", "shape", "num_blocks", "some"),
    [
        ("digits_cnn", {}, (1, 8, 8), 4, ["features.0", "features.2", "classifier.0", "classifier.2"]),
        ("vgg11_bn", {}, (3, 32, 32), 11, ["features.0", "features.4", "classifier.3"]),
        ("resnet18", {}, (3, 32, 32), 10, ["conv1", "layer1.0", "layer4.1", "fc"]),
        ("mobilenet_v3_small", {"stem": "cifar"}, (3, 32, 32), 28, ["features.0.0", "features.5.block"]),
        ("densenet121", {"stem": "cifar"}, (3, 32, 32), 9, ["features.conv0", "features.denseblock4", "classifier"]),
        ("shufflenet_v2_x0_5", {"stem": "cifar"}, (3, 32, 32), 19, ["stage2.0", "stage2.1.branch2", "fc"]),
        ("efficientnet_b0", {"stem": "cifar"}, (3, 32, 32), 39, ["features.0.0", "features.2.1.block"]),
        ("vit_b_16", {"image_size": 32}, (3, 32, 32), 28, ["conv_proj", "encoder.layers.encoder_layer_0.mlp"]),
    ],
)  # fmt: skip
def test_blocks_in_sequence_are_the_model(name, kwargs, shape, num_blocks, some):
    model = named(name, **kwargs)
    modes = [module.training for module in model.modules()]
    blocks = cut(model)
    assert blocks.reason == ""
    assert [module.training for module in model.modules()] == modes
    assert len(blocks.modules) == num_blocks
    assert list(blocks.modules) == list(blocks.spec.block_names)
    assert set(some) <= set(blocks.modules)
    assert blocks.spec.parameters == sum(p.numel() for p in model.parameters())
    check_equal(model, blocks, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))


def test_what_follows_a_weight_layer_joins_it_and_roles():
    blocks = cut(named("resfed_cnn"))
    assert list(blocks.modules) == [
        "features.0",
        "features.2",
        "features.6",
        "features.9",
        "features.13",
        "classifier.0",
    ]
    roles = {tensor.name: tensor.role for tensor in blocks.spec.blocks[1].tensors}
    assert roles == {
        "features.2.weight": "weight",
        "features.3.weight": "vector",
        "features.3.bias": "vector",
        "features.3.running_mean": "statistic",
        "features.3.running_var": "statistic",
        "features.3.num_batches_tracked": "counter",
    }
    first = blocks.spec.blocks[0].tensors[0]
    assert (first.shape, first.dtype) == ((32, 3, 3, 3), "<f4")


def test_blocks_share_the_models_parameters():
    model = named("digits_cnn")
    blocks = cut(model)
    blocks.run(blocks.modules, torch.ones(1, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert blocks.modules["classifier.2"].get_parameter("classifier.2.bias") is model.get_parameter("classifier.2.bias")


class FunctionalDropout(nn.Module):
    """Reads ``self.training`` in a module that has children."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 50)
        self.second = nn.Linear(50, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        if mask is not None:
            x = x * mask
        return self.second(F.dropout(x, training=self.training))


def test_functional_dropout_follows_the_mode_of_model_and_block():
    model = FunctionalDropout()
    blocks, x = cut(model), torch.ones(2, 4)
    assert list(blocks.modules) == ["first", "second"]
    check_equal(model, blocks, x)
    model.eval()
    still = blocks.run(blocks.modules, x)
    blocks.modules["first"].train()  # the dropout is in this block
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(blocks.run(blocks.modules, x), still)
    blocks.modules["first"].eval()
    assert torch.equal(blocks.run(blocks.modules, x), still)


class Tied(nn.Module):
    """An encoder-decoder whose decoder is the encoder transposed, a buffer outside the state, and unused tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.encoder = nn.Linear(4, 3, bias=False)
        self.middle = nn.Linear(3, 3)
        self.shift = nn.Parameter(torch.ones(3))
        self.after = nn.Linear(4, 2)
        self.unused = nn.Linear(1, 1)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.encoder(self.before(x) * self.scale))
        x = self.middle(x + self.shift) * torch.arange(3.0)
        return self.after(x @ self.encoder.weight)


def test_tied_weights_are_not_cut_apart_and_unused_tensors_go_last():
    model = Tied()
    blocks = cut(model)
    assert tensors(blocks) == {
        "before": ["before.weight", "before.bias"],
        "encoder": ["shift", "encoder.weight", "middle.weight", "middle.bias"],
        "after": ["steps", "after.weight", "after.bias", "unused.weight", "unused.bias"],
    }
    assert blocks.modules["after"].state_dict().keys() == set(tensors(blocks)["after"])
    check_equal(model, blocks, torch.ones(2, 4))


class SharedEmbedding(nn.Module):
    """Two layers that share a parameter; one dropout and one pooling module used everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.drop = nn.Dropout(0.5)
        self.act = nn.ReLU()
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.act(self.mix(self.drop(self.act(self.embed(x)))))))


def test_shared_parameters_are_listed_once():
    blocks = cut(SharedEmbedding())
    assert tensors(blocks) == {"embed": ["embed.weight", "mix.weight", "mix.bias"]}
    assert blocks.spec.parameters == 7 * 4 + 4 * 4 + 4


class SharedLayers(nn.Module):
    """The same layers without state everywhere (allowed on both sides) and one dropout in two places (not allowed)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.layers
        x = self.act(a(x))
        x = self.drop(self.act(b(x)))
        x = self.drop(self.act(c(x)))
        return d(self.act(x))


def test_one_dropout_in_two_places_stays_in_one_block():
    model = SharedLayers()
    blocks = cut(model)
    assert list(blocks.modules) == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert [name for name, module in blocks.modules.items() if hasattr(module, "drop")] == ["layers.2"]
    assert [name for name, module in blocks.modules.items() if hasattr(module, "act")] == [
        "layers.0",
        "layers.1",
        "layers.2",
    ]
    check_equal(model, blocks, torch.ones(2, 4))


class Recurrent(nn.Module):
    """A sequence (batch, time, features) to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        return self.head(out[:, -1])


def test_recurrent_layers_hand_over_a_tensor():
    model = Recurrent()
    blocks = cut(model)
    assert list(blocks.modules) == ["rnn", "head"]
    assert blocks.modules["rnn"](torch.zeros(2, 4, 3)).shape == (2, 5)
    check_equal(model, blocks, torch.ones(2, 4, 3))


class Branching(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Leaf(nn.Module):
    """Branches on a value, but has no children."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if x.sum() > 0 else x


class TwoNetworks(Branching):
    """One more layer in training."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)) if self.training else self.layer(x)


class Noisy(Branching):
    """Draws a random number that does not depend on its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.randn(2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(Leaf(), nn.Linear(2, 2)), ""),
        (Branching(), "torch.fx cannot trace it: TraceError"),
        (TwoNetworks(), "training and evaluation are different networks"),
        (Noisy(), "its forward draws numbers from torch's generator that do not depend on its input"),
        (nn.Linear(2, 2), "it is a single layer, Linear"),
    ],
)
def test_what_cannot_be_cut_is_one_block_with_a_reason(model, reason):
    """A module without children is not traced into, so it may contain any code."""
    state = torch.random.get_rng_state()
    blocks = cut(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert blocks.reason.startswith(reason)
    assert bool(blocks.reason) == bool(reason)
    assert (list(blocks.modules) == ["model"]) == bool(reason)
    check_equal(model, blocks, torch.ones(1, 2))
    assert blocks.spec.parameters == sum(p.numel() for p in model.parameters())


class TiedEmbeddings(nn.Module):
    """A language model whose first and last layer share a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.middle(self.embedding(x))))


class Skipping(nn.Module):
    """Its input is used in the last operation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            TiedEmbeddings(),
            "every possible cut has these on both sides: 'embedding.weight' (tied weights, or one dropout module for all)",
        ),
        (Skipping(), "nowhere between its layers with weights is a single tensor passed on"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU()),
            "it has only one layer with weights of two or more dimensions",
        ),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "it has no layer with weights of two or more dimensions"),
    ],
    ids=["tied", "skipping", "one layer", "no layer"],
)
def test_a_traced_model_without_a_clean_position_has_a_reason(model, reason):
    blocks = cut(model)
    assert len(blocks.modules) == 1
    assert blocks.reason == reason
    with pytest.raises(ValueError, match=r"is 2; this model can be cut into 1 to 1 \("):
        grouped(blocks, 2)


def test_model_without_weights():
    blocks = cut(nn.Sequential(nn.Flatten(), nn.ReLU()))
    assert tensors(blocks) == {"model": []}
    assert blocks.run(["model"], torch.tensor([[[-1.0, 2.0]]])).tolist() == [[0.0, 2.0]]


def test_types_that_no_packet_has():
    with pytest.raises(ValueError, match=r"model: '0\.weight' is of type bfloat16; it must be one that numpy has"):
        cut(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).bfloat16())


def chain(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))


@pytest.mark.parametrize(
    ("num", "sizes"),
    [(1, [16]), (2, [8, 8]), (3, [6, 6, 4]), (4, [2, 4, 6, 4]), (5, [2, 4, 2, 4, 4])],
)
def test_grouped_balances_parameters(num, sizes):
    """Layers of 2, 4, 2, 4 and 4 parameters; the largest group is as small as possible."""
    model = chain(1, 2, 2, 1, 4, 1)
    blocks = cut(model)
    assert [block.tensors[0].items for block in blocks.spec.blocks] == [2, 4, 2, 4, 4]
    merged = grouped(blocks, num)
    assert [sum(tensor.items for tensor in block.tensors) for block in merged.spec.blocks] == sizes
    check_equal(model, merged, torch.ones(2, 1))


def test_grouped_errors():
    with pytest.raises(ValueError, match="the number of blocks is 6; this model can be cut into 1 to 5"):
        grouped(cut(chain(1, 2, 2, 1, 4, 1)), 6)
    with pytest.raises(ValueError, match=r"is 2; .* 1 to 1 \(it is a single layer, Linear\)"):
        grouped(cut(nn.Linear(2, 2)), 2)


def test_cutting_twice_gives_the_same():
    model = named("resnet18")
    assert model_spec(model) == model_spec(model) == model_spec(named("resnet18"))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: named("resnet18", stem="cifar"), (2, 3, 32, 32)),
        (FunctionalDropout, (2, 4)),  # a flag for the mode
        (Tied, (2, 4)),  # a constant of the model's own code
        (Branching, (1, 2)),  # one block
    ],
    ids=["resnet18", "FunctionalDropout", "Tied", "Branching"],
)
def test_a_model_cut_like_another_computes_and_trains_itself(make, shape):
    first, second = make(), make()
    pattern = cut(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    blocks = cut_like(pattern, second)
    assert (list(blocks.modules), blocks.reason) == (list(pattern.modules), pattern.reason)
    assert blocks.spec == pattern.spec == model_spec(second)
    x = torch.ones(shape)
    check_equal(second, blocks, x)
    blocks.run(blocks.modules, x).sum().backward()
    assert any(parameter.grad is not None for parameter in second.parameters())
    assert all(parameter.grad is None for parameter in first.parameters())
    assert not blocks.run(blocks.modules, x).isnan().any()
