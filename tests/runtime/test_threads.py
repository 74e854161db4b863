"""``threads``: every process that computes has so many torch threads."""

import fedbonsai
import pytest
import torch
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Evaluated

MODULE = """
import torch

def threads(output, target):
    return torch.full((len(target),), float(torch.get_num_threads()))

class Noting:
    '''Appends the number of threads, and the name of the process, to a file at every forward pass.'''

    def forward(self, x):
        with open("/proc/self/cmdline") as line, open(self.noted, "a") as file:
            file.write(f"{torch.get_num_threads()} {line.read().split(chr(0))[0]}\\n")
        return super().forward(x)

class Convolution(Noting, torch.nn.Conv2d):
    pass

class Linear(Noting, torch.nn.Linear):
    pass

def net(file, outputs=10):
    layers = Convolution(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), Linear(512, outputs)
    layers[0].noted = layers[-1].noted = file
    return torch.nn.Sequential(*layers)
"""
CONFIG = {
    "seed": 3,
    "model": "digits_cnn",
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}, "test_share": 0.2},
    "fleet": "laptop",
    "training": {"batch_size": 16},
    "evaluation": {"where": "both", "metrics": ["counting:threads"]},
    "stop": {"rounds": 1},
}


@pytest.fixture(autouse=True)
def counting_fixture(tmp_path, monkeypatch):
    """A module with a metric that counts the threads where it is computed."""
    (tmp_path / "counting.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def outcome(**changes):
    """The numbers of threads at the server and at the devices, and the summary."""
    run = fedbonsai.run(CONFIG | changes)
    (last,) = [event for event in run if isinstance(event, Evaluated)]
    return {"server": last.server["threads"], "devices": last.devices["threads"]["worst"]}, run.summary


@pytest.mark.parametrize("count", [1, 3])
def test_in_process_the_number_is_set_and_restored(count):
    before = torch.get_num_threads()
    found, _ = outcome(backend="inline", threads=count)
    assert found == {"server": count, "devices": count}
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("cluster")
def test_on_ray_server_and_workers_have_it_and_the_bits_are_those_in_process():
    there, on_ray = outcome(backend="ray", threads=2)
    here, in_process = outcome(backend="inline", threads=2)
    assert there == here == {"server": 2, "devices": 2}
    assert on_ray["model_hash"] == in_process["model_hash"]
    assert on_ray["workers"] == 1  # of two cores


@pytest.mark.usefixtures("cluster")
def test_on_ray_partition_host_and_distiller_have_it(tmp_path):
    noted = tmp_path / "noted"
    run = fedbonsai.run(
        CONFIG
        | {
            "model": {"name": "counting:net", "kwargs": {"file": str(noted)}},
            "data": CONFIG["data"] | {"public_share": 0.2},
            "fleet": "laptop",
            "policy": ["all", {"name": "splitfed", "cut": "0"}, {"name": "distillation", "steps": 2, "check_every": 1}],
            "evaluation": {"where": "server"},
            "backend": "ray",
            "threads": 2,
        }
    )
    assert [type(event).__name__ for event in run].count("TaskEnded") == 1
    processes = {line.split()[1].partition(".")[0]: line.split()[0] for line in noted.read_text().splitlines()}
    for actor in ("ServerActor", "WorkerActor", "PartitionHostActor", "DistillerActor"):
        assert processes[f"ray::{actor}"] == "2", processes


def test_a_process_under_limits_has_it():
    found, _ = outcome(backend="inline", threads=2, memory={"enforce": True, "probe": False})
    assert found == {"server": 2, "devices": 2}


def test_kernels_and_memory_are_measured_on_one_thread():
    settings = {"threads": 2, "kernels": {"sparse": "auto"}, "training": {"sparsity": {"weights": 0.9}}}
    with pytest.raises(ConfigError, match=r"threads is 2, and kernels.sparse is 'auto', .*; allowed: 1"):
        load_config(settings)
    with pytest.raises(ConfigError, match=r"threads is 2, and what plans need is measured on one thread"):
        load_config({"threads": 2, "memory": {"enforce": True}})
    with pytest.raises(ConfigError, match="threads is 0; it must be a whole number >= 1"):
        load_config({"threads": 0})
