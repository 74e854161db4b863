"""On this system's own limit, in processes of their own."""

import mmap
import os
import subprocess
import sys

import pytest
from fedbonsai.actors.enforcement.data_segment import MALLOC, data_bytes, limit_obstacle

pytestmark = pytest.mark.skipif(bool(limit_obstacle()), reason=f"no limit of the data segment: {limit_obstacle()}")

LIMITED = """
import mmap
import numpy as np
from fedbonsai.actors.enforcement.data_segment import data_bytes, limited, trim

with limited(data_bytes() + 30_000_000):
    small = np.ones(20_000_000, np.uint8)
    try:
        large = np.ones(20_000_000, np.uint8)
        print("allocated")
    except MemoryError:
        print("refused")
    shared = mmap.mmap(-1, 50_000_000)  # of the object store, say: not of the data segment
large = np.ones(20_000_000, np.uint8)
print("lifted")
before = data_bytes()
del small, large
trim()
print(before - data_bytes() >= 40_000_000)
"""


def test_allocations_beyond_the_limit_fail_and_freed_memory_leaves_the_segment() -> None:
    environment = os.environ | MALLOC | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert ended.stdout.split() == ["refused", "lifted", "True"]


def test_the_size_grows_by_what_is_allocated() -> None:
    """A mapping, since the allocator of this process may have kept memory that it was given before."""
    before = data_bytes()
    with mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
        assert data_bytes() - before >= len(kept)
