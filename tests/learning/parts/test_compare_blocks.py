from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fedbonsai.learning.models import build
from fedbonsai.learning.parts.blocks import Blocks, cut
from fedbonsai.learning.parts.compare_blocks import blocks_difference
from fedbonsai.learning.spec import Call
from torch import Tensor, nn

X = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])


class TwoLayers(nn.Module):
    """Calls the given function between its layers."""

    def __init__(self, between: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(0))
        self.between = [between]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between[0](self, self.first(x)))


class Reversed(torch.autograd.Function):
    """Identity whose gradient has the opposite sign (Ganin and Lempitsky, ICML 2015); tracing records no operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def looks_at_the_type(model: Any, x: Tensor) -> Tensor:
    return F.relu(x) if isinstance(x, Tensor) else x


def looks_at_the_type_in_evaluation(model: Any, x: Tensor) -> Tensor:
    return x * 2 if isinstance(x, Tensor) and not model.training else x


def looks_for_an_attribute(model: Any, x: Tensor) -> Tensor:
    return x.values_of_a_batch() if hasattr(x, "values_of_a_batch") else x


def reverses_gradients(model: Any, x: Tensor) -> Tensor:
    return Reversed.apply(x)


def counts_tensors_only(model: Any, x: Tensor) -> Tensor:
    return x + 0 * model.steps.add_(1 if isinstance(x, Tensor) else 2)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (looks_at_the_type, "the output of its blocks differs from the model's"),
        (looks_at_the_type_in_evaluation, "the output of its blocks differs from the model's"),
        (looks_for_an_attribute, "its blocks fail where the model does not: AttributeError"),
        (reverses_gradients, "the backward pass of its blocks differs from the model's: it lacks ReversedBackward"),
        (counts_tensors_only, "the buffer 'steps' differs from the model's after its blocks have run"),
    ],
)
def test_what_only_shows_when_blocks_run(between, reason):
    torch.manual_seed(0)
    model = TwoLayers(between).eval()
    blocks = cut(model)
    assert len(blocks.modules) == 2
    assert blocks_difference(blocks, X).startswith(reason)
    assert int(model.steps) == 0
    assert not model.training


@pytest.mark.parametrize(
    "between", [lambda model, x: x, lambda model, x: x.detach(), lambda model, x: F.dropout(x, training=model.training)]
)
def test_nothing_is_lost(between):
    assert blocks_difference(cut(TwoLayers(between)), X) == ""


@pytest.mark.parametrize("name", ["digits_cnn", "resnet18"])
def test_nothing_is_lost_of_built_in_models_and_their_buffers_stay(name):
    model = build(Call(name), seed=0, outputs=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    side = (1, 8, 8) if name == "digits_cnn" else (3, 32, 32)
    assert blocks_difference(cut(model), torch.randn(2, *side, generator=torch.Generator().manual_seed(0))) == ""
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_of_one_block_is_its_block():
    blocks: Blocks = cut(nn.Linear(2, 2))
    assert blocks_difference(blocks, X) == ""


def test_a_model_that_fails_itself_raises_its_own_error():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        blocks_difference(cut(TwoLayers(lambda model, x: x)), torch.ones(2, 5))
