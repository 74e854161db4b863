import copy
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import torch
from fedbonsai.learning.data.batches import batches
from fedbonsai.learning.data.types import Samples
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.training.training import Stepper, TrainingResult, train
from torch import Tensor, nn
from torch.nn import functional as F

X, Y = [1.0, 2.0, -1.0, 3.0], [2.0, 1.0, 0.0, -1.0]
LINE = Samples(torch.tensor(X)[:, None], torch.tensor(Y)[:, None])
PLAIN = Optimiser(learning_rate=0.125, momentum=0.0)
SEED = 5


def as_it_is(x: Tensor, generator: torch.Generator) -> Tensor:
    return x


def one_weight(value: float = 0.5) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def run(model: nn.Module, samples: Samples = LINE, **changes: Any) -> TrainingResult:
    """Train with the loss (wx - y)^2, whose gradient can be computed by hand."""
    options: dict[str, Any] = {"loss": F.mse_loss, "transform": as_it_is, "seed": SEED, "trainable": None}
    options |= {name: changes.pop(name) for name in list(changes) if name in options}
    settings = {"optimiser": PLAIN, "batch_size": 2, **changes}
    return train(model, samples, training=Training(**settings), **options)


def by_hand(
    weight: float, *, epochs: int = 1, momentum: float = 0.0, mu: float = 0.0, clip: float | None = None
) -> tuple[float, list[float]]:
    """The weight after SGD on (wx - y)^2 in batches of two, and the loss of each batch."""
    start, velocity, losses = weight, 0.0, []
    for indices in batches(4, batch_size=2, epochs=epochs, seed=SEED):
        errors = [weight * X[i] - Y[i] for i in indices]
        losses.append(sum(e * e for e in errors) / 2)
        gradient = sum(2 * e * X[i] for e, i in zip(errors, indices, strict=True)) / 2
        gradient += mu * (weight - start)
        if clip is not None:
            gradient *= min(1.0, clip / abs(gradient))
        velocity = momentum * velocity + gradient
        weight -= 0.125 * velocity
    return weight, losses


@pytest.mark.parametrize(
    ("settings", "hand"),
    [
        ({}, {}),
        ({"momentum": 0.5}, {"momentum": 0.5}),
        ({"proximal": 2.0}, {"mu": 2.0}),
        ({"clip_norm": 0.5}, {"clip": 0.5}),
        ({"clip_norm": 1e6}, {}),
        ({"proximal": 2.0, "clip_norm": 0.5, "momentum": 0.5}, {"mu": 2.0, "clip": 0.5, "momentum": 0.5}),
    ],
    ids=["sgd", "momentum", "FedProx", "clipped", "not clipped", "all"],
)
@pytest.mark.parametrize("epochs", [1, 3])
def test_two_batches_a_pass_by_hand(settings: dict[str, float], hand: dict[str, float], epochs: int) -> None:
    model = one_weight()
    result = run(model, epochs=epochs, optimiser=msgspec.structs.replace(PLAIN, **settings))
    weight, losses = by_hand(0.5, epochs=epochs, **hand)
    assert model.weight.item() == pytest.approx(weight, rel=1e-5)
    assert (result.steps, result.processed) == (2 * epochs, 4 * epochs)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.loss_square == pytest.approx(sum(loss**2 for loss in losses) / len(losses), rel=1e-5)


def test_losses_are_weighted_by_the_size_of_their_batch() -> None:
    samples = Samples(torch.zeros(3, 1), torch.tensor([[1.0], [1.0], [1.0]]))
    model = nn.Sequential(nn.Linear(1, 1))
    result = run(model, samples, batch_size=1, steps=2, loss=lambda output, target: (output * 0).sum() + len(output))
    assert (result.processed, result.loss, result.loss_square) == (2, 1.0, 1.0)
    uneven = Samples(torch.zeros(5, 1), torch.zeros(5, 1))  # batches of 2 and 3: a last batch of one sample is merged
    result = run(model, uneven, loss=lambda output, target: (output * 0).sum() + len(output))
    assert (result.steps, result.processed) == (2, 5)
    assert result.loss == pytest.approx((2 * 2 + 3 * 3) / 5)
    assert result.loss_square == pytest.approx((2 * 4 + 3 * 9) / 5)


def test_steps_overrule_epochs() -> None:
    by_steps, by_epochs = one_weight(), one_weight()
    assert run(by_steps, epochs=9, steps=4) == run(by_epochs, epochs=2)
    assert torch.equal(by_steps.weight, by_epochs.weight)
    assert run(one_weight(), steps=3).steps == 3


@pytest.mark.parametrize(
    ("samples", "changes"),
    [(LINE, {"epochs": 0}), (LINE.take([]), {"epochs": 2}), (LINE.take([]), {"steps": 5}), (LINE, {"trainable": ()})],
    ids=["no epochs", "no samples", "steps without samples", "nothing to train"],
)
def test_nothing_to_do_changes_nothing(samples: Samples, changes: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    before = copy.deepcopy(model.state_dict())
    assert run(model, samples, **changes) == TrainingResult(steps=0, processed=0, loss=None, loss_square=None)
    assert_same(model.state_dict(), before)


def test_one_sample_is_enough() -> None:
    model = one_weight(0.0)
    result = run(model, LINE.take([0]), batch_size=32)
    assert (result.steps, result.processed, result.loss) == (1, 1, 4.0)
    assert model.weight.item() == 0.5  # minus 0.125 times -4


def test_accumulation_is_the_whole_batch_up_to_rounding() -> None:
    torch_seeded = seeded_mlp()
    data = random_samples(23, 6)
    whole, parts = copy.deepcopy(torch_seeded), copy.deepcopy(torch_seeded)
    first = run(whole, data, batch_size=10, epochs=2)
    second = run(parts, data, batch_size=10, epochs=2, accumulation=4)
    assert (first.steps, first.processed) == (second.steps, second.processed)
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        # sums of a few numbers around 1 in another order differ by a few units in the last place of float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_more_micro_batches_than_samples() -> None:
    one, other = one_weight(), one_weight()
    assert run(one, accumulation=2) == run(other, accumulation=50)
    assert torch.equal(one.weight, other.weight)


def mixed() -> nn.Sequential:
    """Two convolutions with normalisation (the first without scale and shift), dropout, and a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4, affine=False),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)),
            nn.Flatten(),
            nn.Linear(64, 3),
        )


def images(count: int = 12) -> Samples:
    generator = torch.Generator().manual_seed(1)
    return Samples(torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 3)


def seeded_mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def random_samples(count: int, features: int) -> Samples:
    generator = torch.Generator().manual_seed(2)
    return Samples(torch.randn(count, features, generator=generator), torch.randn(count, 1, generator=generator))


def trained(seed: int = SEED, **changes: Any) -> dict[str, Tensor]:
    model = mixed()
    run(model, images(), seed=seed, loss=F.cross_entropy, epochs=2, batch_size=4, **changes)
    return copy.deepcopy(model.state_dict())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], names: Sequence[str] | None = None) -> None:
    assert found.keys() == wanted.keys()
    for name in names or wanted:
        assert torch.equal(found[name], wanted[name]), name


def test_the_same_seed_gives_the_same_bits_dropout_included() -> None:
    first = trained()
    torch.rand(3)  # other code draws from the shared generator in between
    assert_same(trained(), first)
    other = trained(seed=6)
    assert not any(torch.equal(other[name], first[name]) for name in ("0.weight", "2.0.weight", "4.bias"))


def test_the_shared_generator_is_restored() -> None:
    before = torch.get_rng_state()
    trained()
    assert torch.equal(torch.get_rng_state(), before)

    def broken(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        run(mixed(), images(), loss=broken)
    assert torch.equal(torch.get_rng_state(), before)


def test_transforms_draw_from_the_plans_seed() -> None:
    def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + torch.randn(x.shape, generator=generator)

    first = trained(transform=noisy)
    assert_same(trained(transform=noisy), first)
    assert not torch.equal(first["4.weight"], trained()["4.weight"])


@pytest.mark.parametrize("block", ["2.", "4."], ids=["the middle is trained", "the classifier is trained"])
def test_what_is_frozen_keeps_every_bit(block: str) -> None:
    start = mixed().state_dict()
    end = trained(trainable=[name for name in start if name.startswith(block)])
    frozen = [name for name in start if not name.startswith(block)]
    assert_same(end, start, frozen)
    assert not any(torch.equal(end[name], start[name]) for name in start if name.startswith(block))
    assert "1.running_mean" in frozen


def test_frozen_layers_work_as_in_evaluation() -> None:
    model = mixed()
    run(model, images(), loss=F.cross_entropy, trainable=["4.weight", "4.bias"])
    modes = {name: module.training for name, module in model.named_modules()}
    assert [name for name, mode in modes.items() if mode] == [
        "",
        "3",
        "4",
    ]  # Flatten has no tensors: it has its parent's mode
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["4.weight", "4.bias"]
    run(model, images(), loss=F.cross_entropy, trainable=list(mixed().state_dict()))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_the_models_author_has_frozen_is_not_trained() -> None:
    """Without names the model's own flags apply; normalisation whose parameters are frozen keeps its statistics."""
    model = mixed()
    model[2][1].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    run(model, images(), loss=F.cross_entropy)
    frozen = [name for name in start if name.startswith("2.1.") or name == "4.bias"]
    assert_same(model.state_dict(), start, frozen)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["2.1.weight", "2.1.bias", "4.bias"]
    assert not model[2][1].training
    assert model[4].training
    assert not torch.equal(model.state_dict()["4.weight"], start["4.weight"])


def test_tied_parameters_are_trained_once() -> None:
    model = nn.Sequential(one_weight(1.0), one_weight(1.0))
    model[1].weight = model[0].weight
    run(model, LINE.take([0]), epochs=1)  # (w^2 - 2)^2 at w = 1: gradient -4
    assert model[0].weight.item() == model[1].weight.item() == 1.5


def test_no_gradient_is_kept_even_when_the_loss_raises() -> None:
    model, calls = one_weight(), []

    def failing(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError
        return F.mse_loss(output, target)

    with pytest.raises(MemoryError):
        run(model, loss=failing, accumulation=2)  # the second batch fails half-way
    assert model.weight.grad is None
    run(model)
    assert model.weight.grad is None


def test_weights_stay_float32_under_bf16() -> None:
    seen: list[torch.dtype] = []

    def watched(output: Tensor, target: Tensor) -> Tensor:
        seen.append(output.dtype)
        return F.cross_entropy(output, target)

    model = mixed()
    run(model, images(), loss=watched, precision="bf16", epochs=1, batch_size=4)
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    dense, rough = trained(), trained(precision="bf16")
    assert not torch.equal(dense["4.weight"], rough["4.weight"])
    torch.testing.assert_close(dense["4.weight"], rough["4.weight"], rtol=0.1, atol=0.05)


def test_channels_last_trains_the_same_up_to_rounding() -> None:
    seen: list[bool] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    usual, other = mixed(), mixed().to(memory_format=torch.channels_last)
    other[2].register_forward_pre_hook(watch)
    for model in (usual, other):
        model[2][2] = nn.Identity()  # dropout draws in the order of memory: other elements in another memory format
        run(
            model,
            images(),
            loss=F.cross_entropy,
            epochs=2,
            batch_size=4,
            layout="channels_last" if model is other else "contiguous",
        )
    assert all(seen)
    assert len(seen) == 6
    for name, tensor in usual.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("loss", [lambda o, t: (o - t).square(), lambda o, t: 0.5], ids=["vector", "no tensor"])
def test_a_loss_must_be_one_number(loss: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=r"training.loss returned"):
        run(one_weight(), loss=loss)


def test_micro_batches_of_one_sample_do_not_occur_by_themselves() -> None:
    """13 samples in batches of 8, each in 4 micro-batches; the last batch of 5 in one of 3 and one of 2."""
    model, samples = mixed_vectors(), random_samples(13, 6)
    result = run(model, samples, batch_size=8, accumulation=4)
    assert (result.steps, result.processed) == (2, 13)


def mixed_vectors() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


class Branches(nn.Module):
    """The second layer is used only for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = one_weight(0.5), one_weight(2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.always(x)
        return y + self.sometimes(x) if x[0, 0] > 0 else y


@pytest.mark.parametrize(
    "optimiser",
    [
        {"momentum": 0.5},
        {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
        {"name": "adam"},
        {"name": "adamw", "proximal": 0.5, "clip_norm": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("signs", [[-1, 1, -1, 1, 1], [1, -1, -1, 1, -1], [-1, -1, -1]], ids=str)
def test_a_parameter_may_get_its_gradient_in_some_steps_only(optimiser: dict[str, Any], signs: list[int]) -> None:
    """SGD by torch's plain kernels, one operation after another."""
    settings, ours, plain = Optimiser(**{"learning_rate": 0.125, **optimiser}), Branches(), Branches()
    stepper = Stepper(ours, training=Training(optimiser=settings), trainable=None)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    of_sgd = {"momentum": settings.momentum, "nesterov": settings.nesterov} if settings.name == "sgd" else {}
    theirs = kinds[settings.name](
        plain.parameters(), lr=0.125, weight_decay=settings.weight_decay, foreach=False, fused=False, **of_sgd
    )
    start = [parameter.detach().clone() for parameter in plain.parameters()]
    with stepper:
        for sign in signs:
            x = torch.tensor([[float(sign)], [2.0]])
            for model in (ours, plain):
                model(x).square().mean().backward()
            stepper.step()
            for parameter, base in zip(plain.parameters(), start, strict=True):
                if parameter.grad is not None:
                    parameter.grad += settings.proximal * (parameter.detach() - base)
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(plain.parameters(), settings.clip_norm)
            theirs.step()
            theirs.zero_grad()
            for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "optimiser", [{}, {"name": "adam", "proximal": 0.5, "clip_norm": 0.1, "weight_decay": 0.1}], ids=str
)
def test_sparse_gradients_of_an_embedding_are_dense_ones(optimiser: dict[str, Any], accumulation: int) -> None:
    found = []
    for sparse in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 1))
        words = Samples(torch.tensor([[0, 1], [1, 2], [2, 2], [4, 0]]), torch.tensor([[1.0], [0.0], [2.0], [-1.0]]))
        run(model, words, batch_size=4, accumulation=accumulation, epochs=2, optimiser=Optimiser(**optimiser))
        found.append(model.state_dict())
    for name, dense in found[0].items():
        torch.testing.assert_close(found[1][name], dense, rtol=1e-6, atol=1e-7)
