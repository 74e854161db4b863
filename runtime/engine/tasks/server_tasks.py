"""Tasks of the server in the loop of rounds: what they see of updates, and how they change the model when a version closes.

    begin ── folded, folded, ... ── refine      a task of one version, as its class in ``TASKS`` carries it out

A task belongs to the version in whose decision it is. What it has gathered is gone when the version closes, so a checkpoint,
which is taken there, holds nothing of it. The virtual clock charges its FLOPs at the declared speed of the server, after the
version has closed: plans of the next version are sent when the task is done.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ....actors.messages.distiller_messages import DistillerClient, PublicInfo
from ....actors.pool import WorkerFailure
from ....actors.server.routes import Opened
from ....actors.server.server import Server
from ....comms.errors import StoreFull
from ....comms.ledger import Ledger
from ....policies.plan import Plan
from ....policies.report import Report
from ....policies.tasks import Distil, Restore, ServerTask, Snapshot, TrackMovement
from ...configuration.config import Config
from ...errors import RunError
from ...events import BlocksMoved, TaskEnded
from ...simulation.costs import Costs
from .distillation_task import DistillationInRound
from .stage_tasks import MovementInRound, RestoreInRound, SnapshotInRound

_SERVER = -1  # in the ledger, in place of a device


class TaskInRound(Protocol):
    """A task of the open version."""

    def folded(self, plan: Plan, update: Opened, report: Report, *, weight: float, scale: float) -> None:
        """An update is about to be folded. ``weight``: in the mean. ``scale``: its factor by staleness."""
        ...

    def refine(self, version: int) -> Mapping[str, Tensor]:
        """The tensors of version ``version``, which has just been averaged, that the task changes; by the server's names."""
        ...

    def ended(self, version: int) -> TaskEnded | BlocksMoved | None:
        """The event that reports what the task has done; None: there is nothing to report."""
        ...


TASKS: dict[type, Callable[[Any, "ServerTasks"], TaskInRound]] = {
    Distil: DistillationInRound,
    TrackMovement: MovementInRound,
    Snapshot: SnapshotInRound,
    Restore: RestoreInRound,
}


class ServerTasks:
    """The tasks of a run, at most one of each kind in a version.

    ``movement``: the newest effective movement, by the label of its task.
    """

    SAVED: ClassVar = {"_counted": bool, "movement": dict[str, float]}  # in a checkpoint
    NOT_SAVED = (
        "config", "server", "costs", "flop_per_s", "public_samples", "_distiller", "_ledger", "_open", "_notices"
    )  # fmt: skip

    def __init__(
        self,
        config: Config,
        *,
        server: Server,
        costs: Costs,
        ledger: Ledger,
        distiller: DistillerClient | None,
        flop_per_s: float,
    ) -> None:
        """``distiller``: None for a chain of policies that states no task. ``flop_per_s``: of the server."""
        self.config, self.server, self.costs, self.flop_per_s = config, server, costs, flop_per_s
        self._distiller, self._ledger = distiller, ledger
        self.public_samples = 0
        self._open: dict[type, TaskInRound] = {}  # by the type of the task
        self.movement: dict[str, float] = {}
        self._notices: list[str] = []
        self._counted = False  # whether the distribution of the public set is in the ledger

    @contextmanager
    def distiller(self) -> Iterator[DistillerClient]:
        """The distiller of a run that has one, for one call. Raises ``RunError`` if it cannot answer."""
        assert self._distiller is not None
        try:
            yield self._distiller
        except (ValueError, WorkerFailure, StoreFull) as error:
            raise RunError(str(error), round_=self.server.version, stage="task") from error

    def prepare(self, task: ServerTask) -> None:
        """Load the public set for a task that is expected. Raises ``ValueError`` if the task cannot be carried out."""
        if isinstance(task, Distil):
            self._public(task)

    def _public(self, task: Distil) -> PublicInfo:
        if self._distiller is None:
            raise ValueError("the policy asks for the task Distil, and no policy of the chain states that it distils")
        return self._distiller.public(task.held_out)

    def use_public(self, task: Distil) -> None:
        """The public set of a task that begins; its distribution is counted once. Raises ``ValueError`` if there is none."""
        info = self._public(task)
        self.public_samples = info.samples
        if not self._counted:
            self.send_bytes("public", info.num_bytes)
            self._counted = True

    def begin(self, task: ServerTask) -> None:
        """Begin a task of the open version. Raises ``ValueError`` if it cannot be done, or if there is one of its kind."""
        if type(task) in self._open:
            raise ValueError(
                f"the policy asks for the task {type(task).__name__} in a version that has one already; it must be one at most"
            )
        self._open[type(task)] = TASKS[type(task)](task, self)

    def folded(self, plan: Plan, update: Opened, report: Report, *, weight: float, scale: float) -> None:
        """An update is about to be folded into the open version. Raises ``RunError`` if a task cannot go on."""
        for task in self._open.values():
            task.folded(plan, update, report, weight=weight, scale=scale)

    def refine(self) -> Mapping[str, Tensor]:
        """The tensors that the tasks of the open version change, after its updates were averaged.

        Raises ``RunError`` if a task cannot go on.
        """
        changed: dict[str, Tensor] = {}
        try:
            for task in self._open.values():
                changed |= task.refine(self.server.version)
        except RunError:
            raise
        except Exception as error:  # a user's model or transform may raise anything
            raise RunError.of(error, round_=self.server.version, stage="task") from error
        return changed

    def ended(self) -> list[TaskEnded | BlocksMoved]:
        """End the tasks of the version that has closed; the events of those that have something to tell."""
        ended = [task.ended(self.server.version) for task in self._open.values()]
        self._open.clear()
        return [event for event in ended if event is not None]

    def notices(self) -> list[str]:
        """Notices of the distiller and of tasks since the last call."""
        own, self._notices = self._notices, []
        return [*own, *(self._distiller.notices() if self._distiller is not None else [])]

    def note(self, text: str) -> None:
        """Add a notice: one sentence."""
        self._notices.append(text)

    def send_bytes(self, kind: str, num_bytes: int) -> None:
        """Record bytes from the server to the actor of a task."""
        self._ledger.record("down", kind=kind, device=_SERVER, num_bytes=num_bytes)

    def receive_bytes(self, kind: str, num_bytes: int) -> None:
        """Record bytes from the actor of a task to the server."""
        self._ledger.record("up", kind=kind, device=_SERVER, num_bytes=num_bytes)
