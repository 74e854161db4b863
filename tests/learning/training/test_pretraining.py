"""Central training: the recipe's steps against torch's optimiser, its schedule, and the choice of the best epoch."""

import dataclasses

import pytest
import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.data.devices import DeviceData, PoolShares
from fedbonsai.learning.data.load import load_public
from fedbonsai.learning.data.types import FederatedData, SamplePool, Samples
from fedbonsai.learning.models import build
from fedbonsai.learning.spec import Call, Optimiser, Training
from fedbonsai.learning.store import model_hash
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.pretraining import Epoch, Recipe, pretrain
from torch import Tensor, nn

MSE = make_loss(Call("mse"))


def line(count: int = 4) -> FederatedData:
    """y = 2 x on a few points, without classes."""
    x = torch.linspace(-1, 1, count)[:, None]
    pool = SamplePool(train=Samples(x, 2 * x))

    def same(batch: Tensor, generator: torch.Generator) -> Tensor:
        return batch

    return DeviceData(
        shares=PoolShares(pool, [torch.arange(count).numpy()]),
        num_classes=None,
        train_transform=same,
        test_transform=same,
        with_server_test=True,
        test_share=0.0,
        seed=0,
    )


def through_zero() -> nn.Module:
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def epochs_of(model: nn.Module, recipe: Recipe, data: FederatedData | None = None) -> list[Epoch]:
    return list(pretrain(model, data or line(), recipe=recipe, training=Training(loss=Call("mse")), loss=MSE, seed=1))


def test_rates_fall_at_half_and_at_four_fifths() -> None:
    recipe = Recipe(epochs=10, learning_rate=1.0)
    assert [round(recipe.rate(epoch), 6) for epoch in range(10)] == [1.0] * 5 + [0.1] * 3 + [0.01] * 2
    rates = [Recipe().rate(epoch) for epoch in (49, 50, 79, 80)]
    assert rates == pytest.approx([0.01, 0.001, 0.001, 0.0001])


def test_the_recipe_keeps_loss_and_precision_and_sets_the_rest() -> None:
    base = Training(precision="bf16", layout="channels_last", steps=3, optimiser=Optimiser(name="adam", clip_norm=1.0))
    found = Recipe().training(base)
    assert found == Training(
        precision="bf16",
        layout="channels_last",
        batch_size=128,
        optimiser=Optimiser(learning_rate=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4),
    )
    assert not Recipe(momentum=0).training(base).optimiser.nesterov


def test_it_is_one_run_of_torchs_optimiser_whose_momentum_goes_on_over_the_epochs() -> None:
    """All four points in one batch, so that their order does not matter."""
    recipe = Recipe(epochs=6, learning_rate=0.1)
    model, reference = through_zero(), through_zero()
    found = epochs_of(model, recipe)
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    data, losses = line().train(0), []
    for epoch in range(6):
        optimiser.param_groups[0]["lr"] = recipe.rate(epoch)
        optimiser.zero_grad()
        nn.functional.mse_loss(reference(data.x), data.y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(nn.functional.mse_loss(reference(data.x), data.y).item())
    assert [epoch.figures["loss"] for epoch in found] == pytest.approx(losses, rel=1e-5)
    assert [epoch.number for epoch in found] == [1, 2, 3, 4, 5, 6]


def test_the_best_epoch_is_kept() -> None:
    """Momentum makes the line overshoot: later epochs are worse."""
    model = through_zero()
    found = epochs_of(model, Recipe(epochs=12, learning_rate=0.4))
    losses = [epoch.figures["loss"] for epoch in found]
    best = losses.index(min(losses))
    assert 0 < best < 11
    assert [epoch.number for epoch in found if epoch.best][-1] == best + 1
    data = line().train(0)
    assert MSE(model(data.x), data.y).item() == pytest.approx(min(losses), rel=1e-5)


def test_without_a_finite_loss_the_model_ends_as_it_began() -> None:
    model = through_zero()
    before = model_hash(model.state_dict())
    found = epochs_of(model, Recipe(epochs=3, learning_rate=1e30))
    assert [epoch.best for epoch in found] == [False] * 3
    assert model_hash(model.state_dict()) == before


def test_a_seed_gives_the_same_bits_and_digits_are_learnt() -> None:
    data = load_public(DataConfig(public_share=0.1), num_devices=3, seed=1)
    hashes, reached = [], 0.0
    for _ in range(2):
        model = build(Call("digits_cnn"), seed=1, outputs=10)
        recipe = Recipe(epochs=4, learning_rate=0.05, batch_size=16)
        *_, last = pretrain(
            model, data, recipe=recipe, training=Training(), loss=make_loss(Call("cross_entropy")), seed=1
        )
        hashes.append(model_hash(model.state_dict()))
        reached = last.figures["accuracy"]
    assert hashes[0] == hashes[1]
    assert reached > 0.9
    assert str(last).startswith("epoch 4: loss 0.")


def test_whole_numbers_under_a_loss_of_numbers_are_no_classes() -> None:
    """Three scores of the same class 0 would be an accuracy."""
    x = torch.arange(3.0)[:, None]
    pool = SamplePool(train=Samples(x, torch.arange(3)))
    counts = dataclasses.replace(line(), shares=PoolShares(pool, [torch.arange(3).numpy()]), num_classes=3)
    (epoch,) = epochs_of(through_zero(), Recipe(epochs=1), counts)
    assert set(epoch.figures) == {"loss"}
