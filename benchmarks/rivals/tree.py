"""The processes of a run: found by a mark in their environment and by descent; their memory and processor time; ending them."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path

MARK = "PEERS_RUN"
TICKS = os.sysconf("SC_CLK_TCK")


class Tree:
    """All processes of one run, also those that were detached from it: descendants of any that carries the mark."""

    def __init__(self, root: subprocess.Popen[bytes], mark: str) -> None:
        """``root``: was started with ``mark`` as the environment variable ``PEERS_RUN``."""
        self.root, self._mark = root, f"{MARK}={mark}".encode()
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
                    if self._is_marked(number):
                        found.append(number)
        seen = set(found)
        while found:
            for child in children[found.pop()]:
                if child not in seen:
                    seen.add(child)
                    found.append(child)
        return sorted(seen)

    def _is_marked(self, number: int) -> bool:
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

    def end(self) -> None:
        """Kill all that is left, by number."""
        for _ in range(50):
            if not (left := self.processes()):
                break
            for number in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.1)
        self.root.wait()


class PeakMemory(threading.Thread):
    """Samples the memory of a tree until it is stopped. Sampling takes processor time, so rounds are not timed meanwhile."""

    def __init__(self, tree: Tree, every_s: float = 0.2) -> None:
        super().__init__(daemon=True)
        self.peak_bytes, self._tree, self._every_s, self._over = 0, tree, every_s, threading.Event()

    def run(self) -> None:
        """Sample."""
        while not self._over.wait(self._every_s):
            self.peak_bytes = max(self.peak_bytes, self._tree.memory_bytes())

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
