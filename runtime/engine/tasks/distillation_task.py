"""The task of ensemble distillation: updates teach the averaged models, on the public set, in the actor of the distiller."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ....actors.messages.distiller_messages import (
    DistilRequest,
    Execution,
    StudentResult,
    TeacherRequest,
)
from ....actors.messages.model_packets import open_model, seal_model
from ....actors.server.routes import Opened
from ....learning.parts.part import whole
from ....learning.seeds import derive
from ....learning.spec import Distillation
from ....learning.tensors import as_arrays, as_tensors
from ....learning.training.distillation import TeacherMean
from ....policies.plan import Plan
from ....policies.report import Report
from ....policies.tasks import Distil
from ...errors import RunError
from ...events import StudentFigures, TaskEnded

if TYPE_CHECKING:
    from .server_tasks import ServerTasks


class DistillationInRound:
    """Ensemble distillation of one version: every update that is folded is a teacher, every family of models a student."""

    def __init__(self, task: Distil, tasks: "ServerTasks") -> None:
        """``tasks``: gives access to server, distiller and costs. Raises ``ValueError`` if there is no public set."""
        tasks.use_public(task)
        self._task, self._tasks = task, tasks
        self._settings = Distillation(**{name: getattr(task, name) for name in Distillation.__struct_fields__})
        self._mean = TeacherMean()
        self._waiting: list[tuple[int, float]] = []  # device and weight of each teacher whose logits are not known yet
        self._flops = 0
        self._families: dict[str, StudentResult] = {}
        config = tasks.config
        self._execution = Execution(
            precision=config.training.precision,
            layout=config.training.layout,
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


def _figures(result: StudentResult) -> StudentFigures:
    return StudentFigures(
        steps=result.steps,
        best_step=result.best_step,
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        accuracy_before=result.accuracy_before,
        accuracy_after=result.accuracy_after,
    )
