"""Runs during which a random process of theirs is killed every few seconds, and what must hold of them all the same."""

import os
import random
import signal
import threading
from collections import Counter

import fedbonsai
from fedbonsai.runtime.events import Notice, PlanEnded, RunEnded, VersionClosed

from .processes import actor_pids

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**9, "down_bytes_per_s": 10**9}
VICTIMS = ("Worker", "PartitionHostActor")
CONFIG = {
    "seed": 7,
    "workers": 2,
    # Half of the devices are split between device and host; updates of several versions are in flight.
    "fleet": {
        "classes": [{"name": f"c{i}", "flop_per_s": 1e9 / 1.7**i} | LINK for i in range(6)],
        "hosts": {"count": 2},
    },
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}},
    "policy": [{"name": "asynchronous", "buffer": 3}, {"name": "splitfed", "cut": "features.0", "window": 2}],
    "server": {"staleness": {"rule": "polynomial"}},
    "training": {"batch_size": 16, "epochs": 1},
    "evaluation": {"every": 1000},
}


class Killer:
    """Kills one of our actors, drawn by the seed, every one to four seconds while it is open."""

    def __init__(self, seed, seconds):
        self._draw, self._seconds, self._over = random.Random(seed), seconds, threading.Event()
        self.killed = Counter()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        threading.Timer(self._seconds, self._over.set).start()
        return self

    def __exit__(self, *problem):
        self._over.set()
        self._thread.join()

    @property
    def at_work(self):
        return not self._over.is_set()

    def _run(self):
        while not self._over.wait(self._draw.uniform(1.0, 4.0)):
            kind = self._draw.choice(VICTIMS)
            if pids := sorted(actor_pids(kind)):
                os.kill(self._draw.choice(pids), signal.SIGKILL)
                self.killed[kind] += 1


def survive(*, seed, seconds, rounds):
    """Run through it; what was killed, and the summary. The caller's Ray must be there.

    Asserts that each plan has one outcome, no update counts twice, the ledger is the sum of what plans carried, and what died
    was noticed.
    """
    ended, closed, notices, last = Counter(), [], [], None
    carried = Counter()
    run = fedbonsai.run(CONFIG | {"backend": "ray", "stop": {"rounds": rounds}})
    with Killer(seed, seconds) as killer:
        for event in run:
            if isinstance(event, PlanEnded):
                report = event.report
                ended[report.plan.id] += 1
                carried["up"] += report.virtual.up_bytes
                carried["down"] += report.virtual.down_bytes
                carried[report.outcome.value] += 1
            closed += [event] if isinstance(event, VersionClosed) else []
            notices += [event.text] if isinstance(event, Notice) else []
            last = event
    assert isinstance(last, RunEnded)
    summary = run.summary
    assert set(ended.values()) == {1}, "a plan with two outcomes"
    assert sorted(ended) == list(range(1, len(ended) + 1)), "a plan without an outcome"
    assert sum(event.folded for event in closed) == carried["done"] == 3 * rounds
    for direction in ("up", "down"):
        told = summary[f"{direction}_by_kind"]
        assert sum(told.values()) - told.get("control", 0) >= carried[direction]
    assert sum("died" in text for text in notices) >= (1 if killer.killed else 0)
    return killer.killed, summary, notices
