"""The data segment of this process: its size, its limit, and giving freed memory back.

The size is ``VmData`` of ``/proc/self/status``: heap and private writable mappings, which is what ``RLIMIT_DATA`` limits since
Linux 4.7. Unlike the address space it does not count libraries and shared memory; unlike resident memory an allocation beyond
its limit fails at once, in the process that makes it, as an error that can be caught.

With glibc's default settings freed memory stays in the process in amounts that differ by 100 MB between two plans. With
``MALLOC`` the idle size stays within some MB: one arena; blocks from 64 KiB on have mappings of their own, which are returned
when they are freed; and the heap is trimmed.
"""

import ctypes
import gc
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read by glibc when a process starts, so it must be in its environment before.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 10),
    "MALLOC_TOP_PAD_": "0",
}
_STATUS = Path("/proc/self/status")
_LEAST_KERNEL = (4, 7)  # from here on RLIMIT_DATA covers private mappings, where torch's tensors are


def limit_obstacle() -> str:
    """Why a data segment cannot be limited on this system; "" if it can."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no limit on the data segment that covers mappings"
    kernel = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    if kernel < _LEAST_KERNEL:
        return f"Linux {platform.release()} does not limit mappings (4.7 and later do)"
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return "the C library is not glibc, whose allocator settings the limit needs"
    return "" if _STATUS.exists() else f"{_STATUS} does not exist"


def data_bytes() -> int:
    """Size of this process's data segment."""
    match = re.search(r"^VmData:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def trim() -> None:
    """Return freed memory to the system, so that the data segment is that of an idle process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """Limit this process's data segment; the soft limit is lifted again afterwards, and the hard one is never touched."""
    import resource  # here, since Windows lacks it

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
