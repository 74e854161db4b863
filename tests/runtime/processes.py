"""Processes of the actors of a run, and runs in which an actor is killed."""

import os
import re
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import fedbonsai
from fedbonsai.runtime.events import Notice, PlanEnded, VersionClosed

ACTORS = ("WorkerActor", "PartitionHostActor", "DistillerActor", "ServerActor")
LIMIT_S = (
    300  # for what takes seconds on an idle machine; longer than any slow machine needs, so that what exceeds it hangs
)


def actor_pids(actor_class):
    """Processes of our Ray's actors of a class, which Ray names after it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(f"ray::{actor_class}".encode()) and descends(int(entry.name), os.getpid()):
                found.append(int(entry.name))
    return found


def has_closed_a_version(folder):
    """Whether the run that writes this folder has closed a version."""
    events = folder / "events.jsonl"
    return events.exists() and b"VersionClosed" in events.read_bytes()


def wait_until_gone():
    """Wait until the actors of earlier runs have ended, which Ray does some time after the run."""
    wait_until(lambda: not [pid for name in ACTORS for pid in actor_pids(name)], told="actors have outlived their run")


def heed_interrupts():
    """Have a command react to SIGINT: it would inherit that SIGINT is ignored if the tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(pid):
    """All descendants of ``pid`` that are alive (zombies are not)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found, frontier = set(), {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def alive(pid):
    """Whether a process is alive (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def command(arguments, **how):
    """A process whose output is captured; it is killed with its descendants at the end, also if the test fails."""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how) as process:
        try:
            yield process
        finally:
            for pid in (process.pid, *descendants(process.pid)):
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, signal.SIGKILL)


def wait_until(condition, *, seconds=LIMIT_S, told="it did not happen"):
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{told} within {seconds} s"
        time.sleep(0.05)


def descends(pid, root):
    """Whether a process is ``root`` or a descendant: other Rays on the machine are not touched."""
    while pid > 1 and pid != root:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid == root


TOLD = {
    "WorkerActor": re.compile("worker of bundle .* died .* (is|was) replaced"),
    "PartitionHostActor": re.compile("host . died .* replaced"),
}
DELAY_S = 0.3


def killed_in_mid_stream(config, *victims):
    """A run on Ray in which an actor of the first class is killed in round 2, one of the second class in round 3, and so on.

    Each is killed ``DELAY_S`` after its round began, so the streams of these rounds must take longer. Asserts that each death
    was reported, and that plans were retried in its round. Returns the summary.
    """
    run = fedbonsai.run(config | {"stop": {"rounds": 1 + len(victims)}}, backend="ray", workers=2)
    notices, again = [], set()
    for event in run:
        if isinstance(event, VersionClosed) and 0 < event.version <= len(victims):
            threading.Timer(DELAY_S, kill_one, [victims[event.version - 1]]).start()
        notices += [event.text] if isinstance(event, Notice) else []
        if isinstance(event, PlanEnded) and event.report.plan.attempt:
            again.add(event.report.plan.version)
    for victim in victims:
        assert sum(bool(TOLD[victim].search(text)) for text in notices) == 1, notices
    assert again == set(range(1, 1 + len(victims)))
    return run.summary


def kill_one(actor_class):
    os.kill(actor_pids(actor_class)[0], signal.SIGKILL)
