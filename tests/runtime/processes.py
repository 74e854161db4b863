"""Processes of the actors that a run started, and runs in which some are killed."""

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

LIMIT_S = 300  # for steps that take seconds on an idle machine: longer means that they hang


def actor_pids(kind):
    """Processes of our Ray's actors of a class."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(f"ray::{kind}".encode()) and descends(int(entry.name), os.getpid()):
                found.append(int(entry.name))
    return found


def has_closed_a_version(folder):
    """Whether the run that writes this folder has closed a version."""
    events = folder / "events.jsonl"
    return events.exists() and b"VersionClosed" in events.read_bytes()


def wait_until_gone(*kinds):
    """Return when no actor of these classes is left of earlier runs, which Ray ends with a delay."""
    wait_until(lambda: not [pid for kind in kinds for pid in actor_pids(kind)], told=f"{kinds} have outlived their run")


def heed_interrupts():
    """For a command that will receive SIGINT: tests in the background ignore it, and the command would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(pid):
    """All descendants of ``pid`` that run (a zombie does not)."""
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
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def command(arguments, **how):
    """A process whose output is read; it is ended with all of its descendants, also if the test fails."""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how) as process:
        try:
            yield process
        finally:
            for pid in (process.pid, *descendants(process.pid)):
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, signal.SIGKILL)


def wait_until(condition, *, seconds=LIMIT_S, told="the condition did not hold"):
    """Return when a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{told} within {seconds} s"
        time.sleep(0.05)


def descends(pid, root):
    """Whether a process is ``root`` or a descendant of it, and not part of another Ray on this machine."""
    while pid > 1 and pid != root:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid == root


TOLD = {
    "Worker": re.compile("worker of bundle .* died .* (is|was) replaced"),
    "PartitionHostActor": re.compile("host . died .* replaced"),
}
DELAY_S = 0.3


def killed_in_mid_stream(config, *victims):
    """A run on Ray that loses an actor of the first kind in its second round, of the second kind in its third, and so on.

    Each dies ``DELAY_S`` after its round began: the streams of these rounds must be longer. Asserts that each was noticed,
    and that plans were placed again in its round; the summary.
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


def kill_one(kind):
    os.kill(actor_pids(kind)[0], signal.SIGKILL)
