"""The Distiller: logits of teachers on the public set, and the training of students. A plain class, in process and on Ray.

It has no state but caches (data, modules): every answer follows from the request and its packets, so a distiller that died is
replaced by another, and the request is repeated.
"""

from collections.abc import Sequence

import torch

from ...comms.codec import Array
from ...learning.data.public import PublicSet
from ...learning.parts.part import Part
from ...learning.tensors import as_arrays, as_tensors
from ...learning.training.distillation import adjust, distil, teacher_logits
from ...learning.workload import Workload
from ..device.module import Module, Modules
from ..messages.distiller_messages import DistilRequest, Execution, PublicInfo, StudentResult, TeacherRequest
from ..messages.model_packets import open_model, seal_model


class Distiller:
    """Runs models on the public set."""

    def __init__(self, workload: Workload) -> None:
        """Loads nothing yet."""
        self.workload = workload
        self._modules = Modules()

    def public(self, held_out: float) -> PublicInfo:
        """Load the public set. Raises ``ValueError`` if there is none, or if it is not disjoint from the other data."""
        public = self._public(held_out)
        return PublicInfo(samples=len(public), num_bytes=public.num_bytes, dropped=public.dropped)

    def logits(self, request: TeacherRequest, packet: Array) -> Array:
        """[sample, class] float32 logits of a teacher, corrected for its classes; NaN where it has no vote."""
        public, execution = self._public(request.held_out), request.execution
        submodel = self.workload.submodel(request.part)
        module = self._module(request.part, execution)
        module.load(open_model(packet, submodel))
        logits = teacher_logits(
            module.model,
            public.samples,
            transform=public.transform,
            batch_size=execution.batch_size,
            layout=execution.layout,
            precision=execution.precision,
        )
        if request.class_prior and request.label_counts:
            logits = adjust(logits, request.label_counts, request.class_prior)
        return as_arrays({"logits": logits})["logits"]

    def distil(
        self, request: DistilRequest, targets: Array, packets: Sequence[Array]
    ) -> tuple[list[StudentResult], list[Array]]:
        """Train the students one after the other; their results and their models as packets."""
        goal = as_tensors({"targets": targets})["targets"]
        results, models = [], []
        for part, packet in zip(request.parts, packets, strict=True):
            submodel, module = self.workload.submodel(part), self._module(part, request.execution)
            module.load(open_model(packet, submodel))
            with torch.enable_grad():  # whatever the mode of the caller
                done = distil(
                    module.model,
                    self._public(request.settings.held_out),
                    goal,
                    settings=request.settings,
                    trainable=submodel.trained,
                    seed=request.seed,
                    precision=request.execution.precision,
                    layout=request.execution.layout,
                )
            results.append(
                StudentResult(
                    steps=done.steps,
                    best_step=done.best_step,
                    processed=done.processed,
                    evaluated=done.evaluated,
                    loss_before=done.before.loss,
                    loss_after=done.after.loss,
                    accuracy_before=done.before.accuracy,
                    accuracy_after=done.after.accuracy,
                )
            )
            models.append(seal_model(module.state(), submodel))
        return results, models

    def _public(self, held_out: float) -> PublicSet:
        return self.workload.public(held_out)

    def _module(self, part: Part, execution: Execution) -> Module:
        return self._modules.get(self.workload.architecture(part), layout=execution.layout)


class InlineDistiller:
    """A distiller in this process: every request is carried out at once."""

    def __init__(self, distiller: Distiller) -> None:
        """``distiller``: carries them out."""
        self._distiller = distiller
        self._logits: list[Array] = []

    def public(self, held_out: float) -> PublicInfo:
        """Load the public set."""
        return self._distiller.public(held_out)

    def teach(self, request: TeacherRequest, packet: Array) -> None:
        """Compute a teacher's logits."""
        self._logits.append(self._distiller.logits(request, packet))

    def logits(self, *, wait: bool) -> list[Array]:
        """Logits that were not returned before."""
        logits, self._logits = self._logits, []
        return logits

    def distil(
        self, request: DistilRequest, targets: Array, packets: Sequence[Array]
    ) -> tuple[list[StudentResult], list[Array]]:
        """Train the students."""
        return self._distiller.distil(request, targets, packets)

    def notices(self) -> list[str]:
        """None: nothing can die."""
        return []

    def close(self) -> None:
        """Nothing to end."""
