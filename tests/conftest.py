"""For all tests: one torch thread, as every worker has (two on two busy cores cost more than they give); one Ray to share.

A test that fails leaves nothing behind on which the next one would fail.
"""

import os
import weakref

import pytest
import torch
from fedbonsai.runtime.api import Run
from hypothesis import settings

from .runtime.processes import wait_until_gone

torch.set_num_threads(1)
# Property tests: a few examples of each for every change, many now and then (``make soak``).
settings.register_profile("ci", max_examples=60, deadline=None)
settings.register_profile("deep", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items):
    """Tests on Ray have both cores to themselves; the others can run beside each other (``make test``)."""
    for item in items:
        if "shared_ray" in item.fixturenames:
            item.add_marker("ray")


@pytest.fixture(autouse=True)
def runs_are_closed(monkeypatch):
    """Runs that a test has not finished are closed: where it fails, its traceback would keep them."""
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
    """A Ray that stays for whoever asks next: to start and to end one takes seconds."""

    def __init__(self):
        self._running = None

    def open(self):
        """The one that is there, or a new one."""
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
    """A Ray that others use too, as a user's notebook would have one; runs use it and leave it.

    Nothing is left of the runs before: who kills "the worker" must not find one that is ending anyway.
    """
    running = shared_ray.open()
    wait_until_gone()
    return running


@pytest.fixture(scope="module")
def own_ray(shared_ray):
    """For modules whose tests start a Ray of their own: the shared one is not there."""
    shared_ray.close()
