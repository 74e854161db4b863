"""A model of which torch.fx would lose something is a single block; the model is left unchanged."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.compare_blocks import blocks_difference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TwoLayers(nn.Module):
    """``forward`` is the given function of the module and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("average", torch.zeros(3))
        self.calls, self.log, self.plain = 0, [], torch.zeros(3)
        self.function = [forward]

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](self, x)


def without_gradients(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = model.first(x)
    return model.second(x)


def gradients_in_training(model: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(model.training):
        x = model.first(x)
    return model.second(x)


def with_gradients(model: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = model.first(x)
    return model.second(x)


def inference(model: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        x = model.first(x)
    return model.second(x)


def half_precision(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        x = model.first(x)
    return model.second(x.float())


def full_precision(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        x = model.first(x)
    return model.second(x)


def recomputed(model: Any, x: Tensor) -> Tensor:
    return model.second(checkpoint(model.first, x, use_reentrant=False))


def recomputed_reentrant(model: Any, x: Tensor) -> Tensor:
    return model.second(checkpoint(model.first, x, use_reentrant=True))


class Rounded(torch.autograd.Function):
    """Rounds in the forward pass; the gradient is the identity's (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def own_gradient(model: Any, x: Tensor) -> Tensor:
    return model.second(Rounded.apply(model.first(x)))


def counts_a_buffer(model: Any, x: Tensor) -> Tensor:
    model.steps += 1
    return model.second(model.first(x))


def averages_in_training(model: Any, x: Tensor) -> Tensor:
    x = model.first(x)
    if model.training:
        model.average = 0.9 * model.average + 0.1 * x.detach().mean(0)
    return model.second(x)


def counts_and_fails_on_symbols(model: Any, x: Tensor) -> Tensor:
    model.steps = model.steps + 1
    model.log.append(x)
    return model.second(model.first(x)) if x.sum() > 0 else model.second(F.relu(model.first(x)))


def counts_a_number(model: Any, x: Tensor) -> Tensor:
    model.calls += 1
    return model.second(model.first(x))


def keeps_activations(model: Any, x: Tensor) -> Tensor:
    model.last = model.first(x)
    return model.second(model.last)


def keeps_a_log(model: Any, x: Tensor) -> Tensor:
    x = model.first(x)
    model.log.append(x)
    return model.second(x)


def adds_in_place(model: Any, x: Tensor) -> Tensor:
    model.plain.add_(1)
    return model.second(model.first(x) + model.plain)


def penalises(model: Any, x: Tensor) -> Tensor:
    return model.second(model.first(x)) + sum(parameter.square().sum() for parameter in model.parameters())


def clips_weights(model: Any, x: Tensor) -> Tensor:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.01, 0.01)
    return model.second(model.first(x))


def flips_a_coin(model: Any, x: Tensor) -> Tensor:
    return model.second(model.first(x)) if random.random() < 2 else x


def flips_numpys_coin(model: Any, x: Tensor) -> Tensor:
    return model.second(model.first(x)) if np.random.rand() < 2 else x


def flips_torchs_coin(model: Any, x: Tensor) -> Tensor:
    return model.second(model.first(x)) if torch.rand(1) < 2 else x


def seeds(model: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = F.dropout(model.first(x), training=True)
    return model.second(x)


def elsewhere(model: Any, x: Tensor) -> Tensor:
    with torch.device("cpu"):
        zeros = torch.zeros(x.shape[0], 3)
    return model.second(model.first(x) + zeros)


def catches(model: Any, x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            x = model.first(x)
    except Exception:
        x = model.first(x)
    return model.second(x)


LOST = {
    without_gradients: "runs 'first' under torch.no_grad",
    gradients_in_training: "switches gradients on",
    with_gradients: "switches gradients on",
    inference: "runs 'first' under torch.inference_mode",
    half_precision: "runs 'first' under torch.autocast",
    full_precision: "runs 'first' under torch.autocast",
    recomputed: "runs 'first' under hooks on saved tensors",
    recomputed_reentrant: "runs 'first' under torch.no_grad",
    own_gradient: "runs 'round' under torch.no_grad",
    counts_a_buffer: "changes 'steps'",
    averages_in_training: "changes 'average'",
    counts_and_fails_on_symbols: "TraceError",
    counts_a_number: "changes 'calls'",
    keeps_activations: "changes 'last'",
    keeps_a_log: "changes 'log'",
    adds_in_place: "changes 'plain'",
    penalises: "computes with 'first.weight'",
    clips_weights: "computes with 'first.weight'",
    flips_a_coin: "draws numbers from Python's generator",
    flips_numpys_coin: "draws numbers from numpy's generator",
    flips_torchs_coin: "draws numbers from torch's generator",
    seeds: "under a seed of its own",
    elsewhere: "under a torch function mode",
    catches: "runs 'first' under torch.no_grad",
}


def told(model: nn.Module) -> dict[str, Any]:
    """All attributes of a module by name, with values."""
    held: dict[str, Any] = dict(vars(model))
    held |= {f"{name}.{key}": value for name, inner in model.named_modules() for key, value in vars(inner).items()}
    return copy.deepcopy({name: value for name, value in held.items() if name.rpartition(".")[2] != "function"})


def drawn() -> tuple[float, float, float]:
    """The next number of each generator, whose state is restored."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = random.random(), float(np.random.rand()), float(torch.rand(1))
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    return numbers


@pytest.mark.parametrize("forward", LOST)
def test_a_model_of_which_tracing_loses_something_is_one_unchanged_block(forward):
    torch.manual_seed(0)  # the same seed as in `seeds`, which must be detected all the same
    model = TwoLayers(forward)
    model.second.eval()
    before, weights, numbers = repr(told(model)), copy.deepcopy(model.state_dict()), drawn()
    blocks = cut(model)
    assert list(blocks.modules) == ["model"]
    assert LOST[forward] in blocks.reason
    assert repr(told(model)) == before
    assert drawn() == numbers
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def plain(model: Any, x: Tensor) -> Tensor:
    return model.second(model.first(x))


def constant_without_gradients(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.arange(3.0)
    return model.second(model.first(x) * scale)


def counts_in_place(model: Any, x: Tensor) -> Tensor:
    model.steps.add_(1)
    return model.second(model.first(x))


def draws_like_its_input(model: Any, x: Tensor) -> Tensor:
    return model.second(model.first(x) + torch.randn_like(model.first(x)))


@pytest.mark.parametrize("forward", [plain, constant_without_gradients, counts_in_place, draws_like_its_input])
def test_what_a_sequence_of_operations_keeps_is_cut(forward):
    blocks = cut(TwoLayers(forward))
    assert (list(blocks.modules), blocks.reason) == (["first", "second"], "")


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("where", "reason"), [("", "the model itself has a"), ("0", "0 has a"), ("1", "")])
def test_hooks_are_kept_where_modules_stay_whole_and_else_the_model_is_one_block(hook, where, reason):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    getattr(model.get_submodule(where), f"register_{hook}")(lambda *_: None)
    blocks = cut(model)
    assert len(blocks.modules) == (1 if reason else 2)
    assert blocks.reason.startswith(reason)
    assert bool(blocks.reason) == bool(reason)


class Graph(nn.Module):
    """A graph convolution whose adjacency is sparse: a buffer, and a constant that it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
        self.register_buffer("adjacency", torch.eye(2).to_sparse(), persistent=False)
        self.constant = torch.eye(2).to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sparse.mm(self.adjacency, self.first(x))
        return self.second(torch.sparse.mm(self.constant.t(), x))


def test_sparse_buffers_and_constants_are_cut_like_others():
    blocks = cut(Graph())
    assert (list(blocks.modules), blocks.reason) == (["first", "second"], "")
    assert blocks_difference(blocks, torch.ones(2, 2)) == ""


@pytest.mark.parametrize("normalised", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_layers_with_normalised_weights_are_layers(normalised):
    model = nn.Sequential(normalised(nn.Linear(2, 3)), nn.ReLU(), nn.Linear(3, 2))
    blocks = cut(model)
    assert (len(blocks.modules), blocks.reason) == (2, "")
    assert blocks_difference(blocks, torch.ones(2, 2)) == ""
