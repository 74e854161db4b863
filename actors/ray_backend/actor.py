"""What the actor classes on Ray share: calls that mypy checks, and the memory settings of their processes.

By default glibc returns large freed blocks to the system and requests them again for the next batch, and every page of them
faults again each time. A training step and a packet of some megabytes allocate and free the same sizes over and over, so actors
keep freed memory; what is kept is at most what was once in use. With pages of 2 MB the processor looks up 512 times fewer
addresses. What they gain depends on the processor: benchmarks/peers.py measures it ("tuned").

Imports neither Ray nor torch.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, cast

from ...clusters.scratch import reap_runs

# Read by glibc (2.35 or newer) when a process starts, so it must be in the environment before; others ignore it.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP_BYTES = 1 << 30
_MMAP_BYTES = 32 << 20  # glibc's largest

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


def keep_freed_memory() -> bool:
    """Have this process keep freed memory; whether that could be set."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: its own policy stands
        return False
    settings = [(_M_MMAP_THRESHOLD, _MMAP_BYTES), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, 64 << 20)]
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)
