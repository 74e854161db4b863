"""Sparse products: masked weights forward and towards the input, masked activations towards the weight, nothing lost."""

import pytest
import torch
from fedbonsai.learning.sparse.layers import set_state
from fedbonsai.learning.sparse.selection import make_sparse
from fedbonsai.learning.sparse.state import SparseTraining
from fedbonsai.learning.sparse.thresholds import masked, threshold
from fedbonsai.learning.spec import Sparsity
from torch import nn
from torch.nn import functional

LAYERS = {
    "3x3": lambda: nn.Conv2d(4, 8, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
    "5x5 same": lambda: nn.Conv2d(4, 8, 5, padding="same"),
    "valid": lambda: nn.Conv2d(4, 8, (3, 1), padding="valid"),
    "circular": lambda: nn.Conv2d(4, 8, 3, padding=2, padding_mode="circular"),
    "dilated, grouped": lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2),
    "linear": lambda: nn.Linear(12, 6),
    "linear without bias": lambda: nn.Linear(12, 6, bias=False),
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name, *, weights=0.75, activations=0.5):
    """A sparse layer, and the same one dense."""
    torch.manual_seed(3)
    dense = LAYERS[name]()
    model = make_sparse(
        nn.Sequential(LAYERS[name]()), Sparsity(weights=weights, activations=activations, layers=("0",))
    )
    model[0].load_state_dict(dense.state_dict())
    return model.train(), dense


def inputs(name):
    return random(3, 5, 12) if name.startswith("linear") else random(3, 4, 8, 8)


def dense_output(dense, x, weight):
    return torch.func.functional_call(dense, {"weight": weight}, (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_all_three_products_have_the_operands_of_the_method(name):
    model, dense = make(name)
    weight, x = dense.weight.detach(), inputs(name)
    active = masked(weight, threshold(weight, 0.75)).requires_grad_()
    entering = x.clone().requires_grad_()
    output = model(entering)
    gradient = random(*output.shape, seed=1)
    output.backward(gradient)

    reference = x.clone().requires_grad_()
    wanted = dense_output(dense, reference, active)
    wanted.backward(gradient)
    assert torch.allclose(output, wanted, atol=1e-6)
    assert torch.allclose(entering.grad, reference.grad, atol=1e-6)

    free = weight.clone().requires_grad_()
    sparse_x = masked(x, threshold(x, 0.5))
    if name == "circular":  # what is padded is an entry of the input of the product
        padded = functional.pad(x, (2, 2, 2, 2), mode="circular")
        output = functional.conv2d(masked(padded, threshold(padded, 0.5)), free)
    elif name == "5x5 same":
        padded = functional.pad(x, (2, 2, 2, 2))
        output = functional.conv2d(masked(padded, threshold(padded, 0.5)), free)
    else:
        output = dense_output(dense, sparse_x, free)
    output.backward(gradient)
    assert torch.allclose(model[0].weight.grad, free.grad, atol=1e-5)
    if dense.bias is not None:
        axes = [axis for axis in range(gradient.dim()) if axis != (1 if gradient.dim() == 4 else gradient.dim() - 1)]
        assert torch.allclose(model[0].bias.grad, gradient.sum(axes), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_one_sample_without_its_dimension_has_the_products_of_a_batch_of_one(name):
    x = inputs(name)[0, 0] if name.startswith("linear") else inputs(name)[0]
    found = []
    for entering in (x, x.unsqueeze(0)):
        model, _ = make(name)
        entering = entering.clone().requires_grad_()
        output = model(entering)
        output.square().sum().backward()
        found.append((output.flatten(), entering.grad.flatten(), model[0].weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["3x3", "linear"])
def test_weights_that_are_left_out_have_gradients(name):
    model, dense = make(name, weights=0.9, activations=0.0)
    left_out = dense.weight.abs() < threshold(dense.weight, 0.9)
    model(inputs(name)).square().sum().backward()
    moved = model[0].weight.grad[left_out] != 0
    assert moved.float().mean() > 0.9


def test_a_weight_that_was_left_out_takes_part_again_when_it_has_grown():
    model = make_sparse(
        nn.Sequential(nn.Linear(2, 1, bias=False)), Sparsity(weights=0.5, activations=0.0, layers=("0",))
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 1.0]]))
    x = torch.tensor([[0.0, 1.0]])
    assert model(x).item() == 0.0
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    (-2 * model(x)).backward()
    optimiser.step()
    assert model[0].weight.tolist() == [[2.0, 3.0]]
    assert model(x).item() == 3.0


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_sparsity_of_0_is_the_dense_layer(name, mode):
    model, dense = make(name, weights=0.0, activations=0.0)
    x = inputs(name)
    getattr(model, mode)()
    assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize("name", LAYERS)
def test_in_evaluation_only_the_weights_are_masked(name):
    model, dense = make(name, activations=0.5)
    weight = masked(dense.weight, threshold(dense.weight, 0.75))
    assert torch.allclose(model.eval()(inputs(name)), dense_output(dense, inputs(name), weight), atol=1e-6)


@pytest.mark.parametrize("name", ["3x3", "linear"])
def test_under_autocast_products_have_its_type(name):
    model, dense = make(name)
    x = inputs(name).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, wanted = model(x), dense(x)
    assert output.dtype == wanted.dtype == torch.bfloat16
    output.float().sum().backward()
    assert x.grad.dtype == model[0].weight.grad.dtype == torch.float32


def test_the_graph_is_not_differentiated_twice():
    model, _ = make("linear")
    x = inputs("linear").requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_thresholds_are_exact_every_period_and_kept_in_between():
    model, _ = make("linear", weights=0.5, activations=0.5)
    layer, thresholds = model[0], SparseTraining(Sparsity(weights=0.5, activations=0.5, period=3))
    set_state(model, thresholds)
    used = []
    for step in range(5):
        with torch.no_grad():
            layer.weight.fill_(0.0)
            layer.weight[:, :6] = step + 1.0
        used.append(layer.product(layer.weight).weight_threshold.item())
        thresholds.step()
    assert used == [1.0, 1.0, 1.0, 4.0, 4.0]


def test_the_next_plan_starts_with_exact_thresholds():
    model, _ = make("linear", weights=0.5, activations=0.5)
    layer = model[0]
    for value in (1.0, 5.0):
        set_state(model, SparseTraining(Sparsity(weights=0.5, activations=0.5, period=100)))
        with torch.no_grad():
            layer.weight.fill_(value)
        assert layer.product(layer.weight).weight_threshold == value


def test_micro_batches_of_one_step_have_thresholds_of_their_own():
    """At an exact step the activations of each micro-batch are ranked among themselves."""
    thresholds, (model, _) = SparseTraining(Sparsity(period=2)), make("linear")
    of = [thresholds.of(model[0], "activations", torch.full((4,), value), 0.5).item() for value in (1.0, 2.0)]
    thresholds.step()
    of.append(thresholds.of(model[0], "activations", torch.full((4,), 9.0), 0.5).item())
    assert of == [1.0, 2.0, 2.0]


def test_layers_of_one_plan_do_not_share_thresholds():
    thresholds, (one, _), (other, _) = SparseTraining(Sparsity()), make("linear"), make("linear")
    assert thresholds.of(one[0], "weights", torch.full((4,), 1.0), 0.5) == 1
    assert thresholds.of(other[0], "weights", torch.full((4,), 2.0), 0.5) == 2
    assert thresholds.of(one[0], "activations", torch.full((4,), 3.0), 0.5) == 3
