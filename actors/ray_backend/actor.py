"""What the actor classes on Ray share: calls that mypy checks, and the set-up of their processes.

Imports neither Ray nor torch.
"""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, cast

from ...clusters.allocator import keep_freed_memory
from ...clusters.scratch import reap_runs

Parameters = ParamSpec("Parameters")


class RemoteMethod(Protocol[Parameters]):
    """A method of an actor, as it is called through the actor's handle."""

    def remote(self, *arguments: Parameters.args, **keywords: Parameters.kwargs) -> Any:
        """Call the method in the actor's process; the reference of its result."""
        ...


def remote_method(method: Callable[Concatenate[Any, Parameters], object]) -> RemoteMethod[Parameters]:
    """Mark a method of an actor class as called through a handle.

    Handles are annotated with the class of their actor, so that mypy checks ``handle.method.remote(...)``. Changes nothing at
    run time.
    """
    return cast(RemoteMethod[Parameters], method)


def prepare_process() -> None:
    """Set up the process of an actor: it keeps freed memory, and removes temporary folders of processes that were killed."""
    keep_freed_memory()
    reap_runs()
