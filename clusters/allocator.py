"""Memory settings of processes that train: freed memory is kept, pages are large, and imported objects are not collected.

By default glibc returns large freed blocks to the system and requests them again for the next batch, and every page of them
faults again each time. A training step and a packet of some megabytes allocate and free the same sizes over and over, so actors
and the command line keep freed memory; what is kept is at most what was once in use. With pages of 2 MB the processor looks up
512 times fewer addresses. What they gain depends on the processor: benchmarks/peers.py measures it ("tuned").
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Read by glibc (2.35 or newer) when a process starts, so it must be in the environment before; others ignore it.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
MMAP_BYTES = 32 << 20  # blocks from this size on are mapped apart, and returned; glibc's largest
TRIM_BYTES = 1 << 30  # of free memory at the end of the heap, from which on some is returned
PAD_BYTES = 64 << 20  # that the heap grows by beyond what is requested

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Have this process keep freed memory; whether that could be set."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: its own policy stands
        return False
    settings = [(_M_MMAP_THRESHOLD, MMAP_BYTES), (_M_TRIM_THRESHOLD, TRIM_BYTES), (_M_TOP_PAD, PAD_BYTES)]
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)


@contextmanager
def importing() -> Iterator[None]:
    """For imports of torch and of what needs it: the garbage collector does not run, and later skips what was there.

    An import makes hundreds of thousands of objects that stay. Going through them again and again takes a fifth of the
    processor time of ``import torch``. For processes of our own: in a user's process garbage of the user would stay, too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
