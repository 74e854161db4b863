"""Processes of the actors that a run started, and runs that lose one."""

import os
import signal
import threading
from pathlib import Path

import fedbonsai
from fedbonsai.runtime.events import Notice, PlanEnded, VersionClosed


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


def descends(pid, root):
    """Whether a process is ours or below us: other Rays on the machine are left alone."""
    while pid > 1 and pid != root:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid == root


def killed_in_mid_stream(config, victim):
    """A run on Ray whose second round loses an actor of that kind ("": none) half a second after it began.

    The streams of that round must be longer. Asserts that it was noticed, and that plans were placed again; the summary.
    """
    run = fedbonsai.run(config, backend="ray", workers=2)
    notices, ended = [], []
    for event in run:
        if isinstance(event, VersionClosed) and event.version == 1 and victim:
            threading.Timer(0.5, lambda: os.kill(actor_pids(victim)[0], signal.SIGKILL)).start()
        notices += [event.text] if isinstance(event, Notice) else []
        ended += [event.report] if isinstance(event, PlanEnded) else []
    assert bool(victim) == any("died" in text and "replaced" in text for text in notices), notices
    assert any(report.plan.attempt for report in ended) == bool(victim)
    return run.summary
