"""Hosts any object in an actor of its own: a plain class becomes an actor by being made there."""

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from .allocator import keep_freed_memory


class Host:
    """The actor: makes its object in its own process, and passes calls on."""

    def __init__(self) -> None:
        """One torch thread, as everywhere; nothing is hosted yet."""
        import torch

        torch.set_num_threads(1)
        keep_freed_memory()
        self._object: Any = None

    def make(self, make: Callable[[], Any]) -> str:
        """Make the object here; the node's id. (Not ``__init__``: what a call raises reaches the caller as it was raised.)"""
        self._object = make()
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the hosted object."""
        return getattr(self._object, method)(*arguments)


def start_host(
    *, placement: Any, bundle: int, cpus: float, runtime_env: Mapping[str, Any], kind: type[Host] = Host
) -> Any:
    """A host actor in a bundle of a placement group; its handle. Ray neither restarts it nor repeats a call.

    ``kind``: gives its process another name.
    """
    strategy = PlacementGroupSchedulingStrategy(
        placement, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=False
    )
    options: dict[str, Any] = {
        "num_cpus": cpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": strategy,
    }
    if runtime_env:
        options["runtime_env"] = dict(runtime_env)
    return ray.remote(kind).options(**options).remote()
