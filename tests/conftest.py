"""For all tests: one torch thread (two on two busy cores are slower) and kept memory, as in every worker, and a shared Ray.

A test that fails does not make later ones fail.
"""

import gc
import os
import weakref

import pytest
import torch
from fedbonsai.clusters.allocator import keep_freed_memory
from fedbonsai.runtime.api import Run
from hypothesis import settings

from .runtime.processes import wait_until_gone

torch.set_num_threads(1)
keep_freed_memory()
gc.disable()  # until all tests are collected
# Property tests: a few examples of each for every change, many now and then (``make soak``).
settings.register_profile("ci", max_examples=40, deadline=None)
settings.register_profile("deep", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items):
    """Mark tests on Ray."""
    for item in items:
        if "shared_ray" in item.fixturenames:
            item.add_marker("ray")


def pytest_collection_finish():
    """Collections of garbage do not go through what stays: torch, Ray, and thousands of tests."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def runs_are_closed(monkeypatch):
    """Close the runs that a test has not finished: if it fails, its traceback would keep them alive."""
    made, begin = [], Run.__init__

    def noted(run, *arguments, **settings):
        begin(run, *arguments, **settings)
        made.append(weakref.ref(run))

    monkeypatch.setattr(Run, "__init__", noted)
    yield
    for reference in made:
        if (run := reference()) is not None:
            run.close()


class SharedRay:
    """A Ray that several tests use: starting and stopping one takes seconds."""

    def __init__(self):
        self._running = None

    def open(self):
        """The running one, or a new one."""
        import ray
        from fedbonsai.clusters.ray_backend.ray_cluster import start_local

        if self._running is None or not ray.is_initialized():
            self._running = start_local(num_cpus=2, resources={"board": 1})
        return self._running

    def close(self):
        if self._running is not None:
            self._running.close()
            self._running = None


@pytest.fixture(scope="session")
def shared_ray():
    shared = SharedRay()
    yield shared
    shared.close()


@pytest.fixture
def cluster(shared_ray):
    """A Ray that other tests use too, as in a user's notebook; runs join it and do not stop it.

    No actors of earlier runs are left: a test that kills "the worker" must not find one that is ending anyway.
    """
    running = shared_ray.open()
    wait_until_gone()
    return running


@pytest.fixture(scope="module")
def own_ray(shared_ray):
    """For modules whose tests start their own Ray: stops the shared one."""
    shared_ray.close()
