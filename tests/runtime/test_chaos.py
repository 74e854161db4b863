"""Workers, partition hosts, the server and a node are killed at random moments; the result of the run is the same."""

import fedbonsai
import pytest
from fedbonsai.clusters.ray_backend.ray_cluster import start_local

from .chaos import CONFIG, survive
from .nodes import CPUS, QUICK, OtherNode

ROUNDS, KILLS = 30, 5


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("own_ray")
def test_a_run_survives_one_kill_of_each_kind_and_another():
    expected = fedbonsai.run(CONFIG | {"backend": "inline", "stop": {"rounds": ROUNDS}})
    list(expected)
    with start_local(num_cpus=CPUS, env_vars=QUICK) as cluster, OtherNode(cluster, num_cpus=CPUS) as node:
        killed, summary, _ = survive(seed=29, kills=KILLS, rounds=ROUNDS, node=node)
    assert sum(killed.values()) == KILLS
    assert {kind.split()[0] for kind in killed} == {"WorkerActor", "PartitionHostActor", "ServerActor", "Node"}
    outcomes = summary["outcomes"]
    assert outcomes["failed"] == outcomes["rejected"] == outcomes["out_of_memory"] == 0
    assert summary["accuracy"] > expected.summary["accuracy"] - 0.1
    if not outcomes["lost"]:  # no plan was killed three times
        assert summary["model_hash"] == expected.summary["model_hash"]
