"""Where an actor of a run may be placed on Ray, and what it reserves there."""

from dataclasses import dataclass, field, replace
from typing import Any

from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ...clusters.ray_backend.placement import is_placed
from ...clusters.ray_backend.real_devices import RealDevice, Site


@dataclass(frozen=True, kw_only=True)
class ActorPlacement:
    """The placement of one actor: a bundle, or the node of a real device. Placements are equal if their names are.

    ``name``: of the actor, as reported ("worker of bundle 1"). ``group``: the group of tasks that a worker here may run ("":
    those of all simulated devices). ``cpus``, ``memory_bytes``: reserved in the bundle. ``bundle``: its placement group, of one
    bundle. ``device``: the real device, whose node is known when it has joined. ``fallback``: the server's placement group, for
    an actor that runs beside the server if its own bundle cannot be placed.
    """

    name: str
    group: str = field(default="", compare=False)
    cpus: float = field(default=0.0, compare=False)
    memory_bytes: int | None = field(default=None, compare=False)
    bundle: PlacementGroup | None = field(default=None, compare=False)
    device: RealDevice | None = field(default=None, compare=False)
    fallback: PlacementGroup | None = field(default=None, compare=False)

    def is_placed(self) -> bool:
        """Whether Ray has placed its bundle; the node of a real device is known before its actor starts."""
        return self.bundle is None or is_placed(self.bundle)

    def at_fallback(self) -> "ActorPlacement":
        """The same actor beside the server, where it reserves nothing."""
        return replace(self, bundle=self.fallback, cpus=0.0, memory_bytes=None)

    def options(self, site: Site | None = None) -> dict[str, Any]:
        """Ray's options of the actor. ``site``: of a real device. Ray neither restarts the actor nor repeats a call."""
        common: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
        if site is not None:
            strategy = NodeAffinitySchedulingStrategy(site.node, soft=False)
            return common | {
                "num_cpus": site.cpus,
                "resources": dict(site.resources),
                "scheduling_strategy": strategy,
            }
        bundle = PlacementGroupSchedulingStrategy(
            self.bundle, placement_group_bundle_index=0, placement_group_capture_child_tasks=False
        )
        memory = {"memory": self.memory_bytes} if self.memory_bytes else {}
        return common | memory | {"num_cpus": self.cpus, "scheduling_strategy": bundle}
