"""Blocks that are recomputed in the backward pass give the same bits, and keep less."""

import copy
from collections import deque

import pytest
import torch
from fedbonsai.learning.data.types import Samples
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.training.ahead import train_ahead
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.recompute import recomputed, run_blocks
from fedbonsai.learning.training.split import DeviceLeg
from fedbonsai.learning.training.training import train
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


class Random(nn.Module):
    """Three blocks with normalisation and dropout, so that a second pass could change both."""

    def __init__(self):
        super().__init__()
        self.a, self.na, self.da = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.4)
        self.b, self.nb, self.db = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.4)
        self.out = nn.Linear(6 * 64, 10)

    def forward(self, x):
        x = self.da(self.na(self.a(x)).relu())
        x = self.db(self.nb(self.b(x)).relu())
        return self.out(x.flatten(1))


class Counting(nn.Module):
    """Its output depends on a buffer that each forward pass changes."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(64, 8), nn.Linear(8, 10)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.out((self.a(x.flatten(1)) / self.calls).tanh())


class Halves(nn.Module):
    """Its blocks exchange a tuple of two tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Linear(8 * 64, 10)

    def forward(self, x):
        first, second = self.a(x).tanh().chunk(2, 1)
        return self.out(torch.cat([self.b(first).tanh(), second], 1).flatten(1))


def samples(num=23):
    generator = torch.Generator().manual_seed(1)
    return Samples(torch.randn(num, 1, 8, 8, generator=generator), torch.arange(num) % 10)


def trained(model, training, **options):
    model = copy.deepcopy(model)
    loss = make_loss(training.loss)
    result = train(model, samples(), training=training, loss=loss, transform=lambda x, _: x, seed=7, **options)
    return result, model.state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epochs": 2, "accumulation": 3},
        {"layout": "channels_last"},
        {"precision": "bf16"},
        {"optimiser": Optimiser(name="adam", learning_rate=0.01, proximal=0.1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [Random, Counting, Halves])
def test_training_with_recomputed_blocks_gives_the_same_bits(make, changes):
    torch.manual_seed(3)
    model = make()
    result, expected = trained(model, Training(batch_size=8, **changes))
    again, found = trained(model, Training(batch_size=8, checkpointing=True, **changes))
    assert again == result
    assert result.loss is not None
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_blocks_that_are_not_trained_are_computed_once():
    model = Random()
    blocks = cut(model)
    first, *others = blocks.spec.block_names
    trainable = [t.name for t in blocks.spec.tensors_of(tuple(others))]
    result, expected = trained(model, Training(batch_size=8), trainable=trainable)
    again, found = trained(model, Training(batch_size=8, checkpointing=True), trainable=trainable)
    assert again == result
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    calls = []
    blocks.modules[first].register_forward_hook(lambda *_: calls.append(first))
    for parameter in blocks.modules[first].parameters():
        parameter.requires_grad_(False)
    run_blocks(blocks, blocks.spec.block_names, samples().x, precision="float32").sum().backward()
    assert calls == [first]


@pytest.mark.parametrize("make", [Random, Halves])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_the_front_of_a_cut_network_gives_the_same_bits(window, make):
    """With a host that answers 0.1 z; window 0: the leg that waits for each gradient."""
    torch.manual_seed(3)
    model, found = make(), []
    assert len(cut(make()).modules) == 3
    for checkpointing in (False, True):
        blocks = cut(copy.deepcopy(model))
        front = blocks.spec.block_names[:2]
        own = [t.name for t in blocks.spec.tensors_of(front)]
        training = Training(batch_size=8, checkpointing=checkpointing)
        answers: deque[torch.Tensor] = deque()
        options = {"training": training, "transform": lambda x, _: x, "seed": 7, "trainable": own}
        if window:
            train_ahead(
                blocks,
                front,
                samples(),
                window=window,
                send=lambda z, _, to=answers: to.append(0.1 * z),
                receive=answers.popleft,
                **options,
            )
        else:
            leg = DeviceLeg(blocks, front, training=training, exchange=lambda z, _: 0.1 * z)
            train(blocks.model, samples(), loss=make_loss(training.loss), gradient=leg, **options)
        found.append(blocks.model.state_dict())
    plain, again = found
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    assert not torch.equal(plain["a.weight"], model.a.weight)


def test_nothing_but_the_input_is_kept():
    """Four tanh in a row save four tensors of 4 kB; recomputed, autograd keeps none of them."""

    def call(x):
        for _ in range(4):
            x = x.tanh()
        return x

    x = torch.linspace(-1, 1, 1000, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = recomputed(call, x, buffers=[], precision="float32")
    assert kept == []
    (found,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(call(x).sum(), x)
    assert torch.equal(found, expected)
    (again,) = torch.autograd.grad(y.sum(), x)  # a graph that is kept can be walked through twice
    assert torch.equal(again, expected)


def test_a_block_that_does_something_else_the_second_time_is_an_error():
    calls = []

    def call(x):
        calls.append(x)
        return x.tanh() if len(calls) > 1 else x.tanh().tanh()

    y = recomputed(call, torch.ones(2, requires_grad=True), buffers=[], precision="float32")
    with pytest.raises(RuntimeError, match="saved 2 tensors in its forward pass and 1 when"):
        y.sum().backward()
