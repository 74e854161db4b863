"""A user's own model, data, transform, loss and metric: a regression from sequences to one number, without classes."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.spec import Call, Optimiser, Training
from fedbonsai.learning.store import model_hash
from fedbonsai.learning.training.evaluation import evaluate
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.training import train
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings

MODULE = """
import torch
from torch import nn
from fedbonsai.learning.data.types import SamplePool, Samples

class Recurrent(nn.Module):
    def __init__(self, *, hidden):
        super().__init__()
        self.cells = nn.GRU(3, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x):
        return self.out(self.cells(x)[0][:, -1])

def sums(*, num_devices, seed, root, steps):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40 * num_devices + 50, steps, 3, generator=generator)
    samples = Samples(x, x[:, :, 0].mean(dim=1, keepdim=True))
    train = torch.arange(40 * num_devices)
    return SamplePool(train=samples.take(train), test=samples.take(torch.arange(len(train), len(x))))

def louder(x, generator, *, by):
    return x * by

def quartic(output, target, *, scale):
    return scale * ((output - target) ** 4).mean()

def within(output, target, *, distance):
    return ((output - target).abs() < distance).squeeze(1)
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_sequences.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def settings(**changes: Any) -> WorkloadSettings:
    usual = WorkloadSettings(
        model=Call("my_sequences:Recurrent", {"hidden": 8}),
        data=DataConfig(
            name="my_sequences:sums",
            kwargs={"steps": 5},
            train_transforms=(Call("my_sequences:louder", {"by": 2.0}),),
            test_transforms=(Call("my_sequences:louder", {"by": 2.0}),),
        ),
        metrics=(Call("absolute_error"), Call("my_sequences:within", {"distance": 0.25})),
        num_devices=3,
        seed=1,
    )
    return msgspec.structs.replace(usual, **changes)


def test_a_sequence_regression_trains_and_is_evaluated() -> None:
    workload = Workload(settings())
    data, model = workload.data, workload.new_model()
    assert data.num_classes is None
    loss = make_loss(Call("my_sequences:quartic", {"scale": 10.0}))
    training = Training(epochs=10, batch_size=10, optimiser=Optimiser(name="adam", learning_rate=0.02))

    def figures() -> dict[str, float]:
        return evaluate(model, data.server_test(), loss=loss, metrics=workload.metrics, transform=data.test_transform)

    before = figures()
    result = train(model, data.train(2), training=training, loss=loss, transform=data.train_transform, seed=0)
    after = figures()
    assert (result.steps, result.processed) == (40, 400)
    assert before.keys() == after.keys() == {"loss", "absolute_error", "within"}
    assert after["loss"] < before["loss"] / 4
    assert after["absolute_error"] < before["absolute_error"]
    assert after["within"] > before["within"]


def test_example_shows_one_transformed_sample() -> None:
    inputs, target = Workload(settings()).example()
    assert (inputs.shape, target.shape) == ((5, 3), (1,))
    raw = Workload(settings()).data.train(0)
    assert torch.equal(inputs, 2 * raw.x[0])
    assert torch.equal(target, raw.y[0])


def test_the_same_settings_give_the_same_bits_in_every_process() -> None:
    def hashes(seed: int) -> list[Any]:
        workload = Workload(settings(seed=seed))
        return [model_hash(workload.new_model().state_dict()), workload.data.digest(), workload.spec.blocks]

    assert hashes(1) == hashes(1)
    assert all(one != other for one, other in zip(hashes(1)[:2], hashes(2)[:2], strict=True))


def test_every_new_model_is_new() -> None:
    workload = Workload(settings())
    first, second = workload.new_model(), workload.new_model()
    with torch.no_grad():
        first.out.bias.fill_(9)
    assert not torch.equal(first.out.bias, second.out.bias)


def test_settings_survive_serialisation() -> None:
    sent = msgspec.msgpack.encode(settings())
    assert msgspec.msgpack.decode(sent, type=WorkloadSettings) == settings()


def test_blocks_and_spec_name_every_tensor_once() -> None:
    workload = Workload(settings())
    names = [tensor.name for block in workload.spec.blocks for tensor in block.tensors]
    assert sorted(names) == sorted(workload.new_model().state_dict())


def test_the_classes_in_the_data_size_the_model() -> None:
    workload = Workload(
        settings(model=Call("digits_cnn"), data=DataConfig(kwargs={}), metrics=(Call("accuracy"),), num_devices=2)
    )
    assert workload.data.num_classes == 10
    assert workload.new_model()(workload.example()[0][None]).shape == (1, 10)


def test_batch_statistics_leave_no_statistic_in_the_model() -> None:
    calls = {"model": Call("resfed_cnn", {"in_channels": 1, "image_size": 8}), "data": DataConfig(), "metrics": ()}
    roles = {
        setting: {t.role for b in Workload(settings(**calls, batch_statistics=setting)).spec.blocks for t in b.tensors}
        for setting in (False, True)
    }
    assert roles[False] == {"weight", "vector", "statistic", "counter"}
    assert roles[True] == {"weight", "vector"}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (("accuracy", "accuracy"), "evaluation.metrics names 'accuracy', which is taken"),
        (("accuracy", "my_other:accuracy"), "'accuracy', which is taken; each metric needs its own name"),
        (("my_other:loss",), "evaluation.metrics names 'loss', which is taken"),
        (("accurracy",), "evaluation.metrics is 'accurracy'; it must be one of"),
    ],
)
def test_metrics_that_reports_could_not_tell_apart(metrics: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _ = Workload(settings(metrics=tuple(Call(name) for name in metrics))).metrics


def test_a_fleet_without_a_single_sample() -> None:
    data = DataConfig(name="my_sequences:sums", kwargs={"steps": 5})
    workload = Workload(settings(data=data))
    workload.data = Empty()
    with pytest.raises(ValueError, match="data: no device has a single sample"):
        workload.example()


class Empty:
    def num_samples(self, device: int) -> int:
        return 0
