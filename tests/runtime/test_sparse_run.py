"""Sparse training, whole runs: its identities, and one evaluation through every door."""

import json

import fedbonsai
import pytest
import torch
from fedbonsai.learning.models.cnn import digits_cnn
from fedbonsai.learning.sparse.kernels import native
from fedbonsai.learning.spec import Call
from fedbonsai.learning.training.evaluation import evaluate
from fedbonsai.learning.training.losses import accuracy, make_loss
from fedbonsai.learning.workload import Workload
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Evaluated, Notice, PlanEnded, RunStarted
from safetensors.torch import load_file

from .resuming import started

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**7, "down_bytes_per_s": 10**7}
BASE = {
    "backend": "inline",
    "seed": 4,
    "data": {"name": "digits"},
    "fleet": {
        "classes": [{"name": f"c{i}", "flop_per_s": 1e9 / 2**i} | LINK for i in range(4)],
        "hosts": {"count": 1, "flop_per_s": 1e9},
    },
    "training": {"batch_size": 16, "steps": 8, "optimiser": {"learning_rate": 0.05}},
    "stop": {"rounds": 3},
}


def sparse(weights=0.9, **changes):
    sparsity = {"weights": weights, "activations": weights, "period": 3} | changes
    return BASE | {"training": BASE["training"] | {"sparsity": sparsity}}


def finished(config, *settings, **more):
    """A finished run, and its events."""
    run = fedbonsai.run(config, settings=list(settings), **more)
    return run, list(run)


def hash_of(config, *settings):
    return finished(config, *settings)[0].summary["model_hash"]


def test_a_sparsity_of_0_is_fedavg():
    assert hash_of(sparse(0.0)) == hash_of(BASE)
    assert hash_of(sparse(0.9)) != hash_of(BASE)


@pytest.mark.parametrize("rule", ["top_weights", "diff_top_weights", "top_diff"])
def test_a_mask_ratio_as_large_as_the_sparsity_sends_everything(rule):
    policy = [{"name": "all"}, {"name": "zerofl", "rule": rule, "ratios": [0.9], "value_bits": 32}]
    whole = [{"name": "all"}, {"name": "zerofl", "rule": "all"}]
    assert hash_of(sparse() | {"policy": policy}) == hash_of(sparse() | {"policy": whole})


def test_both_legs_of_a_cut_model_train_as_the_whole_model_does():
    cut = [{"name": "all"}, {"name": "splitfed", "cut": "features.2"}]
    assert hash_of(sparse() | {"policy": cut}) == hash_of(sparse())


def test_a_window_of_2_is_carried_out_and_reproduced():
    """Forward passes run ahead of the steps, so that thresholds are those of an earlier step."""
    cut = [{"name": "all"}, {"name": "splitfed", "cut": "features.2", "window": 2}]
    first = hash_of(sparse() | {"policy": cut})
    assert first == hash_of(sparse() | {"policy": cut})
    assert first != hash_of(sparse())


@pytest.fixture(scope="module", name="trained")
def trained_fixture(tmp_path_factory):
    """A run whose model is trained at 90 %, evaluated on the server and on the devices, and its folder."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = sparse(period=10) | {"data": {"name": "digits", "test_share": 0.2}, "evaluation": {"where": "both"}}
    run, events = finished(config, "training.steps=null", "training.epochs=3", "stop.rounds=8", out=folder)
    return run, [event for event in events if isinstance(event, Evaluated)], folder


def test_the_model_evaluates_the_same_through_every_door(trained):
    run, evaluations, folder = trained
    workload = Workload(workload_settings(run.config, num_devices=4))
    on_server, on_devices = evaluations[-1].server, evaluations[-1].devices
    assert on_server["accuracy"] > 0.6

    def figures(model, samples):
        loss, transform = make_loss(Call("cross_entropy")), workload.data.test_transform
        return evaluate(model, samples, loss=loss, metrics={"accuracy": accuracy}, transform=transform)

    test = workload.data.server_test()
    assert test is not None
    plain = digits_cnn()
    plain.load_state_dict(load_file(folder / "final.safetensors"))
    for model in (run.model(), plain):
        found = figures(model, test)
        assert found["accuracy"] == pytest.approx(on_server["accuracy"])
        assert found["loss"] == pytest.approx(on_server["loss"], rel=1e-5)

    shares = [workload.data.test(device) for device in range(4)]
    counted = [(figures(run.model(), share)["accuracy"], len(share)) for share in shares if share is not None]
    mean = sum(value * count for value, count in counted) / sum(count for _, count in counted)
    assert mean == pytest.approx(on_devices["accuracy"]["mean"])

    # With all its weights, the model is another one.
    plain.load_state_dict(load_file(folder / "final.master.safetensors"))
    assert abs(figures(plain, test)["loss"] - on_server["loss"]) > 0.01


def test_exported_weights_are_thresholded_and_the_dense_ones_are_beside_them(trained):
    run, _, folder = trained
    exported, master = load_file(folder / "final.safetensors"), load_file(folder / "final.master.safetensors")
    for name in ("features.2.weight", "classifier.0.weight"):
        share = float((exported[name] != 0).float().mean())
        assert 0.1 <= share < 0.11
        assert float((master[name] != 0).float().mean()) > 0.9
        assert torch.equal(exported[name][exported[name] != 0], master[name][exported[name] != 0])
    for name in exported.keys() - {"features.2.weight", "classifier.0.weight"}:
        assert torch.equal(exported[name], master[name])
    assert all(torch.equal(run.weights("final.master")[name], master[name]) for name in master)
    assert torch.equal(run.model().state_dict()["features.2.weight"], exported["features.2.weight"])


def test_a_plan_of_another_sparsity_is_evaluated_at_that_of_the_run():
    policy = [{"name": "all"}, {"name": "zerofl", "rule": "all", "levels": [0.5]}]
    run, events = finished(sparse() | {"policy": policy})
    plans = [event.report.plan for event in events if isinstance(event, PlanEnded)]
    assert {plan.training.sparsity.weights for plan in plans} == {0.5}
    assert float((run.weights()["classifier.0.weight"] != 0).float().mean()) < 0.11


def test_mask_ratios_above_the_sparsity_count_as_the_sparsity_and_this_is_told_once():
    policy = [{"name": "all"}, {"name": "zerofl", "ratios": [0.5]}]
    _, events = finished(sparse(0.3) | {"policy": policy})
    told = [event.text for event in events if isinstance(event, Notice) and "ratios holds" in event.text]
    assert told == [
        "ratios holds 0.5, above the sparsity 0.3: it counts as 0.3, and updates at that sparsity are sent whole"
    ]


def test_the_policy_needs_sparse_layers():
    with pytest.raises(ConfigError, match=r"training\.sparsity is null; policy\[1\] \(zerofl\) trains sparse layers"):
        fedbonsai.run(BASE | {"policy": [{"name": "all"}, {"name": "zerofl"}]})


def test_a_device_gets_the_lowest_sparsity_and_the_largest_ratio_that_its_deadline_allows():
    slow = {"name": "slow", "flop_per_s": 1e9, "up_bytes_per_s": 2e4}
    fleet = {"classes": [{"name": "fast", "flop_per_s": 1e9, "count": 2} | LINK, LINK | slow]}
    zerofl = {"name": "zerofl", "ratios": [0.0, 0.2, 0.5]}
    _, events = finished(sparse() | {"fleet": fleet, "policy": [{"name": "all"}, zerofl]}, "stop.rounds=1")
    shares = {
        event.report.plan.device: event.report.plan.codec_up[0].options["density"]
        for event in events
        if isinstance(event, PlanEnded)
    }
    assert shares == {0: 0.6, 1: 0.6, 2: 0.1}


@pytest.fixture(scope="module", name="native_library")
def native_library_fixture():
    if reason := native.build():
        pytest.skip(reason)


WIDE = {"model": {"name": "small", "kwargs": {"in_channels": 1, "image_size": 8}}}
MEASURED = sparse() | WIDE | {"kernels": {"sparse": "auto"}, "checkpoint": {"share": None}}


@pytest.mark.usefixtures("native_library")
def test_a_resumed_run_has_the_kernels_that_were_measured_before_its_first_round(tmp_path):
    whole, events = finished(MEASURED, "stop.rounds=4", out=tmp_path / "whole")
    table = json.loads((tmp_path / "whole" / "measured.json").read_text())["kernels"]
    assert sorted(table) == ["classifier.0 at 0.9, 0.9", "features.3 at 0.9, 0.9"]
    assert any("native" in row.get("kernels", ()) for row in table.values())
    assert [event.measured["kernels"] for event in events if isinstance(event, RunStarted)] == [table]
    (notice,) = [
        e.text for e in events if isinstance(e, Notice) and e.text.startswith("sparse products by the kernels")
    ]
    assert "native" in notice

    kept = MEASURED | {"kernels": {"sparse": "auto", "table": table}}
    started(kept | {"stop": {"rounds": 4}}, tmp_path / "run", stops=2)
    run = fedbonsai.run(kept | {"stop": {"rounds": 4}}, resume=tmp_path / "run")
    list(run)
    assert run.summary["model_hash"] == whole.summary["model_hash"]
    assert json.loads((tmp_path / "run" / "measured.json").read_text())["kernels"] == table


@pytest.mark.usefixtures("native_library")
def test_the_clock_charges_what_the_kernels_were_measured_to_take():
    """Products that take half as long count half; with dense kernels sparse training takes as long as dense training."""
    rows = ("features.3", "classifier.0")

    def flops(times):
        row = {"kernels": ["native"] * 3, "times": [times] * 3}
        table = {f"{name} at 0.9, 0.9": row for name in rows}
        _, events = finished(MEASURED | {"kernels": {"sparse": "auto", "table": table}}, "stop.rounds=1")
        return next(event.report.virtual.flops for event in events if isinstance(event, PlanEnded))

    _, events = finished(BASE | WIDE, "stop.rounds=1")
    dense = next(event.report.virtual.flops for event in events if isinstance(event, PlanEnded))
    whole, half, none = (flops(times) for times in (1.0, 0.5, 0.0))
    assert whole == dense
    assert half == pytest.approx((whole + none) / 2, rel=1e-6)
    assert none < 0.2 * whole


def test_kernels_are_measured_for_sparse_layers_only():
    with pytest.raises(ConfigError, match=r"kernels\.sparse is 'auto', and training\.sparsity is null"):
        fedbonsai.run(BASE | {"kernels": {"sparse": "auto"}})
