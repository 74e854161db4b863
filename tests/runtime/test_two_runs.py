"""Two runs in one process: each gives its result as if alone, in turn and in threads, and the process is not changed."""

import threading

import fedbonsai
import pytest
import torch

from .processes import LIMIT_S

MODEL = """
import torch
from torch import nn

class Dropping(nn.Module):
    '''Draws from the shared generator in every step.'''

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(64, 32), nn.Linear(32, num_classes), nn.Dropout(0.5)

    def forward(self, x):
        return self.b(self.drop(self.a(x.flatten(1)).relu()))
"""


@pytest.fixture(name="configs")
def configs_fixture(tmp_path, monkeypatch):
    (tmp_path / "dropping_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    base = {"backend": "inline", "model": {"name": "dropping_model:Dropping"}, "stop": {"rounds": 3}}
    return [base | {"seed": 1}, base | {"seed": 2, "preset": "splitfed"}]


def alone(config):
    with fedbonsai.run(config) as run:
        list(run)
    return run.summary["model_hash"]


def test_interleaved_runs_give_the_results_of_single_runs(configs):
    expected = [alone(config) for config in configs]
    torch.set_num_threads(2)
    try:
        drawn = torch.default_generator.get_state()
        first, second = (fedbonsai.run(config) for config in configs)
        next(first)
        next(second)
        torch.manual_seed(99)  # by the caller, between events
        torch.default_generator.set_state(drawn)
        list(first)
        first.close()
        assert torch.get_num_threads() == 2
        list(second)
        second.close()
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.default_generator.get_state(), drawn)
    finally:
        torch.set_num_threads(1)
    assert [run.summary["model_hash"] for run in (first, second)] == expected


def test_runs_in_threads_give_the_results_of_single_runs(configs):
    expected = [alone(config) for config in configs]
    found = {}
    threads = [
        threading.Thread(target=lambda number=number, config=config: found.update({number: alone(config)}))
        for number, config in enumerate(configs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=LIMIT_S)
    assert [found.get(number) for number in range(2)] == expected
