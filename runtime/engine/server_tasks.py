"""Tasks of the server in the loop of rounds: what they see of updates, and how they change the model when a version closes.

    begin ── folded, folded, ... ── refine      a task of one version, as its class in ``TASKS`` carries it out

A task belongs to the version in whose decision it is. What it has gathered is gone when the version closes, so a checkpoint,
which is taken there, holds nothing of it. The virtual clock charges its FLOPs at the declared speed of the server, after the
version has closed: plans of the next version are sent when the task is done.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Protocol

from torch import Tensor

from ...actors.messages.distiller_messages import (
    DistillerClient,
    DistilRequest,
    Execution,
    StudentResult,
    TeacherRequest,
)
from ...actors.messages.model_packets import open_model, seal_model
from ...actors.pool import WorkerFailure
from ...actors.server.routes import Opened
from ...actors.server.server import Server
from ...comms.errors import StoreFull
from ...comms.ledger import Ledger
from ...learning.parts.part import whole
from ...learning.seeds import derive
from ...learning.spec import Distillation
from ...learning.tensors import as_arrays, as_tensors
from ...learning.training.distillation import TeacherMean
from ...policies.plan import Plan
from ...policies.report import Report
from ...policies.tasks import Distil, ServerTask
from ..configuration.config import Config
from ..errors import RunError
from ..events import StudentFigures, TaskEnded
from ..simulation.costs import Costs

_SERVER = -1  # in the ledger, in place of a device


class TaskInRound(Protocol):
    """A task of the open version."""

    def folded(self, plan: Plan, update: Opened, report: Report, *, weight: float, scale: float) -> None:
        """An update is about to be folded. ``weight``: in the mean. ``scale``: its factor by staleness."""
        ...

    def refine(self, version: int) -> Mapping[str, Tensor]:
        """The tensors of version ``version``, which has just been averaged, that the task changes; by the server's names."""
        ...

    def ended(self, version: int) -> TaskEnded:
        """What the task has done."""
        ...


class DistillationInRound:
    """Ensemble distillation of one version: every update that is folded is a teacher, every family of models a student."""

    def __init__(self, task: Distil, tasks: "ServerTasks") -> None:
        """``tasks``: gives access to server, distiller and costs."""
        self._task, self._tasks = task, tasks
        self._settings = Distillation(**{name: getattr(task, name) for name in Distillation.__struct_fields__})
        self._mean = TeacherMean()
        self._waiting: list[tuple[int, float]] = []  # device and weight of each teacher whose logits are not known yet
        self._flops = 0
        self._families: dict[str, StudentResult] = {}
        config = tasks.config
        self._execution = Execution(
            precision=config.training.precision,
            channels_last=config.training.channels_last,
            batch_size=config.evaluation.batch_size,
        )

    def folded(self, plan: Plan, update: Opened, report: Report, *, weight: float, scale: float) -> None:
        """Send the updated model of the device to the distiller, and add the logits that are known.

        Raises ``RunError`` where classes are to be corrected for, and the report has no label counts.
        """
        if self._task.class_prior and not report.label_counts:
            raise RunError(
                f"the task has class_prior {self._task.class_prior:g}, and the device's report has no label counts; it needs "
                "plans with upload.label_counts, and targets that are class labels",
                device=plan.device,
                round_=plan.version,
                stage="task",
            )
        submodel, tensors = self._tasks.server.trained_model(plan, update)
        packet = seal_model(tensors, submodel)
        request = TeacherRequest(
            part=submodel.part.shape,
            execution=self._execution,
            held_out=self._task.held_out,
            label_counts=report.label_counts,
            class_prior=self._task.class_prior,
        )
        self._tasks.send_bytes("teacher", packet.nbytes)
        with self._tasks.distiller() as distiller:
            distiller.teach(request, packet)
        cost = self._tasks.costs.row(submodel.part.shape, plan.training)
        self._flops += cost.forward_flops * self._tasks.public_samples
        self._waiting.append((plan.device, scale * (weight if self._task.weighting == "samples" else 1.0)))
        self._add(wait=False)

    def refine(self, version: int) -> Mapping[str, Tensor]:
        """Distil the teachers into the averaged models."""
        if self._waiting:
            self._add(wait=True)
        if not self._mean.num_teachers:
            return {}
        server, workload = self._tasks.server, self._tasks.server.workload
        parts = tuple(whole(workload.family(name).spec, model=name) for name in workload.families)
        request = DistilRequest(
            parts=parts,
            settings=self._settings,
            execution=self._execution,
            seed=derive(self._tasks.config.seed, "distil", version),
        )
        submodels = [workload.submodel(part) for part in parts]
        packets = [seal_model(submodel.gather(server.tensors), submodel) for submodel in submodels]
        targets = as_arrays({"targets": self._mean.mean()})["targets"]
        with self._tasks.distiller() as distiller:
            results, models = distiller.distil(request, targets, packets)
        changed: dict[str, Tensor] = {}
        for part, submodel, packet, result, model in zip(parts, submodels, packets, results, models, strict=True):
            self._tasks.send_bytes("student", packet.nbytes)
            self._tasks.receive_bytes("student", model.nbytes)
            self._families[part.model] = result
            cost = self._tasks.costs.row(part, self._tasks.config.training)
            self._flops += cost.training_flops * result.processed + cost.forward_flops * result.evaluated
            if result.best_step:
                changed |= submodel.server_names(open_model(model, submodel, finite=True))
        return changed

    def ended(self, version: int) -> TaskEnded:
        """Teachers, students, and the FLOPs and simulated seconds of both."""
        return TaskEnded(
            version=version,
            task="distil",
            teachers=self._mean.num_teachers,
            students={name: _figures(result) for name, result in self._families.items()},
            flops=self._flops,
            seconds=self._flops / self._tasks.flop_per_s,
        )

    def _add(self, *, wait: bool) -> None:
        """Add logits of teachers to their mean, in the order of arrival. Those that are not finite are left out."""
        with self._tasks.distiller() as distiller:
            known = distiller.logits(wait=wait)
        for array in known:
            self._tasks.receive_bytes("logits", array.nbytes)
            device, weight = self._waiting.pop(0)
            try:
                self._mean.add(as_tensors({"logits": array})["logits"], weight)
            except ValueError as error:  # a model that has diverged: one of many should not end the run
                self._tasks.note(f"the update of device {device} does not teach the models: {error}")


TASKS = {Distil: DistillationInRound}


class ServerTasks:
    """The tasks of a run, at most one in each version."""

    SAVED: ClassVar = {"_counted": bool}  # in a checkpoint
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
        self._open: TaskInRound | None = None
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
        assert self._distiller is not None
        self._distiller.public(task.held_out)

    def begin(self, task: ServerTask) -> None:
        """Begin the task of the open version. Raises ``ValueError`` if it cannot be carried out, or if there is one."""
        if self._open is not None:
            raise ValueError(
                f"the policy asks for the task {type(task).__name__} in a version that has one already; it must be one at most"
            )
        if self._distiller is None:
            raise ValueError(
                f"the policy asks for the task {type(task).__name__}, and no policy of the chain states that it writes 'tasks'"
            )
        info = self._distiller.public(task.held_out)
        self.public_samples = info.samples
        if not self._counted:
            self.send_bytes("public", info.num_bytes)
            self._counted = True
        self._open = TASKS[type(task)](task, self)

    def folded(self, plan: Plan, update: Opened, report: Report, *, weight: float, scale: float) -> None:
        """An update is about to be folded into the open version. Raises ``RunError`` if the task cannot go on."""
        if self._open is not None:
            self._open.folded(plan, update, report, weight=weight, scale=scale)

    def refine(self) -> Mapping[str, Tensor]:
        """The tensors that the open version's task changes, after its updates were averaged.

        Raises ``RunError`` if the task cannot go on.
        """
        if self._open is None:
            return {}
        try:
            return self._open.refine(self.server.version)
        except RunError:
            raise
        except Exception as error:  # a user's model or transform may raise anything
            raise RunError.of(error, round_=self.server.version, stage="task") from error

    def ended(self) -> TaskEnded | None:
        """End the task of the version that has closed; None if it had none."""
        if self._open is None:
            return None
        ended, self._open = self._open.ended(self.server.version), None
        return ended

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


def _figures(result: StudentResult) -> StudentFigures:
    return StudentFigures(
        steps=result.steps,
        best_step=result.best_step,
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        accuracy_before=result.accuracy_before,
        accuracy_after=result.accuracy_after,
    )
