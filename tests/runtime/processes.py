"""Processes of the actors that a run started."""

import os
from pathlib import Path


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
