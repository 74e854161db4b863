"""Runs during which random actors and nodes are killed, and the invariants that must hold nevertheless."""

import os
import random
import signal
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import fedbonsai
from fedbonsai.runtime.events import Notice, PlanEnded, RunEnded, VersionClosed, read_event

from .nodes import OF_WORKER
from .processes import actor_pids, wait_until

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**9, "down_bytes_per_s": 10**9}
VICTIMS = {"WorkerActor": 3, "PartitionHostActor": 3, "ServerActor": 2}  # by weight; the last one is the server
NODE = {"Node": 1}  # with all that is there
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
    "checkpoint": {"share": None},
}


class Killer:
    """Kills so many actors of a run while it is open, or ``node``, which is started again: one of each kind, then at random.

    One to four seconds pass between two kills; ``done`` is their number. A server is killed at any moment, also while it
    starts, but only once until the next version closes: a run whose server dies four times at one checkpoint should end.
    """

    def __init__(self, seed, kills, node=None):
        self._draw, self._kills, self._over = random.Random(seed), kills, threading.Event()
        self._node, self._victims = node, VICTIMS | (NODE if node else {})
        self.killed = Counter()
        self.spares = 1  # times that the server may be killed before the next version closes
        self.fault = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *problem):
        self._over.set()
        self._thread.join()

    @property
    def done(self):
        return sum(self.killed.values())

    def await_share(self, share):
        """Wait until this share of the kills is done, so that the run does not end before them."""
        told = f"only {self.done} of {self._kills} were killed"
        wait_until(lambda: self.fault or self.done >= int(share * self._kills), seconds=300, told=told)
        if self.fault:
            raise self.fault

    def _run(self):
        try:
            kinds = list(self._victims)
            self._draw.shuffle(kinds)
            while self.done < self._kills and not self._over.wait(self._draw.uniform(1.0, 4.0)):
                (drawn,) = self._draw.choices(list(self._victims), list(self._victims.values()))
                kind = kinds.pop() if kinds else drawn
                self._kill_node() if kind == "Node" else self._kill(kind, self._draw.random())
        except Exception as fault:  # raised by ``await_share``
            self.fault = fault

    def _kill(self, kind, which):
        """Kill an actor of a kind, as soon as one exists that may be killed."""
        while not self._over.is_set():
            pids = sorted(actor_pids(kind))
            if pids and (kind != "ServerActor" or self.spares):
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(pids[int(which * len(pids))], signal.SIGKILL)
                    self.killed[kind] += 1
                    self.spares -= kind == "ServerActor"
                    return
            self._over.wait(0.05)

    def _kill_node(self):
        with_server = bool(self._node.pids().intersection(actor_pids("ServerActor")))
        while with_server and not self.spares and not self._over.wait(0.05):
            with_server = bool(self._node.pids().intersection(actor_pids("ServerActor")))
        self._node.kill()
        self.killed["Node with the server" if with_server else "Node"] += 1
        self.spares -= with_server
        self._node.start()


def survive(*, seed, kills, rounds, node=None):
    """A run during which so many kills happen, on the caller's Ray: what was killed, the summary, and the notices.

    ``node``: a node of ``CPUS`` cores, which may be killed too; the head has as many. The run waits for the kills.

    Asserts of the log that each plan has one outcome, no update counts twice, and the ledger is the sum of what the plans
    carried; and of the events iterated that deaths were reported. (They include those that the log lost with a server.)
    """
    notices = []
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        placed = {"ray": {"cpus": OF_WORKER}} if node else {}
        run = fedbonsai.run(CONFIG | placed | {"backend": "ray", "stop": {"rounds": rounds}}, out=out)
        with run, Killer(seed, kills, node) as killer:
            for event in run:
                notices += [event.text] if isinstance(event, Notice) else []
                if isinstance(event, VersionClosed):
                    killer.spares = 1
                    killer.await_share(event.version / rounds)
        events = [read_event(line) for line in (out / "events.jsonl").read_bytes().splitlines()]
    summary = run.summary
    assert isinstance(events[-1], RunEnded)
    reports = [event.report for event in events if isinstance(event, PlanEnded)]
    ended = Counter(report.plan.id for report in reports)
    assert set(ended.values()) == {1}, "a plan with two outcomes"
    assert sorted(ended) == list(range(1, len(ended) + 1)), "a plan without an outcome"
    closed = [event for event in events if isinstance(event, VersionClosed)]
    assert [event.version for event in closed] == list(range(1, rounds + 1))
    done = sum(report.outcome.value == "done" for report in reports)
    assert sum(event.folded for event in closed) == done == 3 * rounds
    for direction in ("up", "down"):
        told = summary[f"{direction}_by_kind"]
        carried = sum(getattr(report.virtual, f"{direction}_bytes") for report in reports)
        assert sum(told.values()) - told.get("control", 0) >= carried
    assert any("died" in text for text in notices) or not killer.killed
    return killer.killed, summary, notices
