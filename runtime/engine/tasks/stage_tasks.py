"""Tasks on the server's own tensors: effective movement of blocks, and snapshots of them."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ....actors.server.routes import Opened
from ....actors.server.server import Server
from ....learning.movement import move
from ....learning.tensors import at_least_float32
from ....policies.plan import Plan
from ....policies.report import Report
from ....policies.tasks import Restore, Snapshot, TrackMovement
from ...events import BlocksMoved

if TYPE_CHECKING:
    from .server_tasks import ServerTasks


class _OnTensors:
    """A task that needs no updates."""

    def folded(self, plan: Plan, update: Opened, report: Report, *, weight: float, scale: float) -> None:
        """Nothing is gathered from updates."""

    def refine(self, version: int) -> Mapping[str, Tensor]:
        """No tensor is changed."""
        return {}

    def ended(self, version: int) -> BlocksMoved | None:
        """There is nothing to tell."""
        return None


class MovementInRound(_OnTensors):
    """The effective movement of some blocks; its running means are in the server's section ``trackers``."""

    def __init__(self, task: TrackMovement, tasks: "ServerTasks") -> None:
        """Keeps the tensors of this version. A series with another label, or of other blocks, begins anew."""
        self._task, self._tasks, server = task, tasks, tasks.server
        specs = server.workload.spec.tensors_of(task.blocks)
        names = [t.name for t in specs if t.is_parameter and not t.frozen]
        self._before = {name: server.tensors[name].clone() for name in names}
        self._prefix = f"{task.label}/{task.window}/"
        trackers = server.store["trackers"]
        expected = {self._prefix + f"{kind}/{name}" for name in names for kind in ("net", "path")}
        if trackers.keys() - expected:
            trackers.clear()

    def refine(self, version: int) -> Mapping[str, Tensor]:
        """Measure; no tensor is changed."""
        server, trackers = self._tasks.server, self._tasks.server.store["trackers"]
        means = {name.removeprefix(self._prefix): tensor for name, tensor in trackers.items()}
        changes = (
            (name, at_least_float32(server.tensors[name]) - at_least_float32(before))
            for name, before in self._before.items()
        )
        movement = move(means, changes, window=self._task.window)
        trackers.update({self._prefix + name: tensor for name, tensor in means.items()})
        if movement is not None:
            self._tasks.movement = {self._task.label: movement}
        return {}

    def ended(self, version: int) -> BlocksMoved | None:
        """The movement, once anything has moved."""
        movement = self._tasks.movement.get(self._task.label)
        if movement is None:
            return None
        return BlocksMoved(version=version, label=self._task.label, movement=movement)


class SnapshotInRound(_OnTensors):
    """A copy of some blocks and auxiliaries in the server's section ``snapshots``."""

    def __init__(self, task: Snapshot, tasks: "ServerTasks") -> None:
        """Copies them as they are now."""
        snapshots = tasks.server.store["snapshots"]
        snapshots.clear()
        snapshots.update(
            {name: tasks.server.tensors[name].clone() for name in _names(tasks.server, task.blocks, task.auxiliaries)}
        )


class RestoreInRound(_OnTensors):
    """Sets what the snapshot holds."""

    def __init__(self, task: Restore, tasks: "ServerTasks") -> None:
        """``tasks``: gives access to the server."""
        self._server = tasks.server

    def refine(self, version: int) -> Mapping[str, Tensor]:
        """The tensors of the snapshot."""
        return dict(self._server.store["snapshots"])


def _names(server: Server, blocks: tuple[str, ...], auxiliaries: tuple[str, ...]) -> Iterable[str]:
    """Names of the tensors that training changes, without counters; of auxiliaries, those that exist already."""
    spec = server.workload.spec
    yield from (t.name for t in spec.tensors_of(blocks) if t.role != "counter" and not t.frozen)
    yield from (t.name for t in spec.auxiliary_tensors(auxiliaries) if t.name in server.store["auxiliaries"])
