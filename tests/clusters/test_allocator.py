"""Kept memory does not fault again on the pages of new blocks; imported objects are left out of collections of garbage."""

import gc
import subprocess
import sys
import weakref
from importlib import import_module

import pytest
from fedbonsai.clusters.allocator import importing

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


class Node:
    """An object that only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_the_collector_waits_while_importing_and_skips_what_was_made():
    frozen = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
            made = weakref.ref(Node())
        assert gc.isenabled()
        gc.collect()
        assert made() is not None
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
        gc.collect()
    assert made() is None


def test_after_an_import_that_fails_the_collector_runs_again():
    try:
        with pytest.raises(ModuleNotFoundError), importing():
            import_module("fedbonsai.no_such_module")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
