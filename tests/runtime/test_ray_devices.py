"""Real devices as nodes of a cluster: a board that is missing, joins, leaves in mid-plan, and joins again."""

import time
from collections import Counter
from itertools import pairwise

import fedbonsai
import pytest
import ray
from fedbonsai.clusters.ray_backend.ray_cluster import start_local
from fedbonsai.runtime.errors import RunError
from fedbonsai.runtime.events import Notice, PlanEnded, VersionClosed

from .nodes import QUICK, OtherNode, Trap

FIGURES = {"flop_per_s": 1e9, "memory_bytes": 10**9, "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}
REAL = FIGURES | {"name": "board", "label_selector": {"board": "rpi4"}, "join_timeout_s": 2}
BOARD = 3
NAME = f"device {BOARD} (class board)"
CONFIG = {
    "seed": 3,
    "clock": "wall",
    "preset": "resfed",
    "policy": [{"name": "random", "cohort": 1.0}, {"name": "residuals"}],
    "fleet": {"classes": [FIGURES | {"name": "simulated", "count": 3}, REAL]},
    "training": {"loss": Trap.LOSS},
    "server": {"statistics": "batch"},
    "evaluation": {"where": "none"},
    "stop": {"rounds": 100_000},
}


@pytest.fixture(scope="module", autouse=True)
def head(own_ray):
    with start_local(num_cpus=2, env_vars=QUICK) as cluster:
        yield cluster


@pytest.fixture
def board(head):
    """A node with the label and one core, which has not been started."""
    node = OtherNode(head, num_cpus=1, labels={"board": "rpi4"})
    yield node
    node.kill()
    node.wait_until_noticed()


@pytest.fixture
def trap(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return Trap(tmp_path)


def test_a_board_takes_part_whenever_it_is_there(board, trap):
    events, joined_after, killed_in = [], None, None
    reports = []  # of the board's plans
    run = fedbonsai.run(CONFIG | {"ray": {"min_real_devices": 0}}, backend="ray", workers=1)
    with run:
        for event in run:
            events.append(event)
            if isinstance(event, PlanEnded) and event.report.plan.device == BOARD:
                reports.append(event.report)
            if isinstance(event, VersionClosed) and event.version == 2 and joined_after is None:
                joined_after = 2
                board.start()
            if joined_after is not None and not reports and isinstance(event, VersionClosed):
                time.sleep(0.2)  # while it joins few versions pass, whose residuals are fewer bytes than a dense model
            if killed_in is None and isinstance(event, VersionClosed) and len(reports) == 3:
                killed_in = event.version
                trap.set(board)
            if killed_in is not None and isinstance(event, VersionClosed) and event.version == killed_in + 3:
                board.start()
            if len(reports) == 7:
                break
    outcomes = [report.outcome.value for report in reports]
    assert outcomes == ["done"] * 3 + ["lost"] + ["done"] * 3
    lost = reports[3]
    assert (lost.plan.version, lost.plan.attempt, lost.stage) == (killed_in, 0, "train")
    assert lost.error.startswith("node 127.0.0.1 (")
    assert lost.error.endswith(") is gone")
    # Nothing is sent to it while it is away: before it has joined, and until it has joined again.
    assert reports[0].plan.version >= 2
    assert reports[4].plan.version >= killed_in + 3
    # The others go on: each has a plan in every version, and all are folded.
    others = Counter(event.report.plan.device for event in events if isinstance(event, PlanEnded)) - Counter(
        {BOARD: len(reports)}
    )
    versions = reports[-1].plan.version
    assert all(others[device] in (versions, versions + 1) for device in range(3)), others
    notices = [event.text for event in events if isinstance(event, Notice)]
    missing = "0 of 1 real devices are there, and the run goes on with them; "
    assert notices[0].startswith(
        f"{missing}{NAME} is missing: a node with the labels board=rpi4, not in use, has not joined"
    )
    assert sum(text.startswith(f"{NAME} has joined (node 127.0.0.1 (") for text in notices) == 2
    assert sum(text.startswith(f"{NAME} cannot be reached: node 127.0.0.1 (") for text in notices) == 1
    # It begins from the model that the seed gives, and begins again with a dense one; all else is residuals.
    closed = [event for event in events if isinstance(event, VersionClosed)]
    down = {now.version - 1: now.down_bytes - before.down_bytes for before, now in pairwise(closed)}
    dense = {version for version, num_bytes in down.items() if num_bytes > 100_000}
    assert dense == {reports[4].plan.version}


def test_server_and_simulated_devices_keep_off_the_board(board, trap):
    board.start()
    head_node = ray.get_runtime_context().get_node_id()
    run = fedbonsai.run(CONFIG | {"stop": {"rounds": 1}}, backend="ray", workers=1)
    with run:
        next(run)
        groups = [found for found in ray.util.placement_group_table().values() if found["state"] == "CREATED"]
        assert {node for found in groups for node in found["bundles_to_node_id"].values()} == {head_node}
        assert len(groups) == 3
        list(run)
    assert run.summary["participation"]["board"]["outcomes"] == {"done": 1}


def test_where_no_device_is_left_the_run_ends_and_says_so(board, trap):
    board.start()
    config = CONFIG | {"fleet": {"classes": [REAL]}}
    run = fedbonsai.run(config, backend="ray")
    why = r"^no device is left: device 0 \(class board\): node 127\.0\.0\.1 \(\w+\) is gone$"

    def follow():
        for event in run:
            if isinstance(event, VersionClosed) and event.version == 2:
                trap.set(board)

    with pytest.raises(RunError, match=why):
        follow()
    outcomes = run.summary["outcomes"]
    assert outcomes["done"] == 2
    assert outcomes["lost"] == 1
