"""Reads a million mutated packets with every receiver: no crash, no hang, bounded memory, only ``PacketError`` is raised.

    python benchmarks/soak_packets.py --save      a million packets, seed 0, two processes

Receivers and mutations are those of tests/comms/receivers.py and mutations.py. A packet is identified by (seed, number) and
can be reproduced: ``--packets 1 --first NUMBER`` reads that packet alone. Packets are read by child processes whose limits
the kernel enforces: ``CPU_S`` of processor time for each packet (by a signal that ends the process, also from within C), and
``HEADROOM_BYTES`` of memory above a child's memory at its start. One packet in ``TRACE_EVERY`` is read with all allocations
traced, and must stay below ``PEAK_BYTES``, as in tests/comms/test_fuzz.py. A child that dies counts as one fault, of the
packet that it was reading; its other packets are read again. Faults are printed as they occur, and counted in the last line
(JSON); the exit code is then 1.
"""

import argparse
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before numpy is imported: a process with threads must not be forked

from common import Results, add_options  # noqa: E402
from fedbonsai.comms.errors import PacketError  # noqa: E402
from fedbonsai.tests.comms.mutations import mutated  # noqa: E402
from fedbonsai.tests.comms.receivers import PEAK_BYTES, Case, cases, fault_of  # noqa: E402

CPU_S = 2.0
SILENT_S = 60.0  # a child without progress for so long is killed
HEADROOM_BYTES = 32 * 2**20
TRACE_EVERY = 50
CHUNK = 2000
SHOWN_FAULTS = 20


class Found(NamedTuple):
    """Results of a child: outcomes by name, faults as (number, message), largest traced peak, slowest packet."""

    outcomes: Counter[str]
    faults: list[tuple[int, str]]
    peak_bytes: int
    slowest_s: float


class Child(NamedTuple):
    """A process that reads packets from ``start`` to ``end``; ``at``: number of the packet that it is reading."""

    process: Any
    pipe: Connection
    at: Any
    start: int
    end: int


def read(case: Case, packet: Any, *, traced: bool) -> tuple[str, int]:
    """The outcome of one packet, and its peak of memory if ``traced``. Raises for a fault."""
    peak = 0
    if traced:
        tracemalloc.start()
    try:
        try:
            fault = fault_of(case, case.read(packet))
            outcome = "accepted"
        except PacketError as error:
            fault, outcome = "", type(error).__name__
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not fault, fault
    assert peak < PEAK_BYTES, f"{peak} bytes were allocated for {case.items} items"
    return outcome, peak


def work(pipe: Connection, at: Any, found_cases: list[Case], seed: int, first: int, end: int) -> None:
    """The work of a child: reads packets from ``first`` to ``end``."""
    warnings.simplefilter("error")
    bounded_memory()
    outcomes: Counter[str] = Counter()
    faults, peak_bytes, slowest_s = [], 0, 0.0
    for number in range(first, end):
        at.value = number
        case = found_cases[number % len(found_cases)]
        packet = mutated(case, (seed, number))
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            outcome, peak = read(case, packet, traced=number % TRACE_EVERY == 0)
            outcomes[outcome] += 1
            peak_bytes = max(peak_bytes, peak)
        except BaseException as error:  # any exception is a fault, also the panic of a Rust library
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(where.filename)}:{where.lineno}"
            faults.append((number, f"{case.name}: {type(error).__name__} at {place}: {error}"))
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest_s = max(slowest_s, time.process_time() - started)
    pipe.send(Found(outcomes, faults, peak_bytes, slowest_s))


def bounded_memory() -> None:
    """Limits this process to ``HEADROOM_BYTES`` above its current memory. Larger allocations fail."""
    with open("/proc/self/status", encoding="ascii") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + HEADROOM_BYTES, data + HEADROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def soak(*, seed: int, first: int, packets: int, jobs: int) -> dict[str, Any]:
    """Reads all packets, with ``jobs`` processes at a time."""
    found_cases = list(cases().values())
    for case in found_cases:  # caches are filled before the fork
        for packet in case.packets:
            read(case, packet, traced=False)
    fork = multiprocessing.get_context("fork")
    waiting = [(start, min(start + CHUNK, first + packets)) for start in range(first, first + packets, CHUNK)][::-1]
    children: list[Child] = []
    total, seen, started, printed = Found(Counter(), [], 0, 0.0), {}, time.perf_counter(), 0.0
    while waiting or children:
        while waiting and len(children) < jobs:
            start, end = waiting.pop()
            pipe, theirs = fork.Pipe(duplex=False)
            at = fork.Value("q", start, lock=False)
            process = fork.Process(target=work, args=(theirs, at, found_cases, seed, start, end), daemon=True)
            process.start()
            theirs.close()
            children.append(Child(process, pipe, at, start, end))
        wait([child.pipe for child in children], timeout=1.0)
        now = time.perf_counter()
        for child in list(children):
            if child.pipe.poll():  # it has finished or died
                children.remove(child)
                total = after(child, total, waiting)
            elif seen.setdefault(child.process.pid, (child.at.value, now))[0] != child.at.value:
                seen[child.process.pid] = child.at.value, now
            elif now - seen[child.process.pid][1] > SILENT_S:
                child.process.kill()
        done = sum(total.outcomes.values()) + len(total.faults)
        if now - printed > 30 or not (waiting or children):
            printed = now
            rate = done / (now - started)
            print(f"{done:,} of {packets:,} packets, {len(total.faults)} faults, {rate:,.0f} a second", flush=True)
    seconds = time.perf_counter() - started
    return {
        "packets": packets,
        "faults": len(total.faults),
        "first_faults": [f"({seed}, {number}) {message}" for number, message in sorted(total.faults)[:SHOWN_FAULTS]],
        "outcomes": dict(total.outcomes.most_common()),
        "receivers": len(found_cases),
        "items": found_cases[0].items,
        "traced_peak_bytes": total.peak_bytes,
        "traced_bound_bytes": PEAK_BYTES,
        "headroom_bytes": HEADROOM_BYTES,
        "slowest_cpu_s": round(total.slowest_s, 4),
        "bound_cpu_s": CPU_S,
        "seconds": round(seconds, 1),
        "packets_per_s": round(packets / seconds, 1),
    }


def after(child: Child, total: Found, waiting: list[tuple[int, int]]) -> Found:
    """Adds a child's results to the total. If it died, its packets are read again, except the one that it was reading."""
    try:
        found: Found = child.pipe.recv()
        child.process.join()
    except EOFError:
        child.process.join()
        number, code = int(child.at.value), child.process.exitcode
        ending = "took too long" if code in (-signal.SIGPROF, -signal.SIGKILL) else "died"
        found = Found(Counter(), [(number, f"its process {ending} (exit code {code})")], 0, 0.0)
        parts = ((child.start, number), (number + 1, child.end))
        waiting.extend((start, end) for start, end in parts if start < end)
    for number, message in found.faults:
        print(f"fault at packet {number}: {message}", file=sys.stderr, flush=True)
    return Found(
        total.outcomes + found.outcomes,
        total.faults + found.faults,
        max(total.peak_bytes, found.peak_bytes),
        max(total.slowest_s, found.slowest_s),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packets", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    add_options(parser)
    options = parser.parse_args()
    results = Results("soak_packets", options, seeds=[options.seed])
    result = results.row(
        "all", soak, seed=options.seed, first=options.first, packets=options.packets, jobs=options.jobs
    )
    results.finish(result)
    sys.exit(1 if result["faults"] else 0)
