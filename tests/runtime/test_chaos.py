"""Twenty seconds of chaos: workers, partition hosts, the server and a node are killed at random; the run comes out the same."""

import fedbonsai
import pytest
from fedbonsai.clusters.ray_cluster import start_local

from .chaos import CONFIG, survive
from .nodes import CPUS, QUICK, OtherNode

ROUNDS = 45


@pytest.mark.usefixtures("own_ray")
def test_a_run_survives_twenty_seconds_of_kills():
    expected = fedbonsai.run(CONFIG | {"backend": "inline", "stop": {"rounds": ROUNDS}})
    list(expected)
    with start_local(num_cpus=CPUS, env_vars=QUICK) as cluster, OtherNode(cluster, num_cpus=CPUS) as node:
        killed, summary, _ = survive(seed=29, seconds=20, rounds=ROUNDS, node=node)
    assert sum(killed.values()) >= 3, killed
    assert any(kind.startswith("Node") for kind in killed), killed
    assert summary["accuracy"] > 0.85
    outcomes = summary["outcomes"]
    assert outcomes["failed"] == outcomes["rejected"] == outcomes["out_of_memory"] == 0
    if not outcomes["lost"]:  # no plan was killed three times
        assert summary["model_hash"] == expected.summary["model_hash"]
