"""Training with a window: by hand, against a scalar reference, and equal to usual training at window 1."""

import copy
from collections import deque

import pytest
import torch
from fedbonsai.learning.data.batches import batches, micro_batches
from fedbonsai.learning.data.types import Samples
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.parts.submodel import compile_part
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.training.ahead import train_ahead
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.split import HostLeg, boundary
from torch import nn

from .test_split import Normalised, samples, split

PLAIN = Optimiser(learning_rate=0.5, momentum=0.0)


class Square(nn.Module):
    """z = b (a x)^2, cut before b."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.a.weight)
        nn.init.ones_(self.b.weight)

    def forward(self, x):
        return self.b(self.a(x) ** 2)


def half_square(output, target):
    return (output - target).square().mean() / 2


def run_ahead(model, place, training, data, *, window, loss=None):
    """Train both legs of a model that is cut behind block ``place``; the result, the host's leg, the model's state."""
    device, host = cut(copy.deepcopy(model)), cut(copy.deepcopy(model))
    front = device.spec.block_names[: place + 1]
    leg = HostLeg(
        host,
        compile_part(Part(blocks=front, trained=front), host).rest(),
        training=training,
        loss=loss or make_loss(training.loss),
        seed=7,
        num_samples=len(data),
        crossing=boundary(device, front, example=data.x[0], training=training),
    )
    answers: deque[torch.Tensor] = deque()
    most = 0

    def send(activations, targets):
        nonlocal most
        answers.append(leg.micro_batch(activations, targets))
        most = max(most, len(answers))

    own = {tensor.name for tensor in device.spec.tensors_of(front)}
    result = train_ahead(
        device,
        front,
        data,
        training=training,
        transform=lambda x, _: x,
        seed=7,
        trainable=sorted(own),
        window=window,
        send=send,
        receive=answers.popleft,
    )
    assert (len(answers), leg.next) == (0, None)
    assert most <= window
    mine, theirs = device.model.state_dict(), host.model.state_dict()
    return result, leg, {name: mine[name] if name in own else theirs[name] for name in mine}


def test_a_delayed_gradient_is_taken_at_the_weights_of_its_forward_pass():
    # x = 1, y = 0, a = b = 1, rate 1/2, window 2. With h = a^2 the host returns b^2 h, and changes b by -b h^2 / 2.
    #   h0 = h1 = 1: returns 1 and 1/4; b = 1/2, then 1/4
    #   back 0: a = 1 - 1 * 2 / 2 = 0;   h2 = 0, returns 0, b stays
    #   back 1: a = 0 - 1/4 * 2 / 2 = -1/4 (at the current a, 0, its gradient would be 0);   back 2: a stays
    data = Samples(torch.ones(3, 1), torch.zeros(3, 1))
    result, _, found = run_ahead(Square(), 0, Training(optimiser=PLAIN, batch_size=1), data, window=2, loss=half_square)
    assert (found["a.weight"].item(), found["b.weight"].item()) == (-0.25, 0.25)
    assert (result.steps, result.processed, result.loss) == (3, 3, 0.0)


def reference(data, training, window):
    """The same with scalars: a, b, and the losses of the host."""
    a = b = 1.0
    gradient_a = gradient_b = 0.0
    out: deque[tuple[float, list[tuple[float, float]], bool]] = deque()
    coming = deque()
    order = batches(len(data), batch_size=training.batch_size, epochs=training.epochs, steps=training.steps, seed=7)
    for indices in order:
        parts = list(micro_batches(indices, batch_size=training.batch_size, accumulation=training.accumulation))
        coming += [(part, share, number == len(parts)) for number, (part, share) in enumerate(parts, 1)]
    rate = training.optimiser.learning_rate
    while coming or out:
        if coming and len(out) < window:
            part, share, ends = coming.popleft()
            answers = []
            for x, y in zip(data.x[part].flatten().tolist(), data.y[part].flatten().tolist(), strict=True):
                h = (a * x) ** 2
                error = (b * h - y) * share / len(part)
                answers.append((x, error * b))
                gradient_b += error * h
            out.append((a, answers, ends))
            if ends:
                b, gradient_b = b - rate * gradient_b, 0.0
        else:
            stashed, answers, ends = out.popleft()
            gradient_a += sum(gradient * 2 * stashed * x**2 for x, gradient in answers)
            if ends:
                a, gradient_a = a - rate * gradient_a, 0.0
    return a, b


@pytest.mark.parametrize("window", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "changes", [{"batch_size": 3}, {"batch_size": 4, "accumulation": 3}, {"batch_size": 4, "epochs": 2}, {"steps": 2}]
)
def test_it_is_what_scalars_give_with_short_batches_and_accumulation_at_any_window(window, changes):
    generator = torch.Generator().manual_seed(1)
    data = Samples(torch.rand(10, 1, generator=generator), torch.rand(10, 1, generator=generator))
    training = Training(optimiser=Optimiser(learning_rate=0.25, momentum=0.0), **changes)
    result, leg, found = run_ahead(Square(), 0, training, data, window=window, loss=half_square)
    expected = reference(data, training, window)
    assert (found["a.weight"].item(), found["b.weight"].item()) == pytest.approx(expected, rel=1e-5)
    assert (result.steps, result.processed) == (leg.steps, leg.processed)
    if window > 1 and leg.steps > 2:
        assert abs(expected[0] - reference(data, training, 1)[0]) > 1e-4  # a window makes a difference


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epochs": 2, "accumulation": 3},
        {"precision": "bf16", "layout": "channels_last"},
        {"optimiser": Optimiser(name="adam", learning_rate=0.01)},
        {"optimiser": Optimiser(proximal=0.1, weight_decay=0.01)},
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 1])
def test_at_window_one_it_equals_usual_training_bit_for_bit(changes, place):
    torch.manual_seed(3)
    model, data, training = Normalised(), samples(), Training(**({"batch_size": 8} | changes))
    result, leg, found = run_ahead(model, place, training, data, window=1)
    usual, other, expected = split(model, place, training, data)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (result, leg.loss) == (usual, other.loss)


class Sum(nn.Module):
    """Two parameters whose gradients are the same tensor object."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = (
            nn.Parameter(torch.ones(64, 4)),
            nn.Parameter(torch.ones(64, 4)),
            nn.Linear(4, 10),
        )

    def forward(self, x):
        return self.out(x.flatten(1) @ (self.one + self.two))


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"optimiser": Optimiser(proximal=0.5)}], ids=str)
def test_parameters_that_share_a_gradient_do_not_add_up_each_others(changes):
    model, data, training = Sum(), samples(), Training(**({"batch_size": 8} | changes))
    _, _, expected = split(model, 0, training, data)
    *_, found = run_ahead(model, 0, training, data, window=1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Counting(nn.Module):
    """A buffer that is changed in place, and that the backward pass needs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x * self.calls


class Busy(nn.Module):
    """A front with normalisation, dropout, tied weights, and a buffer that is changed in place."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.a.weight
        self.count = Counting()
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = self.drop(self.norm(self.a(x)))
        return self.out(self.count(self.again(x)).relu())


@pytest.mark.parametrize("window", [1, 2, 4, 50])
def test_buffers_follow_the_forward_passes_with_any_window(window):
    torch.manual_seed(3)
    model, generator = Busy(), torch.Generator().manual_seed(1)
    data = Samples(torch.randn(30, 4, generator=generator), torch.arange(30) % 3)
    training = Training(batch_size=4)
    first, _, found = run_ahead(model, 0, training, data, window=window)
    second, _, again = run_ahead(model, 0, training, data, window=window)
    if window == 1:
        again = split(model, 0, training, data)[2]
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())
    assert first == second
    assert first.steps == found["count.calls"].item() == found["norm.num_batches_tracked"].item() == 8
    assert not torch.equal(found["a.weight"], model.a.weight)
    if window == 50:  # all forward passes used the initial weights, so the running statistics follow from them alone
        straight = copy.deepcopy(model).train()
        for indices in batches(30, batch_size=4, epochs=1, steps=None, seed=7):
            straight.norm(straight.a(data.x[indices]))
        assert torch.equal(found["norm.running_mean"], straight.norm.running_mean)
