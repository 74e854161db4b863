"""An object store that is too small for what is under way, on a disk without room: one sentence says what to do."""

import fedbonsai
import pytest
from fedbonsai.clusters.ray_backend.ray_cluster import start_local
from fedbonsai.runtime.errors import RunError

# 30 MB a packet; one down, and eight up, of which some wait at a time.
WIDE = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2700), nn.ReLU(), nn.Linear(2700, 2700), nn.ReLU(), nn.Linear(2700, 10))
"""
LINK = {"memory_bytes": 10**10, "up_bytes_per_s": 10**9, "down_bytes_per_s": 10**9}
CONFIG = {
    "backend": "ray",
    "workers": 2,
    "model": {"name": "wide:make"},
    "fleet": {"classes": [{"name": "board", "count": 8, "flop_per_s": 1e9} | LINK]},
    "data": {"name": "synthetic", "kwargs": {"shape": [1, 8, 8], "samples_per_device": 2, "test_samples": 2}},
    "training": {"batch_size": 2},
    "evaluation": {"where": "none"},
    "stop": {"rounds": 1},
}
FULL_DISK = {  # to Ray, a disk is full when it holds anything; and it gives up after 1 s instead of 10
    "RAY_local_fs_capacity_threshold": "0.000001",
    "RAY_local_fs_monitor_interval_ms": "100",
    "RAY_oom_grace_period_s": "1",
}


@pytest.fixture
def wide(tmp_path, monkeypatch):
    (tmp_path / "wide.py").write_text(WIDE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.soak
@pytest.mark.usefixtures("wide", "own_ray")
def test_where_it_cannot_spill_the_run_ends_in_one_sentence():
    full = r"^the object store is full, and the disk to which Ray spills .*; increase ray\.object_store_bytes"
    with (
        start_local(num_cpus=2, object_store_bytes=80 * 10**6, env_vars=FULL_DISK),
        pytest.raises(RunError, match=full),
    ):
        list(fedbonsai.run(CONFIG))
