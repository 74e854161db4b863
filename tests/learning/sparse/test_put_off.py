"""Weight gradients that are put off as factors until the optimiser's step."""

import pytest
import torch
from fedbonsai.learning.data.types import Samples
from fedbonsai.learning.randomness import seeded
from fedbonsai.learning.sparse.kernels import native
from fedbonsai.learning.sparse.layers import set_state
from fedbonsai.learning.sparse.selection import make_sparse
from fedbonsai.learning.sparse.state import SparseTraining
from fedbonsai.learning.spec import LayerKernels, Optimiser, Sparsity, Training, kernel_key
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.training import Stepper, WholeModel, train
from torch import nn

SPARSITY = Sparsity(weights=0.75, activations=0.5, period=2, layers=("0",))
KERNELS = {kernel_key("0", SPARSITY): LayerKernels(kernels=("native", "native", "native"))}


@pytest.fixture(autouse=True)
def native_library():
    if reason := native.build():
        pytest.skip(reason)


def network():
    with seeded(0):
        model = nn.Sequential(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3))
    return make_sparse(model, SPARSITY, KERNELS)


def batch(rows):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 40, generator=generator), torch.arange(rows) % 3


def training(**settings):
    optimiser = Optimiser(**{"learning_rate": 0.1, "momentum": 0.0} | settings)
    return Training(optimiser=optimiser, sparsity=SPARSITY, batch_size=8, epochs=2)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_trains_as_gradients_do(accumulation):
    models = []
    for settings in ({}, {"clip_norm": 1e9}):  # clipping needs all gradients
        model, (x, y) = network(), batch(20)
        plan = training(**settings)
        plan = Training(optimiser=plan.optimiser, sparsity=SPARSITY, batch_size=8, epochs=2, accumulation=accumulation)
        train(model, Samples(x, y), training=plan, loss=make_loss(plan.loss), transform=lambda x, _: x, seed=0)
        models.append(model.state_dict())
    start = network().state_dict()
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, start[name])


@pytest.mark.parametrize(
    ("settings", "rows", "is_put_off"),
    [
        ({}, 8, True),
        ({}, 25, False),
        ({"momentum": 0.9}, 8, False),
        ({"weight_decay": 0.1}, 8, False),
        ({"proximal": 0.1}, 8, False),
        ({"clip_norm": 1.0}, 8, False),
        ({"name": "adam"}, 8, False),
    ],
)
def test_only_where_a_step_does_nothing_else(settings, rows, is_put_off):
    model, plan = network(), training(**settings)
    stepper = Stepper(model, training=plan, trainable=None)
    with stepper:
        WholeModel(model, training=plan, loss=make_loss(plan.loss))(*batch(rows), 1.0)
        assert (model[0].weight.grad is None) == is_put_off
        assert model[2].weight.grad is not None
        before = model[0].weight.detach().clone()
        stepper.step()
        assert not torch.equal(model[0].weight, before)


def test_gradients_of_a_step_that_is_not_made_are_dropped():
    model, plan = network(), training()
    gradient = WholeModel(model, training=plan, loss=make_loss(plan.loss))
    before = model[0].weight.detach().clone()
    stepper = Stepper(model, training=plan, trainable=None)
    with stepper:
        gradient(*batch(8), 1.0)
    with stepper:
        stepper.step()
    assert torch.equal(model[0].weight, before)


def test_a_frozen_weight_stays():
    model, plan = network(), training()
    before = model[0].weight.detach().clone()
    stepper = Stepper(model, training=plan, trainable=["0.bias", "2.weight"])
    with stepper:
        WholeModel(model, training=plan, loss=make_loss(plan.loss))(*batch(8), 1.0)
        stepper.step()
    assert torch.equal(model[0].weight, before)


def test_outside_of_an_optimiser_gradients_are_made():
    model, (x, y) = network(), batch(8)
    set_state(model, SparseTraining(SPARSITY))
    nn.functional.cross_entropy(model.train()(x), y).backward()
    assert model[0].weight.grad is not None


def test_gradients_at_copies_of_the_weights_are_all_made():
    """A device that runs ahead of the gradients steps other tensors than those that it has multiplied with."""
    model, (x, y) = network(), batch(8)
    plan = training()
    stepper = Stepper(model, training=plan, trainable=None, stashes=True)
    with stepper:
        copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, copies, (x,)), y)
        gradients = torch.autograd.grad(loss, list(copies.values()))
    assert all(gradient.any() for gradient in gradients)
