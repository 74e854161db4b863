"""Movement, snapshots and restored weights, on a small real server whose model is changed by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Call, ServerOptimiser, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings
from fedbonsai.policies.tasks import Restore, Snapshot, TrackMovement
from fedbonsai.runtime.engine.tasks.stage_tasks import MovementInRound, RestoreInRound, SnapshotInRound
from fedbonsai.runtime.events import BlocksMoved

MODULE = """
from torch import nn

class Three(nn.Sequential):
    '''Blocks 0, 2 and 4; the first has running statistics.'''

    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, num_classes))
"""


@pytest.fixture(name="server")
def server_fixture(tmp_path, monkeypatch) -> Server:
    (tmp_path / "three_blocks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    settings = WorkloadSettings(
        model=Call("three_blocks:Three"), data=DataConfig(name="digits"), metrics=(), num_devices=2, seed=1
    )
    server = Server(Workload(settings), channel=LocalChannel(), optimiser=ServerOptimiser())
    assert server.workload.spec.block_names == ("1", "3", "4")
    return server


@pytest.fixture(name="tasks")
def tasks_fixture(server: Server) -> Any:
    """What these tasks need of the tasks of a run."""
    return SimpleNamespace(server=server, movement={})


def track(label: str = "grow 1", blocks: tuple[str, ...] = ("3",), window: int = 3) -> TrackMovement:
    return TrackMovement(label=label, blocks=blocks, window=window)


def version(tasks: Any, task: TrackMovement, **changes: float) -> BlocksMoved | None:
    """A version in which tensors change by these values: the event at its end."""
    begun = MovementInRound(task, tasks)
    with torch.no_grad():
        for name, value in changes.items():
            tasks.server.tensors[name.replace("_", ".", 1)].add_(value)
    assert begun.refine(tasks.server.version) == {}
    return begun.ended(7)


def test_the_movement_of_a_block_by_hand(tasks: Any) -> None:
    # Six scalars. Window 3, decay 1/2: E = 2, A = 2; then E = 1 - 1 = 0, A = 1 + 1 = 2.
    first = version(tasks, track(), **{"3_weight": 4.0, "3_bias": 4.0})
    assert first == BlocksMoved(version=7, label="grow 1", movement=pytest.approx(1.0, abs=1e-6))
    second = version(tasks, track(), **{"3_weight": -2.0, "3_bias": -2.0})
    assert second is not None
    assert second.movement == pytest.approx(0.0, abs=1e-6)
    assert tasks.movement == {"grow 1": second.movement}


def test_a_block_that_has_not_moved_has_nothing_to_tell(tasks: Any) -> None:
    assert version(tasks, track()) is None
    assert tasks.movement == {}
    assert version(tasks, track(), **{"4_weight": 1.0}) is None  # of another block


def test_statistics_do_not_count(tasks: Any) -> None:
    assert version(tasks, track(blocks=("1",)), **{"2_running_mean": 1.0}) is None
    assert version(tasks, track(blocks=("1",)), **{"2_weight": 1.0}) is not None
    assert {name.rpartition("/")[2] for name in tasks.server.store["trackers"]} == {
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
    }


@pytest.mark.parametrize(
    ("before", "other"),
    [
        (track(), track("grow 2")),
        (track(), track(window=5)),
        (track(blocks=("3", "4")), track(blocks=("3",))),
    ],
)
def test_another_series_begins_anew(tasks: Any, before: TrackMovement, other: TrackMovement) -> None:
    version(tasks, before, **{"3_weight": 4.0, "3_bias": 4.0, "4_bias": 4.0})
    moved = version(tasks, other, **{"3_weight": -2.0, "3_bias": -2.0})
    assert moved is not None
    assert moved.movement == pytest.approx(1.0, abs=1e-6)
    assert all(name.startswith(f"{other.label}/{other.window}/") for name in tasks.server.store["trackers"])
    assert tasks.movement == {other.label: moved.movement}


def test_a_snapshot_holds_the_blocks_and_auxiliaries_that_exist(tasks: Any) -> None:
    server: Server = tasks.server
    name = "proxy@3..3"
    SnapshotInRound(Snapshot(blocks=("1",), auxiliaries=(name,)), tasks)
    kept = ["1.weight", "1.bias", "2.weight", "2.bias", "2.running_mean", "2.running_var"]
    assert sorted(server.store["snapshots"]) == sorted(kept)
    server.evaluate(Training(), batch_size=32, path=Part(blocks=("1", "4"), trained=("4",), auxiliaries=(name,)))
    SnapshotInRound(Snapshot(blocks=("4",), auxiliaries=(name,)), tasks)
    assert sorted(server.store["snapshots"]) == sorted(["4.weight", "4.bias", f"{name}.weight", f"{name}.bias"])


def test_what_is_restored_is_what_was_kept(tasks: Any) -> None:
    server: Server = tasks.server
    start = server.weights()
    task = SnapshotInRound(Snapshot(blocks=("1", "4")), tasks)
    assert (task.refine(1), task.ended(1)) == ({}, None)
    with torch.no_grad():
        for tensor in server.store["model"].values():
            tensor.add_(1)
    restored = RestoreInRound(Restore(), tasks)
    changed = restored.refine(1)
    assert set(changed) == {name for name in start if name[0] in "124" and "tracked" not in name}
    assert all(torch.equal(tensor, start[name]) for name, tensor in changed.items())
    assert restored.ended(1) is None


def test_without_a_snapshot_nothing_is_restored(tasks: Any) -> None:
    assert RestoreInRound(Restore(), tasks).refine(1) == {}


def test_both_are_in_sections_of_the_store_that_checkpoints_hold(tasks: Any) -> None:
    version(tasks, track(), **{"3_weight": 4.0})
    SnapshotInRound(Snapshot(blocks=("3",)), tasks)
    sections = tasks.server.store
    assert set(sections["trackers"]) == {
        f"grow 1/3/{kind}/3.{name}" for kind in ("net", "path") for name in ("weight", "bias")
    }
    assert set(sections["snapshots"]) == {"3.weight", "3.bias"}
