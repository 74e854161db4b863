"""What death looks like on Ray, and what is known of its nodes."""

import socket

import ray
from ray import exceptions as faults

LOADING_S = 120.0  # that a process may take to load its data and model, once it has a place
MOST_STARTS = 3  # of one place, one after another that dies while it starts
_CONNECTING_S = 2.0
_PLACING_S = 5.0  # even a bundle that fits takes a moment to be placed
DIED = (
    faults.RayActorError,
    faults.WorkerCrashedError,
    faults.ObjectLostError,  # the only copy was on a node that is gone
    faults.NodeDiedError,
    faults.OutOfMemoryError,  # Ray's memory monitor killed it, because the node (not one plan) was short of memory
    faults.ActorUnschedulableError,  # the node where it was to be is gone
)


def first_line(error: BaseException) -> str:
    """The first line of an error, without Ray's advice."""
    if isinstance(error, faults.ObjectLostError):
        return "what it had made was lost with its node"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def gone(node: str) -> str:
    """A sentence on a node that is gone; else "".

    Ray itself is sure of it after some 20 s. What is handed to the dead until then is lost once more: so its port is tried.
    """
    for found in ray.nodes():
        if found["NodeID"] == node:
            address = found["NodeManagerAddress"], found["NodeManagerPort"]
            if not found["Alive"] or not _is_open(address):
                return f"node {address[0]} ({node[:8]}) is gone"
    return ""


def _is_open(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_CONNECTING_S).close()
    except OSError:
        return False
    return True


def placing_s(timeout_s: float) -> float:
    """How long Ray may take to find a bundle a place."""
    return max(timeout_s, _PLACING_S)


def until(*seconds: float | None) -> float | None:
    """The shortest of some times; None is any."""
    given = [each for each in seconds if each is not None]
    return min(given) if given else None
