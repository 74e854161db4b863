"""Where an actor of a run may be on Ray, and what it reserves there."""

from dataclasses import dataclass, field
from typing import Any

from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ...clusters.ray_backend.placement import is_placed
from ...clusters.ray_backend.real_devices import RealDevice, Site


@dataclass(frozen=True, kw_only=True)
class ActorPlacement:
    """The place of one worker or partition host: a bundle, or the node of a real device.

    ``name``: for people. ``group``: of the plans that a worker here may run ("": those of all simulated devices).
    ``placement``: the placement group of its bundle. ``device``: the real device, whose node is known when it has joined.
    """

    name: str
    group: str = ""
    cpus: float = 0.0
    memory_bytes: int | None = None
    placement: PlacementGroup | None = field(default=None, compare=False)
    device: RealDevice | None = field(default=None, compare=False)

    def has_room(self) -> bool:
        """Whether Ray has found a place for it; a node that is known is one."""
        return self.placement is None or is_placed(self.placement)

    def options(self, site: Site | None = None) -> dict[str, Any]:
        """Options of the actor that is to be here. ``site``: of a real device. Ray neither restarts it nor repeats a call."""
        common: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
        if site is not None:
            strategy = NodeAffinitySchedulingStrategy(site.node, soft=False)
            return common | {
                "num_cpus": site.cpus,
                "resources": dict(site.resources),
                "scheduling_strategy": strategy,
            }
        bundle = PlacementGroupSchedulingStrategy(
            self.placement, placement_group_bundle_index=0, placement_group_capture_child_tasks=False
        )
        memory = {"memory": self.memory_bytes} if self.memory_bytes else {}
        return common | memory | {"num_cpus": self.cpus, "scheduling_strategy": bundle}
