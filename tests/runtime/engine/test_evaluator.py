"""Evaluation: figures over devices by hand, and on the server, on devices, both or nowhere."""

import math
import sys

import fedbonsai
import pytest
import torch
from fedbonsai.learning.parts.part import Part
from fedbonsai.policies.decision import Decision
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.engine.evaluator import spread
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import Evaluated, RunEnded
from msgspec.structs import replace
from torch.nn import functional


def test_spread_by_hand():
    # mean 2.5; squared distances 2.25 + 0.25 + 0.25 + 2.25 = 5, over four 1.25
    values = [4.0, 1.0, 3.0, 2.0]
    assert spread(values, worst_is_low=True) == {"mean": 2.5, "spread": math.sqrt(1.25), "worst": 1.0, "worst_10": 1.0}
    assert spread(values, worst_is_low=False) == {"mean": 2.5, "spread": math.sqrt(1.25), "worst": 4.0, "worst_10": 4.0}


def test_the_worst_tenth_is_a_mean_over_a_tenth_of_the_devices():
    values = [float(value) for value in range(25)]
    assert spread(values, worst_is_low=True)["worst_10"] == 0.5
    assert spread(values, worst_is_low=False)["worst_10"] == 23.5


def test_one_device_is_its_own_mean_and_worst():
    assert spread([0.5], worst_is_low=True) == {"mean": 0.5, "spread": 0.0, "worst": 0.5, "worst_10": 0.5}


def evaluations(config, of_type):
    run = fedbonsai.run(config)
    events = list(run)
    return of_type(events, Evaluated), of_type(events, RunEnded)[0], run.summary


def test_on_the_server(digits, of_type):
    (first, _), ended, summary = evaluations(digits(), of_type)
    assert set(first.server) == {"accuracy", "loss"}
    assert (first.devices, first.num_devices) == ({}, 0)
    assert "evaluation" not in ended.down_by_kind
    assert summary["accuracy"] is not None


def test_on_the_devices_without_any_data_on_the_server(digits, of_type):
    config = digits(data={"test_share": 0.2, "server_test": False}, evaluation={"where": "devices"})
    (_, last), ended, summary = evaluations(config, of_type)
    assert last.server == {}
    assert last.num_devices == 3
    assert set(last.devices) == {"accuracy", "loss"}
    for name, low in (("accuracy", True), ("loss", False)):
        figures = last.devices[name]
        assert set(figures) == {"mean", "spread", "worst", "worst_10"}
        assert figures["worst"] < figures["mean"] if low else figures["worst"] > figures["mean"]
    assert summary["accuracy"] == last.devices["accuracy"]["mean"]
    assert summary["evaluation"]["devices"] == last.devices
    # Evaluation is an instrument: its bytes are counted separately.
    assert ended.down_by_kind["evaluation"] > 0
    assert ended.up_bytes == ended.up_by_kind["weights"] + ended.up_by_kind["control"]


def test_on_both_the_summary_reports_the_servers_accuracy(digits, of_type):
    config = digits(data={"test_share": 0.2}, evaluation={"where": "both"})
    (_, last), _, summary = evaluations(config, of_type)
    assert summary["accuracy"] == last.server["accuracy"] != last.devices["accuracy"]["mean"]


def test_nowhere(digits, of_type):
    found, _, summary = evaluations(digits(data={"server_test": False}, evaluation={"where": "none"}), of_type)
    assert found == []
    assert (summary["accuracy"], summary["loss"], summary["best_round"]) == (None, None, None)
    assert summary["model_hash"]


def test_evaluation_changes_nothing_else(digits, of_type):
    both = digits(data={"test_share": 0.2}, evaluation={"where": "both"})
    none = digits(data={"test_share": 0.2}, evaluation={"where": "none"})
    same = ("model_hash", "virtual_s", "up_bytes", "down_bytes")
    first, second = evaluations(both, of_type)[2], evaluations(none, of_type)[2]
    assert {key: first[key] for key in same} == {key: second[key] for key in same}


def test_every_second_version_and_always_the_last(digits, of_type):
    found, _, summary = evaluations(digits(evaluation={"every": 2}, stop={"rounds": 3}), of_type)
    assert [event.version for event in found] == [2, 3]
    assert summary["accuracy"] == found[-1].server["accuracy"]


def test_a_sample_of_the_devices_is_the_same_in_every_evaluation(digits, of_type):
    config = digits(data={"test_share": 0.2}, evaluation={"where": "devices", "devices": 2})
    (first, second), ended, _ = evaluations(config, of_type)
    assert (first.num_devices, second.num_devices) == (2, 2)
    assert evaluations(config, of_type)[0] == [first, second]
    assert ended.down_by_kind["evaluation"] < ended.down_by_kind["weights"]


def test_whether_lower_is_better_depends_on_the_metric(digits, of_type):
    config = digits(
        data={"name": "synthetic", "kwargs": {"shape": [4], "classes": None}, "test_share": 0.5},
        model={"name": "torch.nn:Linear", "kwargs": {"in_features": 4, "out_features": 1}},
        training={"loss": "mse"},
        evaluation={"where": "devices", "metrics": ["squared_error"]},
    )
    figures = evaluations(config, of_type)[0][-1].devices["squared_error"]
    assert figures["worst"] > figures["mean"]


@pytest.mark.parametrize("where", ["server", "devices"])
def test_its_batch_size_is_its_own(digits, of_type, where):
    """With batch statistics the figures depend on the samples in a batch."""

    def loss(batch_size):
        config = digits(
            model={"name": "torch.nn:BatchNorm1d", "kwargs": {"num_features": 4}},
            data={"name": "synthetic", "kwargs": {"shape": [4], "classes": 4, "test_samples": 64}, "test_share": 0.5},
            server={"statistics": "batch"},
            evaluation={"where": where, "batch_size": batch_size},
        )
        return evaluations(config, of_type)[2]["loss"]

    assert loss(16) == loss(16)
    assert loss(16) != loss(4)


USER = """
import torch
from fedbonsai.learning.data.types import SamplePool, Samples

def unequal(*, num_devices, seed, root):
    \"\"\"Device 0 has 2 samples, device 1 has 4, device 2 has 6; half of each is its test share.\"\"\"
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor([2, 4, 6]))
    x = torch.arange(48.0).reshape(12, 4) % 7
    return SamplePool(train=Samples(x, torch.arange(12) % 4), owners=owners.numpy(), num_classes=4)

def tested(**arguments):
    pool = unequal(**arguments)
    return SamplePool(train=pool.train, test=pool.train, owners=pool.owners, num_classes=4)

calls = []

def once(output, target):
    \"\"\"Fails from its second call on.\"\"\"
    calls.append(len(output))
    if len(calls) > 1:
        raise IndexError("no more")
    return torch.ones(len(output))
"""


@pytest.fixture(name="unequal")
def unequal_fixture(tmp_path, monkeypatch, digits):
    """``unequal(batch_size, metrics)``: a model that cannot take one sample at a time."""
    (tmp_path / "users_shares.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda batch_size, metrics=None: digits(
        model={"name": "torch.nn:BatchNorm1d", "kwargs": {"num_features": 4}},
        data={"name": "users_shares:unequal", "test_share": 0.5},
        server={"statistics": "batch"},
        evaluation={"where": "devices", "batch_size": batch_size, "metrics": metrics},
    )
    sys.modules.pop("users_shares", None)


def test_a_device_that_cannot_evaluate_is_left_out_and_counted(unequal, of_type):
    found, _, summary = evaluations(unequal(64), of_type)
    assert [(event.num_devices, event.num_failed) for event in found] == [(2, 1), (2, 1)]
    assert found[0].first_error.startswith("device 0: ValueError: Expected more than 1 value per channel")
    assert found[0].figures["loss"] > 0
    assert (summary["evaluation"]["num_failed"], summary["status"]) == (1, "finished")


def test_when_no_device_can_evaluate_the_run_ends(unequal):
    with pytest.raises(RunError) as caught:
        list(fedbonsai.run(unequal(64, ["users_shares:once"])))
    assert str(caught.value).startswith(
        "device 0, round 1, stage evaluate: no device could evaluate the model; the first fault: "
    )


def test_batches_that_the_model_cannot_be_evaluated_on_are_refused_before_the_first_round(unequal):
    with pytest.raises(
        ConfigError, match=r"^the model fails on samples of shape \(1, 4\) .*Expected more than 1 value"
    ):
        next(fedbonsai.run(unequal(1)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"evaluation": {"where": "devices"}}, "evaluation.where is 'devices', but no device has a test set"),
        ({"evaluation": {"where": "both"}}, "evaluation.where is 'both', but no device has a test set"),
        ({"data": {"server_test": False}}, "evaluation.where is 'server', but the server has no test set"),
    ],
)
def test_evaluation_without_a_test_set_is_refused_before_the_first_round(digits, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        next(fedbonsai.run(digits(**changes)))


def test_a_metric_that_fails_on_the_server_during_a_run_ends_it_with_its_name_and_round(unequal):
    config = unequal(64, ["users_shares:once"])
    config["evaluation"] |= {"where": "server"}
    config["data"] |= {"name": "users_shares:tested"}
    with pytest.raises(RunError) as caught:
        list(fedbonsai.run(config))
    assert str(caught.value) == "round 1, stage evaluate: FigureError: metric 'once' fails: IndexError: no more"


PATH = Part(
    blocks=("features.0", "classifier.2"),
    trained=("classifier.2",),
    auxiliaries=("proxy@features.2..classifier.0",),
)


class OnPath:
    """All devices train the path, which stands for the model."""

    def init(self):
        return None

    def decide(self, view, state, decision):
        if view.dispatched:
            return Decision(), state
        plans = tuple(replace(view.new_plan(device), part=PATH) for device in view.devices)
        return Decision(plans=plans, path=PATH), state


def test_server_and_devices_evaluate_the_stages_that_stand_for_the_model(digits, of_type):
    config = load_config(digits(data={"test_share": 0.2}, evaluation={"where": "both"}))
    engine = Engine(config, OnPath())
    (*_, last) = of_type(engine.events(), Evaluated)
    assert last.stages == ("features.0", "proxy@features.2..classifier.0", "classifier.2")
    state, data = engine.server.tensors, engine.workload.data

    def accuracy(samples):
        """By the formulas of the three stages: a convolution, a linear map of its maps pooled to 4x4, and the head."""
        x = functional.conv2d(samples.x, state["features.0.weight"], state["features.0.bias"], padding=1).relu()
        x = functional.adaptive_avg_pool2d(x, 4).flatten(1)
        x = functional.linear(x, *(state[f"{PATH.auxiliaries[0]}.{kind}"] for kind in ("weight", "bias")))
        x = functional.linear(x, state["classifier.2.weight"], state["classifier.2.bias"])
        return float((x.argmax(dim=1) == samples.y).float().mean())

    assert last.server["accuracy"] == pytest.approx(accuracy(data.server_test()))
    shares = [accuracy(data.test(device)) for device in range(3)]
    assert last.devices["accuracy"]["mean"] == pytest.approx(sum(shares) / 3)
    assert (last.num_devices, last.num_failed) == (3, 0)
    before = engine.weights()
    engine.server.evaluate(config.training, batch_size=64, path=PATH)
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.weights().items())
    engine.close()


def test_the_evaluation_of_a_path_changes_nothing_else(digits, of_type):
    found = []
    for where in ("both", "none"):
        config = load_config(digits(data={"test_share": 0.2}, evaluation={"where": where}))
        engine = Engine(config, OnPath())
        found.append(of_type(engine.events(), RunEnded)[0].model_hash)
        engine.close()
    assert found[0] == found[1]
