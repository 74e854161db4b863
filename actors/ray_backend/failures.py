"""Which errors of Ray mean that an actor or a node has died, and the sentences that report them."""

import socket

import ray
from ray import exceptions

_CONNECT_TIMEOUT_S = 2.0
ACTOR_DIED = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.ObjectLostError,  # the only copy was on a node that has died
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,  # Ray's memory monitor killed it, because the node (not one plan) was short of memory
    exceptions.ActorUnschedulableError,  # the node on which it was to be placed has died
)


def first_line(error: BaseException) -> str:
    """The first line of an error, without Ray's advice; at most 200 characters."""
    if isinstance(error, exceptions.ObjectLostError):
        return "its result was lost with its node"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def node_failure(node_id: str) -> str:
    """A sentence that says that a node is gone; "" if it is alive.

    Ray declares a node dead only after some 20 s. Until then everything sent to it would be lost again, so this connects to the
    node's port to find out earlier.
    """
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            address = node["NodeManagerAddress"], node["NodeManagerPort"]
            if not node["Alive"] or not _is_open(address):
                return f"node {address[0]} ({node_id[:8]}) is gone"
    return ""


def _is_open(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def earliest(*seconds: float | None) -> float | None:
    """The shortest of some waiting times; None stands for no limit."""
    given = [each for each in seconds if each is not None]
    return min(given) if given else None
