"""A process that keeps freed memory does not fault again on the pages of blocks that it allocates anew."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from fedbonsai.clusters.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [np.ones(20 << 20, np.uint8) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(4)][-1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc")
def test_pages_of_freed_memory_fault_once():
    def last(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, returned = last("kept"), last("returned")
    assert kept < 5
    assert returned > kept
