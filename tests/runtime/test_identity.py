"""Identities: settings that must not change a bit, and one run whose figures are fixed."""

import fedbonsai
import pytest
import torch
from fedbonsai.learning.seeds import derive
from fedbonsai.learning.training.training import train
from fedbonsai.learning.workload import Workload
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.errors import ConfigError

ONE = {
    "classes": [
        {
            "name": "one",
            "count": 1,
            "flop_per_s": 1e9,
            "memory_bytes": 10**9,
            "up_bytes_per_s": 1e6,
            "down_bytes_per_s": 1e6,
        }
    ]
}


def finished(config, **more):
    run = fedbonsai.run(config, **more)
    for _ in run:
        pass
    return run


def hash_of(config, **more):
    return finished(config, **more).summary["model_hash"]


@pytest.fixture(name="fedavg", scope="module")
def fedavg_fixture():
    """The configuration with which the others are compared, and its hash.

    Each device is half as fast as the one before, so that updates arrive in one order whatever their size: sums of float32
    in another order differ in the last bits.
    """
    link = {"memory_bytes": 10**9, "up_bytes_per_s": 10**9, "down_bytes_per_s": 10**9}
    fleet = {"classes": [{"name": f"c{i}", "flop_per_s": 1e9 / 2**i} | link for i in range(6)]}
    config = {"backend": "inline", "seed": 5, "fleet": fleet, "training": {"epochs": 2}, "stop": {"rounds": 2}}
    return config, hash_of(config)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(fedavg):
    config, expected = fedavg
    assert hash_of(config) == expected
    assert hash_of(config | {"seed": 6}) != expected


@pytest.mark.parametrize(
    "settings",
    [
        ["policy=[{name: all}]"],  # a cohort of 1.0 chooses all devices
        ["policy=[{name: deadline, deadline_s: 1.0e+6}]"],
        ["codecs.up=lz4", "codecs.down=lz4"],
        ["codecs.up=sparse", "codecs.down=[{name: sparse, coder: none}]"],
        ["codecs.up=[{name: topk, density: 1, scope: tensor, by: reference}, sparse]"],
        ["codecs.up=[{name: lz4, level: 3}]"],
        ["codecs.up=[identity, lz4]"],
        ["evaluation.where=none"],
        ["training.optimiser.proximal=0"],
        ["server.optimiser={name: momentum, momentum: 0}"],
        ["schedule.name=step", "schedule.milestones=[]"],
        ["fleet.classes.0.flop_per_s=1.0e+12"],
        ["evaluation.every=2"],
        ["name=other"],
    ],
    ids=lambda settings: settings[0].partition("=")[0] + "-" + str(len(settings[0])),
)
def test_these_change_nothing(fedavg, settings):
    config, expected = fedavg
    assert hash_of(config, settings=settings) == expected


@pytest.mark.parametrize(
    "settings", [["training.optimiser.proximal=0.1"], ["policy.0.cohort=0.5"], ["server.optimiser.learning_rate=0.5"]]
)
def test_these_change_the_model(fedavg, settings):
    config, expected = fedavg
    assert hash_of(config, settings=settings) != expected


def test_fedprox_without_its_term_is_fedavg(fedavg):
    config, expected = fedavg
    assert hash_of(config, preset="fedprox", settings=["training.optimiser.proximal=0"]) == expected
    assert hash_of(config, preset="fedprox") != expected


def test_one_device_is_plain_local_training():
    """Three rounds of one device are three runs of plain training, each from the weights of the one before.

    Not bit for bit: the server adds the float32 difference that the device subtracted, which rounds twice.
    """
    config = fedbonsai.load_config(
        {"backend": "inline", "fleet": ONE, "training": {"batch_size": 128}, "stop": {"rounds": 3}}
    )
    run = finished(config)
    workload = Workload(workload_settings(config, num_devices=1))
    model, samples = workload.new_model(), workload.data.train(0)
    for version in range(3):
        train(
            model,
            samples,
            training=config.training,
            loss=torch.nn.functional.cross_entropy,
            transform=workload.data.train_transform,
            seed=derive(config.seed, "plan", 0, version),
        )
    for name, tensor in run.weights().items():
        assert torch.allclose(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-6), name


def test_one_device_is_plain_torch():
    """The same with torch's own optimiser and loop; only the order of the batches is this library's."""
    from fedbonsai.learning.data.batches import batches

    training = {"batch_size": 100, "optimiser": {"learning_rate": 0.1, "momentum": 0.0}}
    config = fedbonsai.load_config({"backend": "inline", "fleet": ONE, "training": training, "stop": {"rounds": 1}})
    run = finished(config)
    workload = Workload(workload_settings(config, num_devices=1))
    model, samples = workload.new_model().train(), workload.data.train(0)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for indices in batches(len(samples), batch_size=100, seed=derive(config.seed, "plan", 0, 0), epochs=1):
        batch = samples.take(indices)
        optimiser.zero_grad()
        inputs = workload.data.train_transform(batch.x, torch.Generator())
        torch.nn.functional.cross_entropy(model(inputs), batch.y).backward()
        optimiser.step()
    for name, tensor in run.weights().items():
        assert torch.allclose(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-6), name


def test_fedavg_by_hand():
    """Two devices, one round: the weights are the mean of theirs, weighted by samples."""
    fleet = {"classes": [ONE["classes"][0] | {"count": 2}]}
    partition = {"name": "dirichlet", "alpha": 0.5}
    config = fedbonsai.load_config(
        {"backend": "inline", "seed": 2, "fleet": fleet, "data": {"partition": partition}, "stop": {"rounds": 1}}
    )
    run = finished(config)
    workload = Workload(workload_settings(config, num_devices=2))
    states, counts = [], []
    for device in range(2):
        model, samples = workload.new_model(), workload.data.train(device)
        train(
            model,
            samples,
            training=config.training,
            loss=torch.nn.functional.cross_entropy,
            transform=workload.data.train_transform,
            seed=derive(2, "plan", device, 0),
        )
        states.append(model.state_dict())
        counts.append(len(samples))
    assert counts[0] != counts[1]
    for name, tensor in run.weights().items():
        mean = (states[0][name] * counts[0] + states[1][name] * counts[1]) / sum(counts)
        assert torch.allclose(tensor, mean, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("codecs", [{}, {"up": "lz4", "down": "lz4"}])
def test_running_statistics_are_sent_and_averaged(codecs):
    config = statistics("average") | {"codecs": codecs}
    run = finished(config)
    statistic = {name: tensor for name, tensor in run.weights().items() if "running" in name}
    assert set(statistic) == {"running_mean", "running_var"}
    start = Workload(workload_settings(run.config, num_devices=1)).new_model().state_dict()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in statistic.items())


def test_with_batch_statistics_none_are_sent():
    average, batch = finished(statistics("average")), finished(statistics("batch"))
    assert not [name for name in batch.weights() if "running" in name]
    assert set(batch.weights()) == {"weight", "bias"}
    saved = average.summary["up_by_kind"]["weights"] - batch.summary["up_by_kind"]["weights"]
    assert saved == 2 * 4 * 4


def statistics(mode):
    return {
        "backend": "inline",
        "model": {"name": "torch.nn:BatchNorm1d", "kwargs": {"num_features": 4}},
        "data": {"name": "synthetic", "kwargs": {"shape": [4], "classes": 4, "samples_per_device": 200}},
        "fleet": ONE,
        "server": {"statistics": mode},
        "training": {"batch_size": 64},
        "stop": {"rounds": 1},
    }


GOLDEN = {
    "backend": "inline",
    "seed": 1,
    "fleet": "laptop",
    "data": {"partition": {"name": "dirichlet", "alpha": 1.0}},
    "training": {"batch_size": 16, "epochs": 2, "optimiser": {"learning_rate": 0.05, "momentum": 0.9}},
    "stop": {"rounds": 3},
}


def test_golden_run():
    """Figures that a refactoring must not change. The hash may differ between kinds of CPU; these figures did not so far."""
    run = finished(GOLDEN)
    summary = run.summary
    assert round(summary["accuracy"], 4) == 0.9472
    assert summary["virtual_s"] == pytest.approx(4.070448768, rel=1e-12)
    assert summary["up_by_kind"]["weights"] == summary["down_by_kind"]["weights"] == 3 * 8 * 153192
    assert summary["data"] == {"data": "7613305b16a60a99e17eaae9290a9af3", "split": "1dd60983a2a7b4dbed1f74492a124440"}
    assert hash_of(GOLDEN) == summary["model_hash"]


def test_sparse_updates_with_a_sparse_downlink():
    """A selection by the trained weights, and a model that is sent down without loss: the same bits, in fewer bytes."""
    up = "codecs.up=[{name: topk, density: 0.1, scope: tensor, by: reference}, float16, sparse]"
    policy = "policy=[{name: random, cohort: 3}]"
    config = {"backend": "inline", "seed": 5, "stop": {"rounds": 3}}
    dense = finished(config, settings=[policy]).summary
    found = [finished(config, settings=[policy, up, *down]).summary for down in ([], ["codecs.down=sparse"])]
    assert found[0]["model_hash"] == found[1]["model_hash"] != dense["model_hash"]
    assert found[1]["down_bytes"] < 0.95 * found[0]["down_bytes"]
    assert found[0]["up_bytes"] < 0.2 * dense["up_bytes"]


@pytest.mark.parametrize("settings", [["codecs.down=[{name: topk, density: 0.1, by: reference}]"]])
def test_a_selection_by_the_trained_weights_on_the_downlink_is_refused(settings):
    with pytest.raises(ConfigError, match=r"^codecs\.down: by is 'reference', which selects by the trained weights"):
        finished({"backend": "inline"}, settings=settings)
