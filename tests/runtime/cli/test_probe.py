from pathlib import Path

import pytest
import torch
import yaml
from fedbonsai.clusters.fleet import load_fleet
from fedbonsai.runtime.cli.probe import Measurement, available_memory_bytes, probe, render_yaml


def test_measures_a_training_and_leaves_torch_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = probe(seconds=0.05, threads=1, batch_size=4)
    assert found.flop_per_s > 0
    assert found.bf16_gain > 0
    assert found.steps >= 2
    assert (found.threads, found.batch_size) == (1, 4)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_its_output_loads_as_a_fleet() -> None:
    found = Measurement(
        flop_per_s=52.34e9, bf16_gain=1.7, memory_bytes=8_000_000_000, threads=1, batch_size=32, steps=9
    )
    text = render_yaml(found)
    fleet = load_fleet(yaml.safe_load(text))
    (profile,) = fleet.profiles()
    assert profile.name == "this-machine"
    assert profile.flop_per_s == 52.3e9
    assert profile.memory_bytes == 8_000_000_000
    assert "in bf16 1.70 times as much" in text
    assert text.count("NOT MEASURED") == 3


@pytest.mark.parametrize("memory_bytes", [123_456_789_012, 1_234, 999_999_999])
def test_any_amount_of_memory_is_printed_so_that_it_loads(memory_bytes: int) -> None:
    found = Measurement(flop_per_s=1.0, bf16_gain=0.1, memory_bytes=memory_bytes, threads=1, batch_size=1, steps=2)
    (profile,) = load_fleet(yaml.safe_load(render_yaml(found))).profiles()
    assert profile.memory_bytes == pytest.approx(memory_bytes, rel=0.01)


def test_a_system_whose_memory_is_unknown() -> None:
    found = Measurement(flop_per_s=1e9, bf16_gain=1.0, memory_bytes=None, threads=1, batch_size=1, steps=2)
    assert "memory_bytes: 1 GB  # ASSUMPTION" in render_yaml(found)
    load_fleet(yaml.safe_load(render_yaml(found)))


def test_memory_within_the_control_groups_limit(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal:  8 kB\nMemAvailable:    4 kB\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("3000\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 2000
    (tmp_path / "memory.max").write_text("500\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 0
