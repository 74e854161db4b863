"""The processes of a run: found by descent, and by a mark in their environment; their memory and processor time."""

import contextlib
import os
import threading
import time
from collections import defaultdict
from pathlib import Path

MARK = "FEDBONSAI_RUN"
TICKS = os.sysconf("SC_CLK_TCK")


class Tree:
    """A process and its descendants; with a mark also those that were detached, and descendants of any that carries it."""

    def __init__(self, root: int, mark: str = "") -> None:
        """``root``: number of a process. ``mark``: value of ``FEDBONSAI_RUN`` in the environment with which it was started."""
        self._root, self._mark = root, f"{MARK}={mark}".encode() if mark else b""
        self._known: dict[int, bool] = {}  # by process number: whether it carries the mark

    def processes(self) -> list[int]:
        """Numbers of the processes that are alive."""
        children: dict[int, list[int]] = defaultdict(list)
        numbers = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
        found = []
        for number in numbers:
            with contextlib.suppress(OSError, IndexError):
                fields = _stat(number)
                if fields[0] != "Z":
                    children[int(fields[1])].append(number)
                    if number == self._root or self._is_marked(number):
                        found.append(number)
        seen = set(found)
        while found:
            for child in children[found.pop()]:
                if child not in seen:
                    seen.add(child)
                    found.append(child)
        return sorted(seen)

    def _is_marked(self, number: int) -> bool:
        if not self._mark:
            return False
        # Read once: some processes (Ray's) write their title over their environment later.
        if number not in self._known:
            self._known[number] = self._mark in Path(f"/proc/{number}/environ").read_bytes()
        return self._known[number]

    def memory_bytes(self) -> int:
        """Proportional set size, summed: memory that processes share counts once."""
        total = 0
        for number in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total

    def cpu_s(self) -> dict[int, float]:
        """Processor seconds by process."""
        found = {}
        for number in self.processes():
            with contextlib.suppress(OSError, IndexError):
                fields = _stat(number)
                found[number] = (int(fields[11]) + int(fields[12])) / TICKS
        return found

    def all_cpu_s(self) -> float:
        """Processor seconds of all processes, also of those that have ended and been waited for."""
        total = 0.0
        for number in self.processes():
            with contextlib.suppress(OSError, IndexError):
                total += sum(map(int, _stat(number)[11:15])) / TICKS
        return total


class PeakMemory(threading.Thread):
    """Samples the memory of a tree until it is stopped, in at most a tenth of the time."""

    def __init__(self, tree: Tree) -> None:
        super().__init__(daemon=True)
        self.peak_bytes, self._tree, self._over = 0, tree, threading.Event()

    def run(self) -> None:
        """Sample."""
        took_s = 0.0
        while not self._over.wait(max(0.2, 10 * took_s)):
            start = time.perf_counter()
            self.peak_bytes = max(self.peak_bytes, self._tree.memory_bytes())
            took_s = time.perf_counter() - start

    def stop(self) -> int:
        """End sampling; the largest sum."""
        self._over.set()
        self.join()
        return self.peak_bytes


def name_of(number: int) -> str:
    """What a process calls itself."""
    words = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    return " ".join(Path(word).name for word in words if not word.startswith("-"))[:60]


def _stat(number: int) -> list[str]:
    """Fields of /proc/N/stat from the state on."""
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
