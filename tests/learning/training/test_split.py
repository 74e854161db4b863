"""Both legs of a split network together equal training of the whole network, bit for bit."""

import copy

import pytest
import torch
from fedbonsai.learning.data.types import Samples
from fedbonsai.learning.models.cnn import digits_cnn
from fedbonsai.learning.parts.auxiliaries import build_head
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.parts.submodel import compile_part
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.split import (
    DeviceLeg,
    HostLeg,
    LocalLeg,
    MicroBatch,
    boundary,
    forward_only,
    micro_batch_schedule,
)
from fedbonsai.learning.training.training import train
from torch import nn


def samples(num=23):
    generator = torch.Generator().manual_seed(1)
    return Samples(torch.randn(num, 1, 8, 8, generator=generator), torch.arange(num) % 10)


class Normalised(nn.Module):
    """Normalisation on both sides of the cut, dropout on the host's side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(4 * 64, 10)

    def forward(self, x):
        x = self.nb(self.b(self.na(self.a(x)).relu())).relu()
        return self.out(self.drop(x.flatten(1)))


class Turned(nn.Module):
    """Tensors at its cuts are neither row-major nor channels_last: axes are transposed, as for time and channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Conv1d(8, 8, 3, padding=1)
        self.c, self.out = nn.Linear(16, 16), nn.Linear(8 * 16, 10)

    def forward(self, x):
        x = nn.functional.gelu(self.a(x.squeeze(1))).transpose(1, 2).contiguous().transpose(1, 2)
        x = nn.functional.gelu(self.b(x)).transpose(1, 2).contiguous().transpose(1, 2)
        return self.out(torch.tanh(self.c(x)).flatten(1))


def split(model, place, training, data):
    """Train both legs of a model that is cut behind block ``place``; the host's leg, ended."""
    device, host = cut(copy.deepcopy(model)), cut(copy.deepcopy(model))
    front = device.spec.block_names[: place + 1]
    crossing = boundary(device, front, example=data.x[0], training=training)
    loss = make_loss(training.loss)
    back = compile_part(Part(blocks=front, trained=front), host).rest()
    leg = HostLeg(host, back, training=training, loss=loss, seed=7, num_samples=len(data), crossing=crossing)
    result = train(
        device.model,
        data,
        training=training,
        loss=loss,
        transform=lambda x, _: x,
        seed=7,
        trainable=[t.name for t in device.spec.tensors_of(front)],
        gradient=DeviceLeg(device, front, training=training, exchange=leg.micro_batch),
    )
    mine, theirs = device.model.state_dict(), host.model.state_dict()
    own = {t.name for t in device.spec.tensors_of(front)}
    return result, leg, {name: mine[name] if name in own else theirs[name] for name in mine}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epochs": 2, "accumulation": 3},
        {"steps": 5},
        {"checkpointing": True, "accumulation": 3},
        {"layout": "channels_last"},
        {"layout": "channels_last", "converted": True},
        {"precision": "bf16"},
        {"precision": "bf16", "layout": "channels_last"},
        {"precision": "bf16", "layout": "channels_last", "converted": True},
        {"optimiser": Optimiser(name="adam", learning_rate=0.01)},
        {"optimiser": Optimiser(proximal=0.1, weight_decay=0.01)},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [digits_cnn, Normalised, Turned])
@pytest.mark.parametrize("place", [0, 1])
def test_both_legs_equal_training_of_the_whole_model_bit_for_bit(make, place, changes):
    torch.manual_seed(3)
    changes = {"batch_size": 8} | changes
    converted = changes.pop("converted", False)  # the weights too, as in a worker's module
    model, data, training = make(), samples(), Training(**changes)
    if converted:
        model = model.to(memory_format=torch.channels_last)
    whole = copy.deepcopy(model)
    expected = train(whole, data, training=training, loss=make_loss(training.loss), transform=lambda x, _: x, seed=7)
    result, leg, found = split(model, place, training, data)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert (leg.steps, leg.processed, leg.loss, leg.loss_square) == (
        expected.steps,
        expected.processed,
        expected.loss,
        expected.loss_square,
    )
    assert (result.steps, result.processed) == (expected.steps, expected.processed)
    assert leg.next is None


def test_the_schedule_has_sizes_shares_and_ends_of_batches():
    # 11 samples in batches of 6: 6 and 5, in micro-batches of at least two samples
    assert list(micro_batch_schedule(11, Training(batch_size=6, accumulation=3))) == [
        MicroBatch(2, 1 / 3, False),
        MicroBatch(2, 1 / 3, False),
        MicroBatch(2, 1 / 3, True),
        MicroBatch(3, 3 / 5, False),
        MicroBatch(2, 2 / 5, True),
    ]
    assert list(micro_batch_schedule(0, Training())) == []


def test_the_boundary_has_shape_and_type_of_the_cuts_tensor():
    blocks, names = cut(digits_cnn()), cut(digits_cnn()).spec.block_names
    found = [boundary(blocks, names[:n], example=torch.zeros(1, 8, 8), training=Training()).shape for n in (1, 2, 3)]
    assert found == [(16, 8, 8), (512,), (64,)]
    bf16 = Training(precision="bf16")
    assert boundary(blocks, names[:1], example=torch.zeros(1, 8, 8), training=bf16).dtype == torch.bfloat16
    lstm = cut(nn.LSTM(2, 2))
    with pytest.raises(ValueError, match="not one floating-point tensor"):
        boundary(lstm, lstm.spec.block_names, example=torch.zeros(3, 2), training=Training())


def test_the_output_of_a_frozen_front_depends_on_the_sample_alone():
    torch.manual_seed(3)
    blocks, data = cut(Normalised()), samples(24)
    with torch.no_grad():
        blocks.model.na.running_mean.fill_(0.5)
    found = {}
    for batch_size in (4, 24):
        sent: list[tuple[torch.Tensor, torch.Tensor]] = []
        forward_only(
            blocks,
            blocks.spec.block_names[:2],
            data,
            training=Training(batch_size=batch_size),
            transform=lambda x, _: x,
            seed=7,
            send=lambda z, y, to=sent: to.append((z, y)),
        )
        found[batch_size] = torch.cat([z for z, _ in sent]), torch.cat([y for _, y in sent])
    # The same permutation of the samples, in batches of another size.
    assert torch.equal(found[4][1], found[24][1])
    torch.testing.assert_close(found[4][0], found[24][0])
    assert not found[4][0].requires_grad


@pytest.mark.parametrize("changes", [{}, {"accumulation": 3, "epochs": 2}, {"precision": "bf16"}], ids=str)
def test_with_a_local_loss_front_and_head_are_trained_like_one_network(changes):
    torch.manual_seed(3)
    data, training = samples(), Training(**({"batch_size": 8} | changes))
    blocks, loss = cut(digits_cnn()), make_loss(training.loss)
    front = blocks.spec.block_names[:1]
    head = build_head(boundary(blocks, front, example=data.x[0], training=training).shape, (10,), seed=1)
    alone = nn.Sequential(copy.deepcopy(blocks.modules[front[0]]), copy.deepcopy(head))
    passed: list[torch.Tensor] = []
    alone[0].register_forward_hook(lambda module, inputs, output: passed.append(output.detach().float()))
    expected = train(alone, data, training=training, loss=loss, transform=lambda x, _: x, seed=7)

    sent: list[tuple[torch.Tensor, torch.Tensor]] = []
    leg = LocalLeg(blocks, front, head, training=training, loss=loss, send=lambda z, y: sent.append((z, y)))
    before = {name: tensor.clone() for name, tensor in blocks.model.state_dict().items()}
    found = train(
        blocks.model,
        data,
        training=training,
        loss=loss,
        transform=lambda x, _: x,
        seed=7,
        trainable=[t.name for t in blocks.spec.tensors_of(front)],
        gradient=leg,
        auxiliaries=[head],
    )
    assert found == expected
    both = {**blocks.modules[front[0]].state_dict(), **head.state_dict()}
    assert [torch.equal(*pair) for pair in zip(both.values(), alone.state_dict().values(), strict=True)] == [True] * 4
    # Activations are sent before the step on the same micro-batch.
    assert [torch.equal(z, own) for (z, _), own in zip(sent, passed, strict=True)] == [True] * len(passed)
    assert torch.cat([y for _, y in sent]).shape == (23 * training.epochs,)
    frozen = [t.name for t in blocks.spec.tensors_of(blocks.spec.block_names[1:])]
    assert all(torch.equal(blocks.model.state_dict()[name], before[name]) for name in frozen)
