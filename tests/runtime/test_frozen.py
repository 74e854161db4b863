"""Parameters that the model's author has frozen keep their values, and are neither trained nor sent, with every method."""

import shutil
from pathlib import Path

import fedbonsai
import pytest
import torch
from fedbonsai.learning.costs.cost import part_cost
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.part import whole
from fedbonsai.learning.parts.submodel import compile_part
from fedbonsai.learning.spec import Training
from fedbonsai.learning.training.pretraining import Recipe
from fedbonsai.runtime.cli.pretrain import pretrain
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import Evaluated, PlanEnded, RunStarted
from safetensors.torch import load_file
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"

MODEL = """
import os
import torch
from torch import nn

class Partly(nn.Module):
    '''Images of 8 x 8: a convolution and normalisation that are frozen, one that is trained, a head whose bias is frozen.'''

    def __init__(self, num_classes, frozen=("a", "na", "out.bias")):
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.out = nn.Linear(4 * 64, num_classes)
        for name, parameter in self.named_parameters():
            if any(name == each or name.startswith(each + ".") for each in frozen):
                parameter.requires_grad_(False)

    def forward(self, x):
        x = self.nb(self.b(self.na(self.a(x)).relu())).relu()
        return self.out(x.flatten(1))

made = []

def other_each_time(num_classes):
    '''Not the same frozen tensors on server and device.'''
    model = Partly(num_classes)
    with torch.no_grad():
        model.a.bias.fill_(len(made))
    made.append(1)
    return model
"""

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**9, "down_bytes_per_s": 10**9}
BASE = {
    "backend": "inline",
    "seed": 5,
    # Each device is far slower than the one before, so that the order of arrival is always the same.
    "fleet": {"classes": [{"name": f"c{i}", "flop_per_s": 1e9 / 4**i} | LINK for i in range(3)]},
    "model": {"name": "partly:Partly"},
    "stop": {"rounds": 2},
}
TRAINED = {"b.weight": 144, "b.bias": 4, "nb.weight": 4, "nb.bias": 4, "out.weight": 2560}
STATISTICS = {"nb.running_mean": 4, "nb.running_var": 4}
FROZEN = {"a.weight": 36, "a.bias": 4, "na.weight": 4, "na.bias": 4, "out.bias": 10}
PAYLOAD = 4 * (sum(TRAINED.values()) + sum(STATISTICS.values()))


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "partly.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))


def finished(**changes):
    run = fedbonsai.run(BASE | changes)
    events = list(run)
    ended = [event.report for event in events if isinstance(event, PlanEnded)]
    assert [report.error for report in ended if report.error] == []
    return run, events, ended


def start():
    return fedbonsai.run(BASE | {"stop": {"rounds": 0}})


METHODS = {
    "fedavg": {},
    "adam, proximal": {"training": {"optimiser": {"name": "adam", "learning_rate": 0.01, "proximal": 0.1}}},
    "momentum at the server": {"server": {"optimiser": {"name": "momentum"}}},
    "residuals": {"preset": "resfed"},
    "weights in batches": {"training": {"batch_size": 16, "accumulation": 2, "layout": "channels_last"}},
    "cut behind what is frozen": {"policy": [{"name": "all"}, {"name": "splitfed", "cut": "a"}]},
    "a window": {"policy": [{"name": "all"}, {"name": "splitfed", "cut": "a", "window": 3}]},
    "a shared head": {"policy": [{"name": "all"}, {"name": "splitfed", "cut": "b", "head": "shared"}]},
    "a local loss": {"policy": [{"name": "all"}, {"name": "local_loss", "cut": "a"}]},
    "a frozen trunk": {"preset": "ecofed"},
}


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_keep_their_values_and_the_others_are_trained(method):
    built = start()
    list(built)
    before, (run, _, _) = built.weights(), finished(**METHODS[method])
    after = run.weights()
    changed = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    assert not changed & {*FROZEN, "na.running_mean", "na.running_var"}
    trained = TRAINED if method != "a frozen trunk" else {"out.weight"}
    assert {name for name in changed if "num_batches" not in name} >= set(trained)
    model = run.model()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(FROZEN)


def test_split_anywhere_it_is_fedavg_bit_for_bit():
    (expected, _, _) = finished()
    for block in ("a", "b"):
        run, _, _ = finished(policy=[{"name": "random", "cohort": 1.0}, {"name": "splitfed", "cut": block}])
        assert run.summary["model_hash"] == expected.summary["model_hash"], block


def test_only_trained_parameters_are_sent_and_the_run_reports_how_many_are_frozen():
    run, events, ended = finished()
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert (started.parameters, started.frozen_parameters) == (
        sum({**TRAINED, **FROZEN}.values()),
        sum(FROZEN.values()),
    )
    assert run.summary["frozen_parameters"] == sum(FROZEN.values()) == 58
    # 48 bytes of fixed fields, 8 of header, 8 of checksum.
    for way in ("up", "down"):
        assert run.summary[f"{way}_by_kind"]["weights"] == len(ended) * (PAYLOAD + 64)
    assert {report.virtual.up_bytes for report in ended} == {PAYLOAD + 64}


def test_a_completely_frozen_front_has_no_packet_down():
    run, _, ended = finished(policy=[{"name": "all"}, {"name": "splitfed", "cut": "a"}])
    assert run.summary["down_by_kind"].get("weights", 0) == 0
    assert all(report.plan.part.blocks == ("a",) for report in ended)


def test_evaluation_on_devices_sends_nothing_that_is_frozen():
    run, _, _ = finished(data={"test_share": 0.2}, evaluation={"where": "devices"}, stop={"rounds": 1})
    # A plan of some 100 bytes in addition to the packet.
    assert 3 * (PAYLOAD + 64) < run.summary["down_by_kind"]["evaluation"] < 3 * (PAYLOAD + 64 + 200)


def test_frozen_layers_need_no_gradients_nor_slots_and_no_backward_flops():
    class Two(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.a, self.b = nn.Linear(100, 100, bias=False), nn.Linear(100, 10, bias=False)
            self.a.weight.requires_grad_(not frozen)

        def forward(self, x):
            return self.b(self.a(x))

    def cost(frozen):
        blocks = cut(Two(frozen))
        example = torch.zeros(100), torch.zeros((), dtype=torch.int64)
        loss, training = nn.functional.cross_entropy, Training(batch_size=2)
        return part_cost(compile_part(whole(blocks.spec), blocks), example=example, training=training, loss=loss)

    free, frozen = cost(False), cost(True)
    forward = 2 * (100 * 100 + 100 * 10)
    assert free.forward_flops == frozen.forward_flops == forward
    # The weight gradient of the first layer; without it the input gradient of the second is not needed either.
    assert free.training_flops == forward + 2 * 100 * 100 + 2 * 2 * 100 * 10
    assert frozen.training_flops == forward + 2 * 100 * 10
    # Less by a gradient and a momentum buffer of the first layer's 40,000 bytes.
    assert free.peak_memory_bytes - frozen.peak_memory_bytes > 0.99 * 2 * 40_000


def test_devices_with_other_frozen_tensors_are_rejected_with_the_reason():
    with pytest.raises(
        RunError, match=r"OutOfSync: the frozen tensors of this model are \w{16} here, where the plan names \w{16}"
    ):
        finished(model={"name": "partly:other_each_time"})


def test_a_model_without_trained_parameters_is_refused():
    frozen = ["a", "na", "b", "nb", "out"]
    with pytest.raises(
        ConfigError, match=r"model: all 2,774 parameters are frozen \(requires_grad is False\); at least one"
    ):
        finished(model={"name": "partly:Partly", "kwargs": {"frozen": frozen}})


def test_adapters_on_a_pretrained_base_cost_their_own_bytes(tmp_path, monkeypatch):
    """The example: 2,600 of 40,882 parameters are trained, and only these are sent."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    digits = load_config("examples/digits.yaml", settings=["data.public_share=0.2"])
    pretrain(digits, out=tmp_path / "base.safetensors", recipe=Recipe(epochs=8))
    with fedbonsai.run("examples/adapters.yaml", backend="inline", settings=["stop.rounds=3"]) as run:
        events = list(run)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert (started.parameters, started.frozen_parameters) == (40_882, 38_282)
    assert started.init["random"].split(", ") == [f"classifier.{n}.lora_{ab}" for n in (0, 2) for ab in "ab"]
    assert run.summary["up_by_kind"]["weights"] == run.summary["down_by_kind"]["weights"] == 3 * 8 * (4 * 2600 + 64)
    weights, base = run.weights(), load_file(tmp_path / "base.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.items())
    losses = [event.figures["loss"] for event in events if isinstance(event, Evaluated)]
    assert losses[-1] < losses[0]
