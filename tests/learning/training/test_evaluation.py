import copy
from typing import Any

import pytest
import torch
from fedbonsai.learning.data.types import Samples
from fedbonsai.learning.training.evaluation import FigureError, evaluate
from fedbonsai.learning.training.losses import METRICS
from torch import Tensor, nn
from torch.nn import functional as F

LINE = Samples(torch.tensor([[1.0], [2.0], [-1.0], [3.0]]), torch.tensor([[2.0], [1.0], [0.0], [-1.0]]))


def as_it_is(x: Tensor, generator: torch.Generator) -> Tensor:
    return x


def line(slope: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(slope)
    return model


def figures(model: nn.Module, samples: Samples, **changes: Any) -> dict[str, float]:
    options: dict[str, Any] = {"loss": F.mse_loss, "metrics": {}, "transform": as_it_is, **changes}
    return evaluate(model, samples, **options)


def test_evaluation_by_hand() -> None:
    found = figures(line(1.0), LINE, metrics={"error": METRICS["absolute_error"]}, batch_size=3)
    assert found == {"loss": (1 + 1 + 1 + 16) / 4, "error": (1 + 1 + 1 + 4) / 4}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
def test_evaluation_does_not_depend_on_batches(batch_size: int) -> None:
    assert figures(line(0.25), LINE, batch_size=batch_size) == pytest.approx(figures(line(0.25), LINE))


def test_evaluation_has_no_last_batch_of_one_sample() -> None:
    # batch normalisation without running statistics fails on one sample
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 1))
    assert figures(model, Samples(torch.arange(9.0)[:, None], torch.ones(9, 1)), batch_size=4)["loss"] > 0


def test_evaluation_changes_no_tensor_and_draws_no_random_number() -> None:
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)
    model, samples = nn.Sequential(*layers), Samples(torch.arange(192.0).sin().view(12, 1, 4, 4), torch.arange(12) % 3)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    options = {"loss": F.cross_entropy, "metrics": {"accuracy": METRICS["accuracy"]}}
    first = figures(model.train(), samples, **options)
    assert figures(model, samples, **options) == first
    assert figures(model, samples, layout="channels_last", **options) == pytest.approx(first, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_needs_samples() -> None:
    with pytest.raises(ValueError, match="evaluation needs at least one sample"):
        figures(line(1.0), LINE.take([]))


def test_random_transforms_see_the_same_generator_each_time() -> None:
    def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + torch.randn(x.shape, generator=generator)

    assert figures(line(1.0), LINE, transform=noisy) == figures(line(1.0), LINE, transform=noisy)
    assert figures(line(1.0), LINE, transform=noisy) != figures(line(1.0), LINE)


def test_a_metric_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"metric 'total' returned shape \(\)"):
        figures(line(1.0), LINE, metrics={"total": lambda output, target: (output - target).sum()})


def test_bf16_runs_the_forward_pass_in_it_and_gives_float32_to_loss_and_metrics():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            output = self.linear(x)
            seen.append(output.dtype)
            return output

    def loss(output, target):
        seen.append(output.dtype)
        return nn.functional.cross_entropy(output, target)

    samples = Samples(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
    evaluate(Spy(), samples, loss=loss, metrics={}, transform=as_it_is, precision="bf16")
    assert seen == [torch.bfloat16, torch.float32]


class Counting(nn.Module):
    """Counts its calls, averages its inputs, keeps its last output, and draws random numbers, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(1))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.last = self.layer(x - self.mean) + torch.randn_like(x)
        return self.last


def test_evaluation_undoes_what_the_models_code_changes() -> None:
    model = Counting()
    buffers, state = dict(model.named_buffers()), torch.get_rng_state()
    first = figures(model, LINE, batch_size=2)
    assert figures(model, LINE, batch_size=2) == first
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())  # buffers are still the same objects
    assert (int(model.calls), model.mean.tolist(), model.last) == (0, [0.0], None)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_or_a_metric_that_fails_is_named() -> None:
    def lost(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError("x")

    with pytest.raises(FigureError, match=r"^training\.loss fails: KeyError: 'x'$"):
        figures(line(1.0), LINE, loss=lost)
    with pytest.raises(FigureError, match=r"^metric 'within' fails: KeyError: 'x'$"):
        figures(line(1.0), LINE, metrics={"ok": METRICS["absolute_error"], "within": lost})
