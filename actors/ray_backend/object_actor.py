"""Hosts any object in an actor of its own: a plain class becomes an actor by being made there."""

from collections.abc import Callable, Mapping
from typing import Any

import ray

from ...clusters.scratch import reap_runs
from .allocator import keep_freed_memory
from .ray_place import ActorPlacement


class ObjectActor:
    """The actor: makes its object in its own process, and passes calls on."""

    def __init__(self) -> None:
        """Nothing is hosted yet."""
        keep_freed_memory()
        reap_runs()
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
    place: ActorPlacement, *, runtime_env: Mapping[str, Any] | None = None, kind: type[ObjectActor] = ObjectActor
) -> Any:
    """A host actor; its handle. ``kind``: gives its process another name."""
    options = place.options() | ({"runtime_env": dict(runtime_env)} if runtime_env else {})
    return ray.remote(kind).options(**options).remote()
