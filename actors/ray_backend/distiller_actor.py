"""The actor of the distiller on Ray."""

from typing import TYPE_CHECKING

import ray

from ...clusters.allocator import importing
from ...comms.codec import Array
from ...learning.workload_settings import WorkloadSettings
from ..messages.distiller_messages import DistilRequest, PublicInfo, StudentResult, TeacherRequest
from .actor import prepare_process, remote_method
from .actor_placement import ActorPlacement

if TYPE_CHECKING:
    from ..distiller.distiller import Distiller


class DistillerActor:
    """A ``Distiller`` in a process of its own. The methods are those of ``Distiller``, but for ``make``."""

    _distiller: "Distiller"

    def __init__(self) -> None:
        """The distiller is made by ``make``, which can raise errors to its caller; an error here would look like a death."""
        prepare_process()

    @remote_method
    def make(self, settings: WorkloadSettings) -> str:
        """Make the distiller; the id of the node."""
        with importing():  # here, because the server starts its actors before it imports torch
            import torch

            from ...learning.workload import Workload
            from ..distiller.distiller import Distiller

        torch.set_num_threads(settings.threads)
        self._distiller = Distiller(Workload(settings))
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @remote_method
    def public(self, held_out: float) -> PublicInfo:
        """Load the public set."""
        return self._distiller.public(held_out)

    @remote_method
    def logits(self, request: TeacherRequest, packet: Array) -> Array:
        """Logits of a teacher."""
        return self._distiller.logits(request, packet)

    @remote_method
    def distil(
        self, request: DistilRequest, targets: Array, *packets: Array
    ) -> tuple[list[StudentResult], list[Array]]:
        """Train the students."""
        return self._distiller.distil(request, targets, packets)


def start_distiller(placement: ActorPlacement) -> DistillerActor:
    """Start the actor of the distiller; its handle."""
    handle: DistillerActor = ray.remote(DistillerActor).options(**placement.options()).remote()
    return handle
