"""Checks of model, data, loss and metrics before round 0: errors are named, and working objects are not changed."""

import sys

import fedbonsai
import pytest
import torch
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Evaluated, Notice, PlanEnded, RunStarted

USER = '''
import numpy as np
import torch
from torch import nn
from fedbonsai.learning.data.types import SamplePool, Samples

def samples(*, num_devices, seed, root, targets="labels", inputs="float32", sizes=None):
    """Twelve samples of four numbers for each device, or as many as ``sizes`` says; three classes."""
    sizes = sizes or [12] * num_devices
    count = sum(sizes)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    y = {
        "labels": torch.arange(count) % 3,
        "outside": torch.arange(count) % 4,
        "columns": torch.arange(count)[:, None] % 3,
        "int32": torch.arange(count, dtype=torch.int32) % 3,
        "number": x.sum(1, keepdim=True),
        "counts": torch.arange(count) % 3,
    }[targets]
    x = {"float32": x, "float64": x.double(), "float16": x.half(), "bytes": (x * 40 + 128).byte()}[inputs]
    owners = np.repeat(np.arange(num_devices), sizes)
    return SamplePool(train=Samples(x, y), test=Samples(x[:6], y[:6]), owners=owners)

def linear(outputs=3, dtype="float32"):
    return nn.Linear(4, outputs, dtype=getattr(torch, dtype))

def layers(dtype="float32"):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(getattr(torch, dtype))

def normalised():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

class Counting(nn.Module):
    """Counts its calls and averages its inputs, also in evaluation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        x = self.first(x)
        self.calls += 1
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return self.second(x - self.mean)

class Frozen(nn.Module):
    """Its first layer is frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)

class Typed(nn.Module):
    """Checks the type of its first layer's output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.first(x)
        return self.second(torch.tanh(x) if isinstance(x, torch.Tensor) else x)

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.rnn(x[:, :, None])[0][:, -1])

def unknown_key(output, target):
    return {}["key"]

def total(output, target):
    return (output.argmax(1) == target).float().sum()

def poisson(output, target):
    return torch.nn.functional.poisson_nll_loss(output[:, 0], target.float())

def shift(x, generator):
    return x.shift()
'''


@pytest.fixture(scope="module", autouse=True)
def user_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "users_learning.py").write_text(USER)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("users_learning", None)


@pytest.fixture(name="config")
def config_fixture(digits):
    """``config(model, ...)``: the user's samples on three devices."""

    def config(model, *, data=None, **changes):
        call = {"name": f"users_learning:{model}"} if isinstance(model, str) else model
        return digits(model=call, data={"name": "users_learning:samples", "kwargs": data or {}}, **changes)

    return config


def run(config):
    running = fedbonsai.run(config)
    events = list(running)
    return events, running.summary


def named(name, **kwargs):
    return {"name": f"users_learning:{name}", "kwargs": kwargs}


REFUSED = {
    "metric": (
        ("linear", {"evaluation": {"metrics": ["accuracy", "users_learning:unknown_key"]}}),
        "metric 'unknown_key' fails: KeyError: 'key' (the model gives shape (2, 3) (torch.float32), targets have shape (2,) "
        "(torch.int64))",
    ),
    "metric on devices": (
        ("linear", {"data_share": 0.25, "evaluation": {"where": "devices", "metrics": ["users_learning:unknown_key"]}}),
        "metric 'unknown_key' fails: KeyError: 'key'",
    ),
    "metric of another shape": (
        ("linear", {"evaluation": {"metrics": ["users_learning:total"]}}),
        "metric 'total' returned shape (); it must return one number per sample, shape (2,)",
    ),
    "loss": (
        ("linear", {"training": {"loss": "users_learning:unknown_key"}}),
        "training.loss fails: KeyError: 'key'",
    ),
    "loss, without any evaluation": (
        ("linear", {"training": {"loss": "users_learning:unknown_key"}, "evaluation": {"where": "none"}}),
        "training.loss fails: KeyError: 'key'",
    ),
    "transform": (
        ("linear", {"transforms": [{"name": "users_learning:shift"}]}),
        "data.test_transforms fail on a batch of shape (2, 4) (torch.float32): AttributeError",
    ),
    "transform of training": (
        ("linear", {"train_transforms": [{"name": "users_learning:shift"}]}),
        "data.train_transforms fail on a batch of shape (1, 4) (torch.float32): AttributeError",
    ),
    "default metric": (
        (named("linear", outputs=1), {"training": {"loss": "users_learning:poisson"}, "data": {"targets": "counts"}}),
        "metric 'accuracy' fails: ValueError: the model gives shape (2, 1)",
    ),
    "labels outside": (
        ("linear", {"data": {"targets": "outside"}}),
        "data: the target of training sample 3 is 3; the model gives 3 scores, so that labels must be 0 to 2",
    ),
    "labels in columns": (
        ("linear", {"data": {"targets": "columns"}}),
        "data: targets of training samples have shape [1]; training.loss 'cross_entropy' takes one label for each",
    ),
    "labels of another type": (
        ("linear", {"data": {"targets": "int32"}}),
        "training.loss fails: RuntimeError: expected target dtype to be Long or Byte, but got Int",
    ),
    "numbers under the default loss": (
        (named("linear", outputs=1), {"data": {"targets": "number"}}),
        "training.loss is 'cross_entropy', which takes a score for each of two classes or more",
    ),
    "bytes that are no images": (
        ("linear", {"data": {"inputs": "bytes"}}),
        "the model fails on samples of shape (2, 4) (torch.uint8): RuntimeError",
    ),
    "a target of accuracy without accuracy": (
        (named("linear", outputs=1), {"training": {"loss": "mse"}, "data": {"targets": "number"}, "stop": {"accuracy": 0.9}}),
        "stop.accuracy is 0.9, but accuracy is not a metric where targets are not class labels",
    ),
    "samples one at a time": (
        ("normalised", {"training": {"batch_size": 4, "accumulation": 4}}),
        "training.batch_size is 4 and training.accumulation 4, which trains on one sample at a time; the model cannot "
        "(ValueError: Expected more than 1 value per channel",
    ),
    "one sample on every device": (
        ("normalised", {"data": {"sizes": [1, 1, 1]}}),
        "data: no device has more than one training sample, and the model cannot be trained on one: ValueError: Expected",
    ),
    "cut through torch.no_grad": (
        ("Frozen", {"preset": "splitfed"}),
        "policy[1] (splitfed) cuts the model, which cannot be cut: its forward runs 'first' under torch.no_grad",
    ),
    "cut where only the blocks show it": (
        ("Typed", {"preset": "splitfed"}),
        "policy[1] (splitfed) cuts the model, which cannot be cut: the output of its blocks differs from the model's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_work_together_are_refused_before_the_first_round(config, case):
    (model, changes), sentence = REFUSED[case]
    changes = dict(changes)
    share, transforms = changes.pop("data_share", 0.0), changes.pop("transforms", [])
    training = changes.pop("train_transforms", [])
    made = config(model, data=changes.pop("data", None), **changes)
    made["data"] |= {"test_share": share, "test_transforms": transforms, "train_transforms": training}
    with pytest.raises(ConfigError) as caught:
        next(fedbonsai.run(made))
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def lstm_runs_in_bf16() -> bool:
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            torch.nn.LSTM(1, 3, batch_first=True)(torch.ones(2, 4, 1))
    except RuntimeError:
        return False
    return True


def test_a_precision_that_the_processor_lacks_for_this_model_is_named(config):
    made = config("Reader", training={"precision": "bf16", "batch_size": 64})
    if lstm_runs_in_bf16():
        assert run(made)[1]["status"] == "finished"
        return
    with pytest.raises(
        ConfigError, match=r"^training\.precision is 'bf16', in which this processor cannot run the model; "
    ):
        next(fedbonsai.run(made))


def test_the_default_metric_follows_loss_and_targets_and_without_one_the_lowest_loss_is_best(config):
    events, summary = run(config(named("linear", outputs=1), data={"targets": "number"}, training={"loss": "mse"}))
    assert [set(event.figures) for event in events if isinstance(event, Evaluated)] == [{"loss"}, {"loss"}]
    assert (summary["accuracy"], summary["best_round"]) == (None, 2)
    figures = run(config("linear"))[0]
    assert {name for event in figures if isinstance(event, Evaluated) for name in event.figures} == {"loss", "accuracy"}
    none = run(config("linear", evaluation={"metrics": []}))[0]
    assert {name for event in none if isinstance(event, Evaluated) for name in event.figures} == {"loss"}


def test_a_model_that_assigns_buffers_is_one_block_and_trains(config):
    events, summary = run(config("Counting"))
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert (started.blocks, summary["status"]) == (("model",), "finished")
    assert started.block_reason.startswith("its forward changes 'calls', an attribute of the model")
    nowhere = run(config("Counting", evaluation={"where": "none"}))[1]
    assert summary["model_hash"] == nowhere["model_hash"]  # evaluation counts nothing


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_models_of_other_types_train(config, dtype):
    events, summary = run(config(named("layers", dtype=dtype), data={"inputs": dtype}))
    assert {event.report.outcome.value for event in events if isinstance(event, PlanEnded)} == {"done"}
    assert summary["status"] == "finished"


@pytest.mark.parametrize("preset", ["splitfed", "local_loss"])
def test_models_of_double_precision_are_cut(config, preset):
    made = config(named("layers", dtype="float64"), data={"inputs": "float64"}, preset=preset)
    events, _ = run(made)
    assert {event.report.outcome.value for event in events if isinstance(event, PlanEnded)} == {"done"}


def test_devices_with_one_sample_are_left_out_where_the_model_cannot_be_trained_on_it(config):
    made = config("normalised", data={"sizes": [1, 5, 6]})
    events, summary = run(made)
    assert {event.report.plan.device for event in events if isinstance(event, PlanEnded)} == {1, 2}
    assert (summary["outcomes"]["done"], summary["outcomes"]["failed"]) == (4, 0)
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert notice.startswith(
        "1 of 3 devices have one training sample, on which the model cannot be trained (ValueError: "
    )
    assert notice.endswith(", and are left out: 0")
    others = run(config("linear", data={"sizes": [1, 5, 6]}))[0]
    assert {event.report.plan.device for event in others if isinstance(event, PlanEnded)} == {0, 1, 2}


def test_accumulation_makes_no_micro_batch_of_one_sample(config):
    """Thirteen samples in batches of eight, each in four parts."""
    made = config("normalised", data={"sizes": [13, 13, 13]}, training={"batch_size": 8, "accumulation": 4})
    assert run(made)[1]["outcomes"]["done"] == 6
    assert run(made | {"preset": "splitfed"})[1]["outcomes"]["done"] == 6
